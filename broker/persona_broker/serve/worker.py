"""gunicorn's thread worker with what it lacks towards clients: patience with a bound, and errors as problems.

gunicorn's own timeout watches the worker, not its clients: as many slow ones as there are threads would
hold them all.
"""

import contextlib
import http
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine, ParseException
from gunicorn.workers.gthread import ThreadWorker

from persona.problems import Fault
from persona_broker.lasting import is_lasting

REQUEST_MAX_S = 5.0  # from the first byte of a request to the last of its answer, which takes milliseconds
PRESSED_MAX_S = 1.0  # the same while every thread is taken

_at_exit: list[Callable[[], None]] = []


def at_exit(call: Callable[[], None]) -> None:
    """Has something called when this worker is told to end, before it waits for answers in progress."""
    _at_exit.append(call)


class BoundedWorker(ThreadWorker):
    """Ends connections whose request takes too long to arrive or whose answer too long to be read."""

    def run(self) -> None:
        # the pipe that signals write to: the wait for connections ends with it, not a second later
        self.poller.register(self.PIPE[0], selectors.EVENT_READ, lambda pipe: os.read(pipe, 512))
        super().run()

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        for call in _at_exit:
            call()

    def init_process(self) -> None:
        self._handling: dict[Any, float] = {}
        threading.Thread(target=self._sweep, name="sweep", daemon=True).start()
        super().init_process()

    def handle(self, conn: Any) -> Any:
        self._handling[conn] = time.monotonic()
        try:
            return super().handle(conn)
        finally:
            self._handling.pop(conn, None)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """What is no HTTP is answered as every other error is; the rest is gunicorn's to log."""
        if not isinstance(exc, ParseException):
            super().handle_error(req, client, addr, exc)
            return
        status = http.HTTPStatus.BAD_REQUEST
        if isinstance(exc, LimitRequestHeaders):
            status = http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        elif isinstance(exc, LimitRequestLine):
            status = http.HTTPStatus.REQUEST_URI_TOO_LONG
        code = Fault.BAD_REQUEST if status == http.HTTPStatus.BAD_REQUEST else Fault.TOO_LARGE
        body = {"type": "about:blank", "title": status.phrase, "status": status, "code": code, "detail": "not HTTP"}
        data = json.dumps(body)
        head = (
            f"HTTP/1.1 {status:d} {status.phrase}\r\nConnection: close\r\n"
            f"Content-Type: application/problem+json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        with contextlib.suppress(OSError):  # whoever sends no HTTP may not wait for the answer either
            client.sendall((head + data).encode())

    def _sweep(self) -> None:
        while True:
            time.sleep(0.5)
            handling = [item for item in list(self._handling.items()) if not is_lasting(item[0].sock)]
            patience = REQUEST_MAX_S if len(handling) < self.cfg.threads else PRESSED_MAX_S
            latest = time.monotonic() - patience
            for conn, since in handling:
                if since < latest:
                    with contextlib.suppress(OSError):  # it ended meanwhile
                        # the plain socket below TLS: a TLS goodbye could block on the same peer
                        socket.socket.shutdown(conn.sock, socket.SHUT_RDWR)
