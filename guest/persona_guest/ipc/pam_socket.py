"""The socket of pam_persona.so: root peers only, one short conversation a connection, never a wait."""

import array
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from persona_guest.core.pam_wire import PACKET_MAX, Caller, Op, Verdict, WireError, parse, reply
from persona_guest.loop import GONE, READABLE, Loop, Timer

_CONNECTIONS_MAX = 256
_DEADLINE_S = 10.0  # longer than the module's own
_UCRED = struct.Struct("=iII")


class Reply(Protocol):
    """Sends a packet, and a descriptor with it, which stays the caller's to close."""

    def __call__(self, packet: bytes, fd: int | None = None) -> None:
        """Once a question."""


class Peer(Protocol):
    """What is done with each packet; ``reply`` may be called later, once."""

    def account(self, caller: Caller, pid: int, reply: Reply) -> None:
        """May this user log in?"""

    def open(self, caller: Caller, pid: int, reply: Reply) -> str | None:
        """A session opens; its id where a listener may follow."""

    def listener(self, session: str, fd: int, reply: Reply) -> None:
        """Takes the listener over."""

    def present(self, pid: int, session: str, reply: Reply) -> None:
        """Is this process inside a gated session?"""

    def abandoned(self, session: str) -> None:
        """The opener went away before its listener came."""


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


class PamSocket:
    """Serves the binary protocol for ``door``; ``root`` is the only uid that may speak it."""

    def __init__(self, loop: Loop, path: Path, door: Peer, root: int = 0) -> None:
        self._loop = loop
        self._door = door
        self._root = root
        self._server = listen(path, 0o600)
        self._open: set[_Conversation] = set()
        loop.watch(self._server.fileno(), READABLE, self._accept)

    def close(self) -> None:
        """No new conversations; those that are open end."""
        self._loop.unwatch(self._server.fileno())
        self._server.close()
        for conversation in list(self._open):
            conversation.end()

    def _accept(self, _events: int) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:
            return
        connection.setblocking(False)
        pid, uid, _gid = peer_credentials(connection)
        if uid != self._root or len(self._open) >= _CONNECTIONS_MAX:
            connection.close()
            return
        self._open.add(_Conversation(self._loop, connection, pid, self._door, self._open.discard))


class _Conversation:
    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        pid: int,
        door: Peer,
        ended: Callable[["_Conversation"], None],
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._pid = pid
        self._door = door
        self._ended = ended
        self._session: str | None = None  # opened, its listener still to come
        self._deadline: Timer = loop.call_later(_DEADLINE_S, self.end)
        loop.watch(connection.fileno(), READABLE, self._ready)

    def end(self) -> None:
        if self._connection.fileno() < 0:
            return
        self._deadline.cancel()
        self._loop.unwatch(self._connection.fileno())
        self._connection.close()
        if self._session is not None:
            self._door.abandoned(self._session)
            self._session = None
        self._ended(self)

    def _reply(self, packet: bytes, fd: int | None = None) -> None:
        if self._connection.fileno() < 0:
            return
        try:
            rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            self._connection.sendmsg([packet], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            self.end()

    def _ready(self, events: int) -> None:
        if not events & READABLE and events & GONE:
            self.end()
            return
        try:
            packet, fds, _flags, _ = socket.recv_fds(self._connection, PACKET_MAX + 1, 4, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            self.end()
            return
        try:
            self._serve(packet, fds)
        except WireError as error:
            self._reply(reply(Verdict.DENY, f"persona: malformed request: {error}"))
            self.end()
        finally:
            for fd in fds:
                os.close(fd)

    def _serve(self, packet: bytes, fds: list[int]) -> None:
        if not packet:
            self.end()
            return
        op, caller = parse(packet)
        if caller is not None:
            if self._session is not None:
                raise WireError(f"{op.name} in the middle of a conversation")
            if op is Op.ACCOUNT:
                self._door.account(caller, self._pid, self._reply)
            else:
                self._opened(self._door.open(caller, self._pid, self._reply))
            return
        session, self._session = self._session, None
        if session is None:
            raise WireError(f"{op.name} without OPEN")
        if op is Op.PRESENT:
            self._door.present(self._pid, session, self._reply)
        elif len(fds) == 1:
            self._door.listener(session, os.dup(fds[0]), self._reply)
        else:
            self._door.abandoned(session)
            raise WireError("LISTENER wants exactly one descriptor")

    def _opened(self, session: str | None) -> None:
        if session is not None and self._connection.fileno() < 0:  # the module was gone when the answer came
            self._door.abandoned(session)
        else:
            self._session = session
