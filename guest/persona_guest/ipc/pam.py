"""The socket that pam_persona.so connects to: root only, one short conversation a connection (core/pam_protocol.py)."""

import array
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from persona_guest.core.pam_protocol import PACKET_MAX, Caller, Groups, Op, WireError, parse
from persona_guest.ipc.seqpacket import Acceptor, peer_credentials
from persona_guest.loop import GONE, READABLE, Loop, Timer

log = logging.getLogger("persona.agent")

_CONNECTIONS_MAX = 256
_DEADLINE_S = 10.0  # longer than the module's own
_NGROUPS_MAX = 65536  # NGROUPS_MAX: the kernel lets nobody be in more


class Reply(Protocol):
    """Sends a packet, and a descriptor with it, which stays the caller's to close."""

    def __call__(self, packet: bytes, fd: int | None = None) -> None:
        """Once a question."""


class Peer(Protocol):
    """What answers the PAM module; ``reply`` may be called later, once."""

    def account(self, caller: Caller, pid: int, reply: Reply) -> None:
        """May this user log in?"""

    def open(self, caller: Caller, pid: int, reply: Reply) -> str | None:
        """A session opens; returns its id where a listener may follow."""

    def listener(self, session_id: str, fd: int, reply: Reply) -> None:
        """The filter is in place: takes its listener over."""

    def present(self, pid: int, session_id: str, reply: Reply) -> None:
        """A filter is there already: is this process inside a gated session of ours?"""

    def abandoned(self, session_id: str) -> None:
        """The opener went away before its listener came."""


class PamSocket:
    """Serves the binary protocol; ``admissions`` answers.  ``root`` is the only uid that may speak it."""

    def __init__(self, loop: Loop, path: Path, admissions: Peer, root: int = 0) -> None:
        self._loop = loop
        self._admissions = admissions
        self._root = root
        self._open: set[_Conversation] = set()
        self._acceptor = Acceptor(loop, path, 0o600, self._accepted, lambda: len(self._open) >= _CONNECTIONS_MAX)

    def close(self) -> None:
        """No new conversations; those that are open end."""
        self._acceptor.close()
        for conversation in list(self._open):
            conversation.end()

    def _accepted(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        pid, uid, _gid = peer_credentials(connection)
        if uid != self._root:
            connection.close()
            return
        self._open.add(_Conversation(self._loop, connection, pid, self._admissions, self._open.discard))


class _Conversation:
    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        pid: int,
        admissions: Peer,
        ended: Callable[["_Conversation"], None],
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._pid = pid
        self._admissions = admissions
        self._ended = ended
        self._session_id: str | None = None  # opened, its listener still to come
        self._groups: list[str] = []  # of the question that is still to come
        loop.add_reader(connection.fileno(), READABLE, self._ready)
        self._deadline: Timer = loop.call_later(_DEADLINE_S, self.end)

    def end(self) -> None:
        if self._connection.fileno() < 0:
            return
        self._deadline.cancel()
        self._loop.remove_reader(self._connection.fileno())
        self._connection.close()
        if self._session_id is not None:
            self._admissions.abandoned(self._session_id)
            self._session_id = None
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
            log.error("a login asked in a way that is not understood; the PAM module goes by the mode: %s", error)
            self.end()
        except Exception:  # no descriptor left, say: hung up on, the module goes by the mode, and the agent goes on
            log.exception("a login could not be decided")
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
            if self._session_id is not None:
                raise WireError(f"{op.name} in the middle of a conversation")
            if len(self._groups) >= _NGROUPS_MAX:
                raise WireError(f"more than {_NGROUPS_MAX} groups")
            if isinstance(caller, Groups):
                self._groups += caller.names
                return
            groups, self._groups = self._groups, []
            caller = caller._replace(groups=(*groups, *caller.groups))
            if op is Op.ACCOUNT:
                self._admissions.account(caller, self._pid, self._reply)
            else:
                self._opened(self._admissions.open(caller, self._pid, self._reply))
            return
        session_id, self._session_id = self._session_id, None
        if session_id is None:
            raise WireError(f"{op.name} without OPEN")
        if op is Op.PRESENT:
            self._admissions.present(self._pid, session_id, self._reply)
        elif len(fds) == 1:
            try:
                listener = os.dup(fds[0])
            except OSError:
                self._admissions.abandoned(session_id)
                raise
            self._admissions.listener(session_id, listener, self._reply)
        else:
            self._admissions.abandoned(session_id)
            raise WireError("LISTENER wants exactly one descriptor")

    def _opened(self, session_id: str | None) -> None:
        if session_id is not None and self._connection.fileno() < 0:  # the module was gone when the answer came
            self._admissions.abandoned(session_id)
        else:
            self._session_id = session_id
