"""The gated sessions: begun, kept for the agent after this one, ended; and what each is under as a whole.

Everything here runs in the loop's thread.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from persona.decisions import PersonaRef
from persona.problems import Fault, PersonaError, Reason
from persona_guest.bases import Bases
from persona_guest.core.messages import printable
from persona_guest.core.sessions import Session, from_json, to_json
from persona_guest.gate.supervisor import Supervisor
from persona_guest.ipc.standby_socket import Keeping
from persona_guest.kernel import seccomp
from persona_guest.questions import Admitted
from persona_guest.records import Logins

log = logging.getLogger("persona.agent")

_PER_USER = 500  # each holds a descriptor here and in systemd's store


class Sessions:
    """``closed`` tells the broker that a session is over; ``directory`` outlives this agent."""

    def __init__(
        self,
        directory: Path,
        supervisor: Supervisor,
        keeping: Keeping,
        closed: Callable[[Session], None],
        note: Logins,
    ) -> None:
        self._directory = directory
        self._supervisor = supervisor
        self._keeping = keeping
        self._closed = closed
        self._note = note
        self.base: dict[str, Admitted] = {}
        self.bases: Bases | None = None  # only where personas bind
        self._directory.mkdir(mode=0o700, exist_ok=True)

    def full(self, uid: int) -> bool:
        """Whether this user has as many as he may."""
        return sum(gated.session.uid == uid for gated in self._supervisor.sessions.values()) >= _PER_USER

    def bind(self, session: Session, admitted: Admitted) -> None:
        """Before its first process: a login that starts nothing still has sshd's forwards.

        Raises ``PersonaError`` or ``OSError`` where its network cannot be bound.
        """
        self.base[session.id] = admitted
        if self.bases is not None:
            self.bases.opened(session, admitted.persona)

    def unbind(self, session_id: str) -> None:
        """It is over, or did not begin."""
        self.base.pop(session_id, None)
        if self.bases is not None:
            self.bases.ended(session_id)

    def exempted(self, uid: int) -> None:
        """Somebody logs in who is not looked at."""
        if self.bases is not None:
            self.bases.exempted(uid)

    def begin(self, session: Session, fd: int) -> None:
        """The filter is in place: answers for it from now on.  Raises ``PersonaError`` and closes ``fd`` otherwise."""
        if not seccomp.is_listener(fd) or self.full(session.uid):
            os.close(fd)
            raise PersonaError(Fault.BAD_REQUEST, "that is no listener, or this user has too many sessions")
        path = self._directory / f"{session.id}.json"
        try:
            path.touch(mode=0o600)
            path.write_text(json.dumps(to_json(session)))
        except OSError as error:  # a full /run: a listener that stayed open here would hang every exec of the session
            os.close(fd)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise PersonaError(Reason.ENFORCEMENT_FAILED, f"{path}: {error.strerror}") from error
        self._keeping.keep(session.id, fd)
        self._supervisor.add(session, fd, fresh=True)
        log.info("session %s of %s gated (%s)", session.id, printable(session.subject.user), session.service)

    def ended(self, session: Session) -> None:
        """The last process of a session is gone."""
        (self._directory / f"{session.id}.json").unlink(missing_ok=True)
        self.unbind(session.id)
        self._keeping.forget(session.id)
        self._closed(session)
        self._note(session.id, session.subject.user, "session_end")
        log.info("session %s ended", session.id)

    def restore(self, listeners: dict[str, int]) -> None:
        """Takes up the sessions of the agent before this one from what was kept; ``listeners`` is emptied."""
        for path in self._directory.glob("s-*.json"):
            try:
                session = from_json(json.loads(path.read_text()))
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.error("%s: %s; its session is refused everything", path, error)
                continue
            fd = listeners.pop(path.stem, None)
            if fd is None:
                path.unlink(missing_ok=True)
            else:
                self._supervisor.add(session, fd)
        while listeners:  # no copy may be left anywhere: then execs there fail with ENOSYS, else they hang
            name, fd = listeners.popitem()
            os.close(fd)
            self._keeping.forget(name)

    def listeners(self) -> list[tuple[str, int]]:
        """Every session's id and listener."""
        return [(gated.session.id, gated.listener) for gated in self._supervisor.sessions.values()]

    def base_of(self, session_id: str) -> PersonaRef | None:
        """The persona that applies to a session as a whole, as far as it is known."""
        base = self.base.get(session_id)
        return base.persona if base is not None else None

    def rebase(self, session_id: str, persona: PersonaRef | None, policy: str | None) -> None:
        """From now on it is this one."""
        if session_id in self.base or session_id in self._supervisor.sessions:
            self.base[session_id] = Admitted(persona, policy)
        if self.bases is not None:
            self.bases.rebased(session_id, persona)
