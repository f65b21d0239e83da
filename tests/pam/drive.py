"""Drives a PAM stack as a program would, through pam_start_confdir(3); prints what came of it as JSON.

Arguments: confdir, service, users (with commas between; a line of JSON for each), then of ``account``,
``session``, ``exec``, ``copy`` (an exec outside of the system's directories), ``fds``, ``again``, ``short``.  A
process of its own for each run: a seccomp filter cannot be taken off again.
"""

import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
from typing import Any

KINDS = ("seccomp", "landlock", "socket")

pam = ctypes.CDLL("libpam.so.0")
libc = ctypes.CDLL(None)
libc.strdup.restype = ctypes.c_void_p
libc.calloc.restype = ctypes.c_void_p


class Message(ctypes.Structure):
    _fields_ = (("style", ctypes.c_int), ("text", ctypes.c_char_p))


class Response(ctypes.Structure):
    _fields_ = (("text", ctypes.c_void_p), ("code", ctypes.c_int))


MESSAGES = ctypes.POINTER(ctypes.POINTER(Message))
CONVERSATION = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, MESSAGES, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)


class Conversation(ctypes.Structure):
    _fields_ = (("function", CONVERSATION), ("data", ctypes.c_void_p))


def main(confdir: str, service: str, user: str, *steps: str) -> None:
    said: list[str] = []

    def converse(count: int, messages: Any, responses: Any, _data: object) -> int:
        for index in range(count):
            said.append(messages[index].contents.text.decode())
        responses[0] = libc.calloc(count, ctypes.sizeof(Response))
        return 0

    callback = CONVERSATION(converse)
    handle = ctypes.c_void_p()
    conversation = Conversation(callback, None)
    start = pam.pam_start_confdir(
        service.encode(), user.encode(), ctypes.byref(conversation), confdir.encode(), ctypes.byref(handle)
    )
    results: dict[str, object] = {"start": start}
    for step in steps:
        if step == "account":
            results[step] = pam.pam_acct_mgmt(handle, 0)
        elif step in ("session", "again"):
            results[step] = pam.pam_open_session(handle, 0)
        elif step == "exec":
            done = subprocess.run(["/bin/echo", "ran"], capture_output=True, text=True, check=False)
            results[step] = done.stdout.strip()
        elif step == "copy":
            try:
                subprocess.run([shutil.copy("/bin/true", confdir)], check=False)
                results[step] = "ran"
            except OSError as error:
                results[step] = error.strerror
        elif step == "short":  # from here on one descriptor is left
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            highest = max(map(int, os.listdir("/proc/self/fd")))
            while os.dup(0) <= highest:
                pass
            highest = max(fd for fd in range(highest + 8) if os.path.lexists(f"/proc/self/fd/{fd}"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, limits[1]))
        elif step == "fds":
            found = [
                os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 64) if os.path.lexists(f"/proc/self/fd/{fd}")
            ]
            results[step] = [link for link in found if any(kind in link for kind in KINDS)]
    results["messages"] = said
    print(json.dumps(results))


if __name__ == "__main__":
    for user in sys.argv[3].split(","):
        main(*sys.argv[1:3], user, *sys.argv[4:])
