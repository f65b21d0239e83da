"""In the guest: flood.py SECONDS keeps every connection to the agent that a user may have busy with odd questions."""

import array
import json
import os
import socket
import sys
import time
from typing import Any

ODD: list[dict[str, Any]] = [
    {"op": "explain", "argv": ["x"], "path": "\ud800", "cwd": ""},
    {"op": "explain", "argv": ["\ud800"], "path": "x", "cwd": ""},
    {"op": "explain", "argv": ["x"] * 1024, "path": "\0", "cwd": "\0"},
    {"op": "explain", "argv": ["\x01" * 9000], "path": "x", "cwd": "x"},
    {"op": "list"},
    {"op": "status"},
    {"op": "gate", "shell": "/usr/local/bin/forbidden", "interactive": True},
    {"op": "listener"},
]


def connect() -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(1)
    connection.connect("/run/persona/agent.sock")
    return connection


held = [connect() for _ in range(16)]
end = time.monotonic() + float(sys.argv[1])
program = os.open("/usr/bin/true", os.O_PATH)
sent = 0
while time.monotonic() < end:
    for index, connection in enumerate(held):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [program]))]
        try:
            connection.sendmsg([json.dumps(ODD[sent % len(ODD)]).encode()], rights, socket.MSG_DONTWAIT)
            sent += 1
        except BlockingIOError:
            time.sleep(0.001)
        except OSError:
            connection.close()
            time.sleep(0.01)
            held[index] = connect()
print("sent", sent)
