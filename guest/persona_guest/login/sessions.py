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
from persona_guest import files
from persona_guest.audit.logins import Logins
from persona_guest.broker.client import Admitted
from persona_guest.core.messages import printable
from persona_guest.core.reassignment import named
from persona_guest.enforce.network.user_rules import UserRules
from persona_guest.gate.supervisor import Supervisor
from persona_guest.ipc.standby import Keeping
from persona_guest.kernel import seccomp
from persona_guest.session.model import Session, from_json, to_json
from persona_guest.settings import Mode

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
        self.user_rules: UserRules | None = None  # only where personas bind
        self.lift: Callable[[int], None] = lambda _uid: None  # what a user left in memory bounds them no more
        self._unsaved: dict[str, Session] = {}  # complain mode alone begins what it cannot keep

    def full(self, uid: int) -> bool:
        """Whether this user has as many as they may."""
        return sum(gated.session.uid == uid for gated in self._supervisor.sessions.values()) >= _PER_USER

    def bind(self, session: Session, admitted: Admitted) -> None:
        """Before its first process: a login that starts nothing still has sshd's forwards.

        Raises ``PersonaError`` or ``OSError`` where its network cannot be bound.
        """
        self.base[session.id] = admitted
        if self.user_rules is not None:
            self.user_rules.opened(session, admitted.persona)

    def unbind(self, session_id: str) -> None:
        """It is over, or did not begin."""
        self.base.pop(session_id, None)
        if self.user_rules is not None:
            self.user_rules.ended(session_id)

    def exempted(self, uid: int) -> None:
        """Somebody logs in who is not looked at."""
        self.lift(uid)
        if self.user_rules is not None:
            self.user_rules.exempted(uid)

    def begin(self, session: Session, fd: int) -> None:
        """The filter is in place: answers for it from now on.  Raises ``PersonaError`` and closes ``fd`` otherwise."""
        if not seccomp.is_listener(fd) or self.full(session.uid):
            os.close(fd)
            raise PersonaError(Fault.BAD_REQUEST, "that is no listener, or this user has too many sessions")
        try:
            self._save(session)
            self._supervisor.add(session, fd, fresh=True)
        except OSError as error:  # a listener that stayed open here would hang every exec of the session
            self._supervisor.sessions.pop(session.id, None)
            self._unsaved.pop(session.id, None)
            os.close(fd)
            with contextlib.suppress(OSError):
                self._path(session.id).unlink(missing_ok=True)
            raise PersonaError(Reason.ENFORCEMENT_FAILED, f"this session cannot be kept: {error}") from error
        self._keeping.keep(session.id, fd)
        log.info("session %s of %s gated (%s)", session.id, printable(session.subject.user), session.service)

    def _save(self, session: Session) -> None:
        """Raises ``OSError``, but not in complain mode, which stops nobody for want of space."""
        try:
            files.write(self._path(session.id), json.dumps(to_json(session)))
        except OSError as error:
            if self._supervisor.settings.mode is Mode.ENFORCE:
                raise
            log.error("%s; an agent that starts before this is mended lets session %s start nothing", error, session.id)
            self._unsaved[session.id] = session

    def save_again(self) -> None:
        """Call now and then: keeps what could not be kept when it began."""
        for session in list(self._unsaved.values()):
            del self._unsaved[session.id]
            self._save(session)
        if self.user_rules is not None:
            self.user_rules.save_again()

    def _path(self, session_id: str) -> Path:
        return self._directory / f"{session_id}.json"

    def ended(self, session: Session) -> None:
        """The last process of a session is gone."""
        self._unsaved.pop(session.id, None)
        with contextlib.suppress(OSError):  # a restart finds a file without a listener, and removes it then
            self._path(session.id).unlink(missing_ok=True)
        self.unbind(session.id)
        self._keeping.forget(session.id)
        self._closed(session)
        self._note(session.id, session.subject.user, "session_end")
        log.info("session %s ended", session.id)

    def restore(self, listeners: dict[str, int]) -> None:
        """Takes up the sessions of the agent before this one from what was kept; ``listeners`` is emptied."""
        files.clear_unfinished(self._directory)
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
        before = self.base.get(session_id)
        if before is not None and before.persona != persona:
            was = named(before.persona)
            log.info(
                "session %s: %s (policy %s) applies now, before %s", session_id, named(persona), policy or "-", was
            )
        if before is not None or session_id in self._supervisor.sessions:
            self.base[session_id] = Admitted(persona, policy)
        if self.user_rules is not None:
            self.user_rules.rebased(session_id, persona)
