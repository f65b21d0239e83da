"""Asks the broker after each event what applies to running sessions now, and has their processes follow."""

import logging
from functools import partial
from itertools import takewhile

from persona.decisions import Denied, PersonaRef
from persona.problems import Reason
from persona_guest.broker.client import BrokerClient
from persona_guest.broker.current import Current
from persona_guest.broker.documents import Personas
from persona_guest.core.reassignment import Applicable, Revocation, named
from persona_guest.enforce.network.user_rules import NoUserRules, UserRules
from persona_guest.loop import Loop
from persona_guest.reassign.migrate import Migrator
from persona_guest.session.model import Admitted, Login, State
from persona_guest.session.registry import Registry

log = logging.getLogger("persona.enforce")

_AGAIN_S = 1.0


class Reevaluator:
    """``user_rules`` are told of a session's new default persona; ``migrator`` moves its processes."""

    def __init__(
        self,
        loop: Loop,
        registry: Registry,
        broker_client: BrokerClient,
        personas: Personas,
        migrator: Migrator,
        user_rules: UserRules | NoUserRules,
    ) -> None:
        self._loop = loop
        self._registry = registry
        self._broker_client = broker_client
        self._personas = personas
        self._migrator = migrator
        self._user_rules = user_rules
        self._released = False
        self._asking = 0
        self._waiting = False
        self._again = False
        self._due: dict[str, tuple[tuple[Applicable, ...], Revocation]] = {}  # by session, the longest due first
        self._coming = False  # the turn of the first of them

    def changed(self) -> None:
        """Asks the broker what applies to each session now; if such a question is under way, again after its answer."""
        if self._asking:
            self._again = True
            return
        sessions = [
            login.session.id for login in self._registry.gated()
        ]  # one that has started nothing yet has sshd's forwards
        for part in self._broker_client.batches(sessions):
            self._asking += 1
            self._broker_client.current(part, self._answered)

    def _later(self) -> None:
        """Once more in a moment, however many ask for it."""
        if not self._waiting:
            self._waiting = True
            self._loop.call_later(_AGAIN_S, self._now)

    def _now(self) -> None:
        self._waiting = False
        self.changed()

    def began(self, session_id: str) -> None:
        """Asks for a session that has just begun, so that documents of what may apply next are here before it does."""
        self._asking += 1
        self._broker_client.current([session_id], self._answered)

    def _answered(self, answer: tuple[Current, ...] | Denied) -> None:
        self._asking -= 1
        if isinstance(answer, Denied):
            log.warning("what applies to running sessions is not known: %s", answer.help)
            self._later()
        else:
            for current in answer:
                for ref in current.others:
                    self._personas.ensure(ref, lambda _denied: None)
                self._prepare(current.session_id, current.holding, current.revocation)
        if self._again and not self._asking:
            self._again = False
            self.changed()

    def _prepare(self, session_id: str, holding: tuple[Applicable, ...], revocation: Revocation) -> None:
        """The documents first, then, in a round of the loop of its own, what changes."""
        placement = self._registry.placement(session_id)
        if placement is not None and placement.holding == holding and revocation is Revocation.NONE:
            self._due.pop(session_id, None)
            return
        needed = {held.ref for held in holding}
        missing = len(needed)

        def here(ref: PersonaRef, denied: Denied | None) -> None:
            nonlocal missing
            if missing < 0:
                return  # decided by the first that failed
            if denied is None:
                missing -= 1
                if missing == 0:
                    self._enqueue(session_id, holding, revocation)
                return
            missing = -1
            if denied.reason is Reason.PERSONA_UNAVAILABLE:  # this agent cannot read it: it will not come
                log.error(
                    "session %s: this agent cannot read persona %s, so it and the policies after it do not apply: %s",
                    session_id,
                    ref.name,
                    denied.help,
                )
                self._prepare(session_id, tuple(takewhile(lambda held: held.ref != ref, holding)), revocation)
            else:
                log.error("session %s does not follow yet: %s", session_id, denied.help)
                self._later()

        if not needed:
            self._enqueue(session_id, holding, revocation)
        for ref in needed:
            self._personas.ensure(ref, partial(here, ref))

    def _enqueue(self, session_id: str, holding: tuple[Applicable, ...], revocation: Revocation) -> None:
        """What was said of it before is void, and its turn stays: one that is tried again and again is not first."""
        self._due[session_id] = holding, revocation
        self._soon()

    def _soon(self) -> None:
        """One session a round: it may take a moment, and between two of them execs are answered."""
        if self._due and not self._coming:
            self._coming = True
            self._loop.call_later(0, self._next)

    def _next(self) -> None:
        self._coming = False
        if self._due:
            session_id = next(iter(self._due))
            self._follow(session_id, *self._due.pop(session_id))
        self._soon()

    def _follow(self, session_id: str, holding: tuple[Applicable, ...], revocation: Revocation) -> None:
        login = self._registry.get(session_id)
        if login is None:
            return
        first = holding[0] if holding else None
        self._set_default(login, Admitted(first.ref, first.policy) if first else Admitted(None, None))
        if login.placement is None or self._released:
            return  # nothing has started in it yet
        if not self._migrator.follow(login.placement, login, holding, revocation):
            self._later()

    def _set_default(self, login: Login, admitted: Admitted) -> None:
        """Gives the session its default persona, and the policy that hands it out; ``None`` in it = none applies."""
        before, login.admitted = login.admitted, admitted
        session, persona = login.session, admitted.persona
        if before is not None and before.persona != persona:
            log.info(
                "session %s: %s (policy %s) applies now, before %s",
                session.id, named(persona), admitted.policy or "-", named(before.persona),
            )  # fmt: skip
        self._user_rules.default_changed(session.id, persona)
        if before != admitted and login.state is State.GATED:
            self._registry.try_to_save(login)

    def release(self) -> None:
        """Moves no process any more."""
        self._released = True
