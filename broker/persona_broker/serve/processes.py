"""Runs the broker's parts, each in a process of its own: one ends, all end; none outlives the supervisor."""

import ctypes
import http.client
import os
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Collection, Mapping

from persona_broker.serve.gunicorn_server import Endpoint

END_S = 5.0  # for connections that are being answered; then they are cut
FILES_MAX = 16_384  # a connection is one
_PR_SET_PDEATHSIG = 1  # prctl(2)


def supervise(
    parts: dict[str, Callable[[], None]], ready: Callable[[], bool], announce: Callable[[], None], last: str = ""
) -> int:
    """Runs the parts until one ends or a signal comes; the exit code.

    ``announce`` is called once, when ``ready`` first says so.  The part ``last`` is ended after all others.
    """
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: asked.append(received))
    _allow_files()
    children = {_start(part): name for name, part in parts.items()}
    announced = False
    while not asked:
        if not announced and ready():
            announce()
            announced = True
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            print(f"persona-broker: its {children.pop(pid)} process ended; stopping", file=sys.stderr)
            _end_all(children, last)
            return os.waitstatus_to_exitcode(status) or 1
        time.sleep(0.1 if announced else 0.01)
    _end_all(children, last)
    return 0


def _end_all(children: Mapping[int, str], last: str) -> None:
    _end([pid for pid, name in children.items() if name != last])
    _end([pid for pid, name in children.items() if name == last])


def _start(part: Callable[[], None]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)
    try:
        part()
    except SystemExit as stop:
        os._exit(stop.code if isinstance(stop.code, int) else 1)
    os._exit(0)


def _allow_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_MAX if most == resource.RLIM_INFINITY else min(FILES_MAX, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _end(children: Collection[int]) -> None:
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + END_S
    waiting = set(children)
    while waiting and time.monotonic() < deadline:
        for pid in list(waiting):
            if os.waitpid(pid, os.WNOHANG)[0]:
                waiting.discard(pid)
        time.sleep(0.02)
    for pid in waiting:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket.  It sends ``localhost`` as ``Host``: servers refuse a path there."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def answers(endpoint: Endpoint) -> bool:
    """Whether the application behind an endpoint says that it is ready, as a client would ask it."""
    bind = endpoint.bind
    connection: http.client.HTTPConnection
    if bind.startswith("unix:"):
        connection = UnixConnection(bind.removeprefix("unix:"), timeout=1)
    else:
        host, _, port = bind.rpartition(":")
        host = host.strip("[]")
        where = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not bound
        if endpoint.certificate is None:
            connection = http.client.HTTPConnection(where, int(port), timeout=1)
        else:
            # our own process on this machine: it is told nothing, and its certificate may name other hosts
            context = ssl._create_unverified_context()  # noqa: S323 - only whether it answers is asked
            connection = http.client.HTTPSConnection(where, int(port), timeout=1, context=context)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
