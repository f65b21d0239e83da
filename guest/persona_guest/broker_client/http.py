"""One kept HTTP/1.1 connection to the broker, over TLS or a Unix socket, with bounds on size and time.

Raises ``BrokerError`` for everything that is not an answer; what an answer means is the caller's.
"""

import contextlib
import http.client
import json
import os
import socket
import ssl
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from persona.problems import PersonaError, Reason
from persona_guest.settings import Broker

_ANSWER_MAX = 1024 * 1024


class BrokerError(PersonaError):
    """The broker could not be asked (``broker_unreachable``) or answered nonsense (``broker_misbehaved``)."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def open_connection(settings: Broker, url: str, timeout: float) -> http.client.HTTPConnection:
    """A connection that is not made yet.  Raises ``BrokerError`` where the settings do not suffice."""
    if not url:
        raise BrokerError(Reason.BROKER_UNREACHABLE, "no broker is configured (guest.toml: broker.url)")
    if url.startswith("unix:"):
        return _UnixConnection(url.removeprefix("unix:"), timeout)
    parts = urlsplit(url)
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise BrokerError(Reason.BROKER_UNREACHABLE, f"{settings.ca_file}: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return http.client.HTTPSConnection(parts.hostname or "", parts.port or 443, timeout=timeout, context=context)


def read_token(settings: Broker) -> str:
    """The guest's token, read at each connection so that a rotation needs no restart."""
    try:
        return Path(settings.token_file).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BrokerError(Reason.BROKER_UNREACHABLE, f"{settings.token_file}: {error}") from error


class Connection:
    """Calls one after the other; reconnects when the broker closed in between.  Not for two threads."""

    def __init__(self, settings: Broker) -> None:
        self._settings = settings
        self._connection: http.client.HTTPConnection | None = None
        self._headers: dict[str, str] = {}
        self.dated: str | None = None  # the Date of the last answer

    def call(self, method: str, path: str, body: object | None, deadline: float) -> tuple[int, Any]:
        """Status and decoded JSON (``None`` for an empty body) before ``deadline`` (monotonic seconds).

        Raises ``BrokerError``.
        """
        payload = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        for attempt in (1, 2):
            kept = self._connection is not None
            try:
                return self._exchange(method, path, payload, deadline)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                stale = kept and attempt == 1 and isinstance(error, OSError) and not isinstance(error, TimeoutError)
                if not stale:  # a kept connection may have been closed while it was idle: once more
                    reason = Reason.BROKER_UNREACHABLE if isinstance(error, OSError) else Reason.BROKER_MISBEHAVED
                    raise BrokerError(reason, _describe(error)) from error
            except BrokerError:
                self.close()
                raise
        raise BrokerError(Reason.BROKER_UNREACHABLE, "the connection was closed twice")

    def _exchange(self, method: str, path: str, payload: bytes | None, deadline: float) -> tuple[int, Any]:
        connection = self._connection
        if connection is None:
            connection = open_connection(self._settings, self._settings.url, _left(deadline))
            self._headers = {
                "Authorization": "Bearer " + read_token(self._settings),
                "Content-Type": "application/json",
                "Host": "broker",
            }
            connection.connect()
            if connection.sock.family != socket.AF_UNIX:
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connection = connection
        connection.sock.settimeout(_left(deadline))
        connection.request(method, path, payload, self._headers)
        response = connection.getresponse()
        self.dated = response.getheader("Date")
        content = bytearray()
        while len(content) <= _ANSWER_MAX:
            if connection.sock is not None:
                connection.sock.settimeout(_left(deadline))
            chunk = response.read1(65536)
            if not chunk:
                break
            content += chunk
        if len(content) > _ANSWER_MAX:
            raise BrokerError(Reason.BROKER_MISBEHAVED, "an answer over 1 MiB")
        response.close()  # a 204 has no end to read to, and left open it would refuse the next answer
        if response.will_close:
            self.close()
        if not content:
            return response.status, None
        try:
            return response.status, json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BrokerError(Reason.BROKER_MISBEHAVED, f"an answer that is not JSON: {error}") from error

    def abort(self) -> None:
        """Ends a call that another thread is in: its deadline has passed, whatever the peer drips."""
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):  # it ended by itself meanwhile
                connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Drops the connection; the next call makes a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer in time")
    return left


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
