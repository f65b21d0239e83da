"""The socket of ``persona`` and ``persona-shell``: anyone may connect, known by SO_PEERCRED alone."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from persona.problems import Fault, PersonaError
from persona_guest.core.pam_protocol import Caller
from persona_guest.ipc.seqpacket import Acceptor, peer_credentials
from persona_guest.kernel.seccomp import is_listener
from persona_guest.loop import GONE, READABLE, Loop

log = logging.getLogger("persona.users")

_REQUEST_MAX = 64 * 1024
_ANSWER_MAX = 192 * 1024
_DEADLINE_S = 8.0
_PER_USER = 16  # connections of one uid: a user can fill their own share only
_TOTAL_MAX = 1024  # of all but root, who may have many uids at hand (newuidmap): execs and logins need descriptors too
_FDS_MAX = 2
_PERSONAL = frozenset({"gate", "status"})  # the ops that need the user database's word on who asks
_AGAIN_S = 1.0

Respond = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Call:
    """One request: who (from the kernel), what, and the descriptors that came along.

    A handler that keeps a descriptor duplicates it: these are closed when it returns.
    """

    pid: int
    uid: int
    gid: int
    op: str
    fields: dict[str, Any]
    fds: tuple[int, ...]
    # what the user database says of uid; none where it knows nobody of that number, or need not be asked
    caller: Caller | None = None

    def text(self, name: str, default: str | None = None, limit: int = 4096) -> str:
        """A string field.  Raises ``PersonaError`` naming it."""
        value = self.fields.get(name, default)
        if not isinstance(value, str) or len(value) > limit:
            raise PersonaError(Fault.BAD_REQUEST, f"{name}: expected a string of at most {limit} characters")
        return value

    def only(self, *names: str) -> None:
        """Raises ``PersonaError`` where there is a field that is none of ``names``."""
        unknown = sorted(set(self.fields) - set(names) - {"op"})
        if unknown:
            raise PersonaError(Fault.BAD_REQUEST, f"{unknown[0]}: unknown field of {self.op}")


Handler = Callable[[Call, Respond], None]
Whois = Callable[[int], Caller | None]


class UserSocket:
    """Serves JSON requests; ``handle`` answers now or later, once a request, or raises ``PersonaError``.

    ``whois`` is asked in a thread, and for few requests: the user database may have to ask the network (NSS),
    and root's way out of everything must not hang on that.
    """

    def __init__(self, loop: Loop, path: Path, handle: Handler, whois: Whois) -> None:
        self._loop = loop
        self._handle = handle
        self._whois = whois
        self._count: Counter[int] = Counter()
        self._acceptor = Acceptor(loop, path, 0o666, self._accepted)

    def close(self) -> None:
        """No new connections."""
        self._acceptor.close()

    def _accepted(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        pid, uid, gid = peer_credentials(connection)
        if self._count[uid] >= _PER_USER or (uid != 0 and self._count.total() >= _TOTAL_MAX):
            connection.close()
            return
        _Connection(self._loop, connection, (pid, uid, gid), self._handle, self._whois, lambda: self._ended(uid))
        self._count[uid] += 1

    def _ended(self, uid: int) -> None:
        self._count[uid] -= 1
        if not self._count[uid]:
            del self._count[uid]


class _Connection:
    """One request at a time: until it is answered no other is read, so that nobody asks faster than that.

    Closing the last copy of a descriptor may wait for whoever sent it: for the peer of a socket of theirs
    (SO_LINGER, socket(7)), or for a file system of their own.  So what they send is received, and what is
    left of it closed, in a thread; of that the loop gets only what is closed in no time.
    """

    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        peer: tuple[int, int, int],
        handle: Handler,
        whois: Whois,
        ended: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._peer = peer
        self._handle = handle
        self._whois = whois
        self._ended = ended
        self._over = False
        self._reading = True
        self._receiving = False
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _ANSWER_MAX)
        loop.add_reader(connection.fileno(), READABLE, self._ready)
        self._deadline = loop.call_later(_DEADLINE_S, self._end)

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._deadline.cancel()
            self._loop.remove_reader(self._connection.fileno())
            if not self._receiving:  # or its number might become another's in the middle of that
                self._aside(self._close)

    def _aside(self, work: Callable[[], None]) -> None:
        try:
            threading.Thread(target=work, name="caller", daemon=True).start()
        except RuntimeError:  # no thread to be had now: nothing of this is worth the agent
            self._loop.call_later(_AGAIN_S, lambda: self._aside(work))

    def _close(self) -> None:
        self._connection.close()  # and with it what they sent and nobody read
        self._loop.call_soon_threadsafe(self._ended)  # until then it counts as one of theirs

    def _read_on(self, reading: bool) -> None:
        if not self._over and reading is not self._reading:
            self._reading = reading
            self._loop.remove_reader(self._connection.fileno())
            self._loop.add_reader(self._connection.fileno(), READABLE if reading else 0, self._ready)

    def _answer(self, value: dict[str, Any]) -> None:
        if self._over:
            return
        data = json.dumps(value).encode()
        if len(data) > _ANSWER_MAX:
            data = json.dumps(_refusal(Fault.TOO_LARGE, "the answer is too large")).encode()
        try:
            self._connection.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            self._end()
        self._read_on(True)

    def _ready(self, events: int) -> None:
        if not events & READABLE or not self._reading:
            if events & GONE:
                self._end()
            return
        self._read_on(False)
        self._receiving = True
        self._aside(self._receive)

    def _receive(self) -> None:
        data = b""
        fds: list[int] = []
        kept: list[int] = []
        call: Call | PersonaError | None
        try:
            with contextlib.suppress(OSError):
                data, fds, _, _ = socket.recv_fds(self._connection, _REQUEST_MAX + 1, _FDS_MAX, socket.MSG_CMSG_CLOEXEC)
            kept += [fd for fd in fds if _closes_at_once(fd)]
            call = self._understood(data, tuple(kept)) if data else None
        except Exception:  # as in ``_received``: a thread that dies ends the agent, and no caller may bring that about
            log.exception("a request of uid %d could not be read", self._peer[1])
            call = PersonaError(Fault.INTERNAL, "the agent could not serve this; its journal says why")
        whole = len(kept) == len(fds)
        self._loop.call_soon_threadsafe(lambda: self._received(call, kept, whole))
        for fd in set(fds) - set(kept):
            with contextlib.suppress(OSError):  # their file system may say what it likes
                os.close(fd)

    def _understood(self, data: bytes, fds: tuple[int, ...]) -> Call | PersonaError:
        try:
            call = _parse(data, self._peer, fds)
        except PersonaError as error:
            return error
        return replace(call, caller=self._whois(call.uid)) if call.op in _PERSONAL else call

    def _received(self, call: Call | PersonaError | None, fds: list[int], whole: bool) -> None:
        self._receiving = False
        try:
            if self._over:
                self._aside(self._close)
            elif call is None:
                self._end()
            elif not whole:
                raise PersonaError(Fault.BAD_REQUEST, "descriptors: expected O_PATH ones, or a seccomp listener")
            elif isinstance(call, PersonaError):
                raise call
            else:
                self._handle(call, self._answer)
        except PersonaError as error:
            self._answer(_refusal(error.code, error.message))
        except OSError:
            self._end()
        except Exception:  # whatever a caller can provoke: the agent serves the others
            log.exception("a request of uid %d could not be served", self._peer[1])
            self._answer(_refusal(Fault.INTERNAL, "the agent could not serve this; its journal says why"))
        finally:
            for fd in fds:
                os.close(fd)


def _closes_at_once(fd: int) -> bool:
    """Nothing is told of it to a peer or a file system: open(2) on O_PATH."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH) or is_listener(fd)


def _parse(data: bytes, peer: tuple[int, int, int], fds: tuple[int, ...]) -> Call:
    if len(data) > _REQUEST_MAX:
        raise PersonaError(Fault.TOO_LARGE, f"a request over {_REQUEST_MAX} bytes")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PersonaError(Fault.BAD_REQUEST, f"not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("op"), str):
        raise PersonaError(Fault.BAD_REQUEST, "op: missing")
    return Call(*peer, value["op"], value, fds)


def _refusal(code: str, message: str) -> dict[str, Any]:
    return {"ok": False, "code": str(code), "message": message}
