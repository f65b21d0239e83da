"""A process whose leader has ended while a thread of it goes on: /proc shows it as a zombie, and it is none."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

from persona_guest.kernel.task import Task

_CODE = """
import ctypes, os, sys, threading, time
if len(sys.argv) > 1:
    os.setresuid(*[int(sys.argv[1])] * 3)
threading.Thread(target=time.sleep, args=(60,)).start()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)
"""


@contextlib.contextmanager
def headless(uid: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Runs as ``uid``, for a minute at most."""
    process = subprocess.Popen([sys.executable, "-c", _CODE, *([] if uid is None else [str(uid)])])
    deadline = time.monotonic() + 10
    while not Task(process.pid).has_ended() and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
