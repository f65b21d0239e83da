"""One kept HTTP/1.1 connection to the broker, over TLS or a Unix socket, with bounds on size and time.

Raises ``BrokerError`` for everything that is not an answer; what an answer means is the caller's.  A connection
is one thread's; the one thing that another thread may do is to ``cut`` its ``Line``.

Each connection knows from the broker's answers which version of the protocol it speaks (``persona.wire``), and asks
no broker in words that it does not know.
"""

import contextlib
import errno
import http.client
import json
import math
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from persona import wire
from persona.problems import PersonaError, Reason
from persona_guest.settings import Broker

_ANSWER_MAX = 1024 * 1024


class BrokerError(PersonaError):
    """The broker could not be asked (``broker_unreachable``) or answered nonsense (``broker_misbehaved``)."""


class NotAsked(BrokerError):
    """A question that cannot be put so that this broker, which is older, understands it as it is meant."""


# A request's JSON; or a callable that makes it for a version of the protocol, which raises ``NotAsked`` or nothing.
Body = Callable[[int], object]


class Line:
    """The socket of a connection, as another thread may touch it: to cut it, and for nothing else.

    It holds a descriptor of its own, since http.client drops its one whenever it likes to, and the number could be
    another file's by the time that the other thread uses it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._copy: socket.socket | None = None
        self._until = math.inf  # monotonic; what is in the middle of something may take until then
        self._cut = False
        self._ended = False

    # --- the connection's own thread ---

    def begin(self, until: float) -> None:
        """A call begins that ``cut_late`` may end after ``until``."""
        with self._lock:
            self._until, self._cut = until, False

    def made(self, sock: socket.socket) -> None:
        """Makes ``sock`` the socket that ``cut_late`` and ``end`` shut down.

        Raises ``OSError`` (ended, or no descriptor left).
        """
        copy = socket.socket(fileno=os.dup(sock.fileno()))  # no SSLSocket: its shutdown ends the encryption first
        with self._lock:
            if self._ended:
                copy.close()
                raise ConnectionAbortedError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))
            before, self._copy = self._copy, copy
        if before is not None:
            before.close()

    def over(self) -> bool:
        """Forgets the socket; returns whether another thread had cut it."""
        with self._lock:
            copy, self._copy = self._copy, None
            self._until = math.inf
            cut = self._cut or self._ended
        if copy is not None:
            copy.close()
        return cut

    def rest(self) -> None:
        """Takes the deadline away: the call has ended, and the connection stays open."""
        with self._lock:
            self._until = math.inf

    # --- any thread; these raise nothing ---

    def cut_late(self, now: float) -> None:
        """Ends what is being sent or received if it should have ended before ``now``."""
        with self._lock:  # until it is cut it is not closed, and no other call begins
            if now > self._until:
                self._cut = True
                self._shut()

    def end(self) -> None:
        """Ends what is being sent or received, and whatever would come after it."""
        with self._lock:
            self._ended = True
            self._shut()

    def _shut(self) -> None:
        if self._copy is not None:
            with contextlib.suppress(OSError):  # it ended by itself meanwhile
                self._copy.shutdown(socket.SHUT_RDWR)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, line: Line, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path
        self._line = line

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
        self._line.made(self.sock)


class _TlsConnection(http.client.HTTPSConnection):
    def __init__(self, host: str, port: int, context: ssl.SSLContext, line: Line, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout, context=context)
        self._tls = context
        self._line = line

    def connect(self) -> None:
        self.sock = socket.create_connection((self.host, self.port), self.timeout)
        self._line.made(self.sock)  # before the handshake, which a peer may drag out as well
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)


def open_connection(settings: Broker, url: str, line: Line, timeout: float) -> http.client.HTTPConnection:
    """A connection that is not made yet; ``line`` can cut it once it is.

    Raises ``BrokerError`` where the settings do not suffice.
    """
    if not url:
        raise BrokerError(Reason.BROKER_UNREACHABLE, "no broker is configured (guest.toml: broker.url)")
    if url.startswith("unix:"):
        return _UnixConnection(url.removeprefix("unix:"), line, timeout)
    parts = urlsplit(url)
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise BrokerError(Reason.BROKER_UNREACHABLE, f"{settings.ca_file}: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return _TlsConnection(parts.hostname or "", parts.port or 443, context, line, timeout)


def read_token(settings: Broker) -> str:
    """The guest's token, read at each connection so that a rotation needs no restart."""
    try:
        return Path(settings.token_file).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BrokerError(Reason.BROKER_UNREACHABLE, f"{settings.token_file}: {error}") from error


class Connection:
    """Calls one after the other; reconnects when the broker closed in between.

    Not for two threads, but for ``cut_late`` and ``end``.
    """

    def __init__(self, settings: Broker) -> None:
        self._settings = settings
        self._line = Line()
        self._connection: http.client.HTTPConnection | None = None
        self._headers: dict[str, str] = {}
        self.dated: str | None = None  # the Date of the last answer
        self._wire: int | None = None  # the version that both speak, as of the last answer; None = no answer yet

    def call(self, method: str, path: str, body: object | Body | None, deadline: float) -> tuple[int, Any]:
        """Status and decoded JSON (``None`` for an empty body) before ``deadline`` (monotonic seconds).

        A ``body`` that is callable is made for the version that the broker speaks, which it is asked for where it is
        not known yet.  The answer of a broker that turns out to be older than that is not taken, except for one
        that says no more than that something was received (204): it is asked anew in its own words.

        Raises ``BrokerError``.
        """
        if not callable(body):
            return self._call(method, path, body, deadline)
        if self._wire is None:
            self._call("GET", "/healthz", None, deadline)
        for _ in range(wire.CURRENT):  # each time the broker is an older one
            version = self._wire or wire.FIRST
            status, answer = self._call(method, path, body(version), deadline)
            if status == http.HTTPStatus.NO_CONTENT or (self._wire or wire.FIRST) >= version:
                return status, answer
        raise BrokerError(Reason.BROKER_MISBEHAVED, "each of its answers is of an older version")

    def _call(self, method: str, path: str, body: object | None, deadline: float) -> tuple[int, Any]:
        payload = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        self._line.begin(deadline)
        for tries in (1, 2):
            kept = self._connection is not None
            try:
                answer = self._exchange(method, path, payload, deadline)
                self._line.rest()
                return answer
            except (OSError, http.client.HTTPException) as error:
                cut = self.close()
                idle = isinstance(error, OSError) and not isinstance(error, TimeoutError)
                # a kept connection may have been closed while it was idle: once more then
                if not (kept and tries == 1 and idle and not cut):
                    reason = Reason.BROKER_UNREACHABLE if isinstance(error, OSError) else Reason.BROKER_MISBEHAVED
                    raise BrokerError(reason, _describe(error)) from error
            except BrokerError:
                self.close()
                raise
            except Exception as error:  # whatever a peer makes the library stumble over: a thread lives by this
                self.close()
                raise BrokerError(Reason.BROKER_MISBEHAVED, f"{type(error).__name__}: {error}") from error
            self._line.begin(deadline)
        raise BrokerError(Reason.BROKER_UNREACHABLE, "the connection was closed twice")

    def _exchange(self, method: str, path: str, payload: bytes | None, deadline: float) -> tuple[int, Any]:
        connection = self._connection
        if connection is None:
            connection = open_connection(self._settings, self._settings.url, self._line, _left(deadline))
            self._headers = {
                "Authorization": "Bearer " + read_token(self._settings),
                "Content-Type": "application/json",
                "Host": "broker",
                wire.HEADER: str(wire.CURRENT),
            }
            self._connection = connection
            connection.connect()
        connection.sock.settimeout(_left(deadline))
        connection.request(method, path, payload, self._headers)
        response = connection.getresponse()
        self.dated = response.getheader("Date")
        try:
            self._wire = wire.common(response.getheader(wire.HEADER))
        except wire.WireError as error:
            raise BrokerError(Reason.BROKER_MISBEHAVED, error.message) from error
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

    def cut_late(self, now: float) -> None:
        """Ends a call that another thread is in, if its deadline was before ``now``, whatever the peer drips.

        From any thread; raises nothing.
        """
        self._line.cut_late(now)

    def end(self) -> None:
        """Ends a call that another thread is in, and refuses all that come.  From any thread; raises nothing."""
        self._line.end()

    def close(self) -> bool:
        """Drops the connection; the next call makes a new one.  Whether another thread had cut it."""
        cut = self._line.over()
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.close()
        return cut


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer in time")
    return left


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
