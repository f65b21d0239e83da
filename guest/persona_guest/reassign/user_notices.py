"""What happens to running processes, for the user's terminal and for the record."""

import logging
import time
from collections.abc import Callable

from persona.decisions import Denied
from persona.documents import Persona
from persona.problems import PersonaError, Reason
from persona.record_codec import Record
from persona.shown import words
from persona_guest.audit import records
from persona_guest.broker.documents import Personas
from persona_guest.core.denials import COMMAND_MAX, Book
from persona_guest.core.masks import Masks
from persona_guest.core.messages import limit_line, printable, refusal_line
from persona_guest.core.persona_cgroups import PersonaCgroup
from persona_guest.enforce.cgroups.user_memory import lacking
from persona_guest.enforce.network.rejects import Refusal
from persona_guest.gate.hang_watchdog import HangWatchdog
from persona_guest.gate.terminal import tell
from persona_guest.kernel.cgroup import Hierarchy
from persona_guest.loop import Loop
from persona_guest.program.process import Running
from persona_guest.session.model import Session
from persona_guest.session.placement import Placement
from persona_guest.session.registry import Registry

log = logging.getLogger("persona.enforce")

_MANAGER = "systemd-user"  # the PAM service of users' service managers, which have no terminal
_TRIED_MAX = 32  # processes of a session, until one has a terminal
_AGAIN_S = 0.1
_NETWORK_HELP = "its network_access does not list that; 'persona status' shows what it lists"


class Notices:
    """Tells a session's user in one line what happened, and records it."""

    def __init__(
        self,
        loop: Loop,
        registry: Registry,
        tree: Hierarchy,
        personas: Personas,
        hang_watchdog: HangWatchdog,
        denials: Book,
        masks: Masks,
        record: Callable[[Record], None],
    ) -> None:
        self._loop = loop
        self._registry = registry
        self._tree = tree
        self._personas = personas
        self._hang_watchdog = hang_watchdog
        self._denials = denials
        self._masks = masks
        self._record = record

    def tell(self, placement: Placement, line: str) -> None:
        """Writes one line to the session's user, through the first process of it that has a terminal or pipe.

        What a process has as its standard error may hang: the caller is between the watchdog's ``enter`` and
        ``leave``.  A terminal that another one is just writing to takes nothing: it is tried once more then, and the
        record has it anyway.
        """
        if not self._written(placement, line):
            self._loop.call_later(_AGAIN_S, lambda: self._tell_again(placement, line))

    def _tell_again(self, placement: Placement, line: str) -> None:
        login = self._registry.get(placement.session_id)
        if login is not None:
            with self._hang_watchdog.watching(login.session):
                self._written(placement, line)

    def _written(self, placement: Placement, line: str) -> bool:
        try:
            pids = [
                pid
                for place in placement.places.values()
                if not place.withdrawn and not place.managed
                for pid in self._tree.processes(place.cgroup)
            ]
        except OSError as error:
            log.warning("session %s is not told: %s", placement.session_id, error)
            return False
        return any(tell(pid, printable(line)) for pid in sorted(pids)[:_TRIED_MAX])

    def alarm(self, place: PersonaCgroup, reason: Reason) -> None:
        """Tells and records that a place ran into a limit."""
        login = self._registry.get(place.session_id)
        if login is None or login.placement is None:
            return
        try:
            persona = self._personas.get(place.persona)
        except PersonaError:  # it is kept while it is used; without it there is nothing to say
            return
        line = limit_line(persona, reason, lacking(self._tree, place, persona))
        with self._hang_watchdog.watching(login.session):
            self.tell(login.placement, line)
        session = login.session
        self._record(records.limit_met(time.time(), session.id, session.subject.user, place.persona, reason))
        self._deny(session, "limit", "", "", Denied(reason, persona=persona.name, help=line))

    def refused(self, refusal: Refusal) -> None:
        """Records a connection that the rules refuse; told to its user's terminal where it is clear which that is."""
        theirs = [login.session for login in self._registry.of_user(refusal.uid)] if refusal.uid is not None else []
        logins = [session for session in theirs if session.service != _MANAGER]
        session = logins[0] if len(logins) == 1 else None
        if session is not None and (placement := self._registry.placement(session.id)) is not None:
            with self._hang_watchdog.watching(session):
                self.tell(placement, refusal_line(refusal.persona, refusal.target))
        if theirs:
            denied = Denied(Reason.NETWORK_REFUSED, persona=refusal.persona, help=_NETWORK_HELP)
            where, uid = session.id if session is not None else "", theirs[0].uid
            self._denials.note(uid, time.time(), "network", "", refusal.target, denied, where)
        self._record(
            records.connection_refused(
                time.time(),
                session.id if session is not None else "",
                theirs[0].subject.user if theirs else "",
                refusal.persona,
                refusal.target,
            )
        )

    def note(self, placement: Placement, persona: Persona, event: str, running: Running) -> None:
        """Records one process that was frozen or asked to end."""
        login = self._registry.get(placement.session_id)
        place = next((place for place in placement.places.values() if place.persona.name == persona.name), None)
        if login is not None:
            shown = self._masks.argv(running.path, running.stages[-1][1][:16], 256)
            session, ref = login.session, place.persona if place is not None else None
            self._record(
                records.process_withdrawn(
                    at=time.time(),
                    session_id=session.id,
                    user=session.subject.user,
                    event=event,
                    persona=ref,
                    program=running.path,
                    argv=shown,
                )
            )
            help = f"persona {persona.name} does not apply any more; 'persona list' shows what does"
            denied = Denied(Reason.PERSONA_WITHDRAWN, persona=persona.name, help=help)
            self._deny(session, event, running.path, words(shown, COMMAND_MAX), denied)

    def _deny(self, session: Session, event: str, program: str, command: str, denied: Denied) -> None:
        self._denials.note(session.uid, time.time(), event, program, command, denied, session.id)
