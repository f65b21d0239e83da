"""gunicorn around the two applications, each in a process tree of its own, and bounds on slow clients."""

import contextlib
import http.client
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flask import Flask
from gunicorn.app.base import BaseApplication
from gunicorn.workers.gthread import ThreadWorker

REQUEST_MAX_S = 15.0  # from the first byte to the last: a decision takes milliseconds
API_THREADS = 16
STREAM_THREADS = 520  # STREAMS_MAX and some for health checks
KEEPALIVE_S = 300  # guests keep one connection


class BoundedWorker(ThreadWorker):
    """A gthread worker that ends connections whose request takes too long to arrive or to be read.

    gunicorn's own timeout watches the worker, not its clients: sixteen slow ones would hold all threads.
    """

    def init_process(self) -> None:
        self._handling: dict[Any, float] = {}
        threading.Thread(target=self._sweep, name="sweep", daemon=True).start()
        super().init_process()

    def handle(self, conn: Any) -> Any:
        self._handling[conn] = time.monotonic() + REQUEST_MAX_S
        try:
            return super().handle(conn)
        finally:
            self._handling.pop(conn, None)

    def _sweep(self) -> None:
        while True:
            time.sleep(1)
            now = time.monotonic()
            for conn, deadline in list(self._handling.items()):
                if now > deadline:
                    with contextlib.suppress(OSError):  # it ended meanwhile
                        # the plain socket below TLS: a TLS goodbye could block on the same peer
                        socket.socket.shutdown(conn.sock, socket.SHUT_RDWR)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to listen, ``host:port`` or ``unix:/path``, and with which certificate."""

    bind: str
    certificate: Path | None
    key: Path | None


class _Server(BaseApplication):
    def __init__(self, load: Callable[[], Flask], options: dict[str, Any]) -> None:
        self._load_app = load
        self._options = options
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._options.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        return self._load_app()


def _options(endpoint: Endpoint, *, workers: int, threads: int, worker: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "bind": endpoint.bind,
        "workers": workers,
        "threads": threads,
        "worker_class": worker,
        "worker_connections": max(1000, threads + 100),
        "keepalive": KEEPALIVE_S,
        "timeout": 30,
        "graceful_timeout": 1,
        "limit_request_line": 2048,
        "limit_request_fields": 32,
        "limit_request_field_size": 4096,
        "loglevel": "warning",
        "umask": 0o077,
        "proc_name": "persona-broker",
    }
    if endpoint.certificate is not None:
        options |= {"certfile": str(endpoint.certificate), "keyfile": str(endpoint.key)}
        options["ssl_version"] = ssl.PROTOCOL_TLS_SERVER
    return options


def serve_api(load: Callable[[], Flask], endpoint: Endpoint, workers: int) -> None:
    """Questions; does not return."""
    worker = "persona_broker.server.BoundedWorker"
    _Server(load, _options(endpoint, workers=workers, threads=API_THREADS, worker=worker)).run()


def serve_streams(load: Callable[[], Flask], endpoint: Endpoint) -> None:
    """Event streams: one worker, so that there is one watcher; does not return."""
    _Server(load, _options(endpoint, workers=1, threads=STREAM_THREADS, worker="gthread")).run()


def supervise(parts: dict[str, Callable[[], None]], ready: Callable[[], bool], announce: Callable[[], None]) -> int:
    """Runs each part in a process of its own until one ends or a signal comes; the exit code.

    ``announce`` is called once, when ``ready`` first says so.
    """
    children: dict[int, str] = {}
    for name, part in parts.items():
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            try:
                part()
            except SystemExit as stop:
                os._exit(stop.code if isinstance(stop.code, int) else 1)
            os._exit(0)
        children[pid] = name
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: asked.append(received))
    announced = False
    code = 0
    while children:
        if asked:
            _end(children)
            return 0
        if not announced and ready():
            announce()
            announced = True
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            print(f"persona-broker: its {children.pop(pid)} process ended; stopping", file=sys.stderr)
            code = os.waitstatus_to_exitcode(status) or 1
            _end(children)
            return code
        time.sleep(0.01 if not announced else 0.1)
    return code


def _end(children: dict[int, str]) -> None:
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 5
    waiting = set(children)
    while waiting and time.monotonic() < deadline:
        for pid in list(waiting):
            if os.waitpid(pid, os.WNOHANG)[0]:
                waiting.discard(pid)
        time.sleep(0.02)
    for pid in waiting:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


class _UnixConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.host)


def answers(endpoint: Endpoint) -> bool:
    """Whether the application behind an endpoint says that it is ready, as a client would ask it."""
    bind = endpoint.bind
    connection: http.client.HTTPConnection
    if bind.startswith("unix:"):
        connection = _UnixConnection(bind.removeprefix("unix:"), timeout=1)
    else:
        host, _, port = bind.rpartition(":")
        where = "127.0.0.1" if host in ("", "0.0.0.0") else host  # noqa: S104 - only compared
        if endpoint.certificate is None:
            connection = http.client.HTTPConnection(where, int(port), timeout=1)
        else:
            # our own certificate, asked on this machine for nothing secret: it may name other hosts
            context = ssl._create_unverified_context()  # noqa: S323
            connection = http.client.HTTPSConnection(where, int(port), timeout=1, context=context)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
