"""A syslog server: RFC 5424 messages over TCP (RFC 6587) or TLS (RFC 5425), both with octet counting."""

import contextlib
import fcntl
import os
import socket
import ssl
import termios
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from persona_broker.audit.sinks.interface import Line

_TIMEOUT_S = 5.0
_FACILITY = 13  # log audit
_POLL_S = 0.02


class Syslog:
    """One connection, made anew when it fails.

    Syslog has no acknowledgement.  A batch counts as sent when the server's machine has taken all of its bytes; what a
    server then loses itself nobody here can know, so ``audit verify`` goes by the chain.
    """

    name = "syslog"

    def __init__(self, host: str, port: int, ca_file: str | None, hostname: str) -> None:
        """``ca_file``: the authorities that may have signed the server's certificate; ``None`` = no TLS."""
        self._address = (host, port)
        self._ca_file = ca_file
        self._hostname = hostname
        self._socket: socket.socket | None = None

    def send(self, lines: Sequence[Line]) -> None:
        """Raises ``OSError`` (``ssl.SSLError`` is one)."""
        try:
            connection = self._connected()
            connection.sendall(b"".join(map(self._frame, lines)))
            _wait_until_taken(connection)
        except OSError:
            self.close()
            raise

    def _frame(self, line: Line) -> bytes:
        at = datetime.fromtimestamp(line.at_us / 1e6, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        head = f"<{_FACILITY * 8 + line.severity}>1 {at} {self._hostname} persona-broker {os.getpid()} {line.kind} -"
        data = f"{head} {line.text}".encode()
        return b"%d %b" % (len(data), data)

    def _connected(self) -> socket.socket:
        if self._socket is not None and not _is_over(self._socket):
            return self._socket
        self.close()
        plain = socket.create_connection(self._address, timeout=_TIMEOUT_S)
        try:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if self._ca_file is None:
                self._socket = plain
            else:
                context = ssl.create_default_context(cafile=self._ca_file)
                self._socket = context.wrap_socket(plain, server_hostname=self._address[0])
        except BaseException:
            plain.close()
            raise
        return self._socket

    def close(self) -> None:
        """Ends the connection."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None


def _is_over(connection: socket.socket) -> bool:
    """Whether the server ended the connection: a syslog server sends nothing."""
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as plain:  # below TLS
            plain.setblocking(False)
            return plain.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _wait_until_taken(connection: socket.socket) -> None:
    """Raises ``TimeoutError`` where the other side does not take what was sent."""
    deadline = time.monotonic() + _TIMEOUT_S
    while int.from_bytes(fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0" * 4), "little"):
        if time.monotonic() > deadline:
            raise TimeoutError("the server takes nothing")
        time.sleep(_POLL_S)
