"""Listening sockets of kind SOCK_SEQPACKET, unix(7): who connects, and what happens while no descriptor is free."""

import errno
import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from persona_guest.loop import READABLE, Loop, Timer

log = logging.getLogger("persona.agent")

_AGAIN_S = 0.1
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)  # what there may be again in a moment
_UCRED = struct.Struct("=iII")


def peer_credentials(connection: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the process that connected: SO_PEERCRED, socket(7)."""
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid, gid


def listen(path: Path, mode: int) -> socket.socket:
    """A SOCK_SEQPACKET listener at ``path`` with these permissions from its first moment on."""
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    previous = os.umask(0o777 & ~mode)
    try:
        server.bind(str(path))
    finally:
        os.umask(previous)
    server.listen(128)
    return server


class Acceptor:
    """Takes connections at ``path``, in the loop's thread; ``accepted`` gets each.

    Without a free descriptor it tries again a moment later: without that pause a socket with somebody waiting would
    call again and again, and the loop do nothing else.
    """

    def __init__(
        self,
        loop: Loop,
        path: Path,
        mode: int,
        accepted: Callable[[socket.socket], None],
        full: Callable[[], bool] = lambda: False,
    ) -> None:
        """While it is ``full()``, who connects waits.  Raises ``OSError``."""
        self._loop = loop
        self._full = full
        self._accepted = accepted
        self._server = listen(path, mode)
        self._pause: Timer | None = None
        self._quiet = False
        self._wait()

    def close(self) -> None:
        """No new connections."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._server.fileno())
        self._server.close()

    def _wait(self) -> None:
        self._pause = None
        self._loop.add_reader(self._server.fileno(), READABLE, self._ready)

    def _ready(self, _events: int) -> None:
        if self._full():
            self._rest("too many are open")
            return
        try:
            connection, _ = self._server.accept()
        except OSError as error:
            if error.errno in _SHORT:
                self._rest(str(error.strerror))
            return
        self._quiet = False
        try:
            self._accepted(connection)
        except OSError as error:  # nothing of one connection is worth the agent
            log.error("a connection could not be served: %s", error)
            connection.close()

    def _rest(self, why: str) -> None:
        """Who connects stays in the queue, and is served when others are gone."""
        if not self._quiet:
            log.error("no connection can be taken now: %s", why)
        self._quiet = True
        self._loop.remove_reader(self._server.fileno())
        self._pause = self._loop.call_later(_AGAIN_S, self._wait)
