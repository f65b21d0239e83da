"""The socket of ``persona`` and ``persona-shell``: anyone may connect, known by SO_PEERCRED alone."""

import json
import os
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona.problems import Fault, PersonaError
from persona_guest.ipc.pam_socket import listen, peer_credentials
from persona_guest.loop import GONE, READABLE, Loop

_REQUEST_MAX = 64 * 1024
_ANSWER_MAX = 192 * 1024
_DEADLINE_S = 8.0
_PER_USER = 16  # connections of one uid: a user can fill his own share only
_FDS_MAX = 2

Answer = Callable[[dict[str, Any]], None]


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


Handler = Callable[[Call, Answer], None]


class UserSocket:
    """Serves JSON requests; ``handle`` answers now or later, once a request, or raises ``PersonaError``."""

    def __init__(self, loop: Loop, path: Path, handle: Handler) -> None:
        self._loop = loop
        self._handle = handle
        self._count: Counter[int] = Counter()
        self._server = listen(path, 0o666)
        loop.watch(self._server.fileno(), READABLE, self._accept)

    def close(self) -> None:
        """No new connections."""
        self._loop.unwatch(self._server.fileno())
        self._server.close()

    def _accept(self, _events: int) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:
            return
        connection.setblocking(False)
        pid, uid, gid = peer_credentials(connection)
        if self._count[uid] >= _PER_USER:
            connection.close()
            return
        self._count[uid] += 1
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _ANSWER_MAX)
        deadline = self._loop.call_later(_DEADLINE_S, lambda: end())

        def end() -> None:
            if connection.fileno() >= 0:
                deadline.cancel()
                self._loop.unwatch(connection.fileno())
                connection.close()
                self._count[uid] -= 1
                if not self._count[uid]:
                    del self._count[uid]

        def answer(value: dict[str, Any]) -> None:
            if connection.fileno() < 0:
                return
            data = json.dumps(value).encode()
            if len(data) > _ANSWER_MAX:
                data = json.dumps(_refusal(Fault.TOO_LARGE, "the answer is too large")).encode()
            try:
                connection.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError:
                end()

        def ready(events: int) -> None:
            if not events & READABLE and events & GONE:
                end()
                return
            fds: list[int] = []
            try:
                data, fds, _, _ = socket.recv_fds(connection, _REQUEST_MAX + 1, _FDS_MAX, socket.MSG_CMSG_CLOEXEC)
                if not data:
                    end()
                    return
                self._handle(_parse(data, pid, uid, gid, tuple(fds)), answer)
            except PersonaError as error:
                answer(_refusal(error.code, error.message))
            except OSError:
                end()
            finally:
                for fd in fds:
                    os.close(fd)

        self._loop.watch(connection.fileno(), READABLE, ready)


def _parse(data: bytes, pid: int, uid: int, gid: int, fds: tuple[int, ...]) -> Call:
    if len(data) > _REQUEST_MAX:
        raise PersonaError(Fault.TOO_LARGE, f"a request over {_REQUEST_MAX} bytes")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PersonaError(Fault.BAD_REQUEST, f"not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("op"), str):
        raise PersonaError(Fault.BAD_REQUEST, "op: missing")
    return Call(pid, uid, gid, value["op"], value, fds)


def _refusal(code: str, message: str) -> dict[str, Any]:
    return {"ok": False, "code": str(code), "message": message}
