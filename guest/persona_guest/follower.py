"""Running processes follow: asks the broker what applies to running sessions, after each event, for all at once."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

from persona.decisions import Denied, PersonaRef
from persona.patterns import Whitelist, parse_pattern
from persona_guest.core.following import Held
from persona_guest.enforcer import Enforcer
from persona_guest.gate.supervisor import Supervisor
from persona_guest.loop import Loop
from persona_guest.personas import Personas
from persona_guest.questions import Questions
from persona_guest.sorter import Sorter

log = logging.getLogger("persona.enforce")

_SESSIONS_A_CALL = 500
_AGAIN_S = 1.0

Rebase = Callable[[str, PersonaRef | None, str | None], None]


class Follower:
    """``rebase`` is told what a session is under from now on; ``sorter`` brings its processes there."""

    def __init__(
        self,
        loop: Loop,
        enforcer: Enforcer,
        supervisor: Supervisor,
        questions: Questions,
        personas: Personas,
        sorter: Sorter,
        rebase: Rebase,
    ) -> None:
        self._loop = loop
        self._enforcer = enforcer
        self._supervisor = supervisor
        self._questions = questions
        self._personas = personas
        self._sorter = sorter
        self._rebase = rebase
        self._asking = 0
        self._waiting = False
        self._again = False
        self._due: dict[str, tuple[tuple[Held, ...], bool]] = {}  # by session, the longest due first
        self._coming = False  # the turn of the first of them

    def changed(self) -> None:
        """Something did; a question that is under way is asked again after its answer."""
        if self._asking:
            self._again = True
            return
        sessions = list(self._supervisor.sessions)  # one that has started nothing yet has sshd's forwards
        for start in range(0, len(sessions), _SESSIONS_A_CALL):
            self._asking += 1
            self._questions.current(sessions[start : start + _SESSIONS_A_CALL], self._answered)

    def _later(self) -> None:
        """Once more in a moment, however many ask for it."""
        if not self._waiting:
            self._waiting = True
            self._loop.call_later(_AGAIN_S, self._now)

    def _now(self) -> None:
        self._waiting = False
        self.changed()

    def began(self, session: str) -> None:
        """A session that has just begun: what may apply to it next is fetched before it does."""
        self._asking += 1
        self._questions.current([session], self._answered)

    def _answered(self, answer: Any | Denied) -> None:
        self._asking -= 1
        if isinstance(answer, Denied):
            log.warning("what applies to running sessions is not known: %s", answer.help)
            self._later()
        else:
            for session, holding, others, revoked in _read(answer):
                for ref in others:
                    self._personas.ensure(ref, lambda _denied: None)
                self._prepare(session, holding, revoked)
        if self._again and not self._asking:
            self._again = False
            self.changed()

    def _prepare(self, session: str, holding: tuple[Held, ...], revoked: bool) -> None:
        """The documents first, then, in a round of the loop of its own, what changes."""
        home = self._enforcer.homes.get(session)
        if home is not None and home.holding == holding and not revoked:
            self._due.pop(session, None)
            return
        needed = {held.ref for held in holding}
        missing = len(needed)

        def here(denied: Denied | None) -> None:
            nonlocal missing
            missing -= 1
            if denied is not None:
                log.error("session %s does not follow yet: %s", session, denied.help)
                self._later()
                missing = -1
            elif missing == 0:
                self._enqueue(session, holding, revoked)

        if not needed:
            self._enqueue(session, holding, revoked)
        for ref in needed:
            self._personas.ensure(ref, here)

    def _enqueue(self, session: str, holding: tuple[Held, ...], revoked: bool) -> None:
        """What was said of it before is void, and its turn stays: one that is tried again and again is not first."""
        self._due[session] = holding, revoked
        self._soon()

    def _soon(self) -> None:
        """One session a round: it may take a moment, and between two of them execs are answered."""
        if self._due and not self._coming:
            self._coming = True
            self._loop.call_later(0, self._next)

    def _next(self) -> None:
        self._coming = False
        if self._due:
            session = next(iter(self._due))
            self._follow(session, *self._due.pop(session))
        self._soon()

    def _follow(self, session: str, holding: tuple[Held, ...], revoked: bool) -> None:
        home, gated = self._enforcer.homes.get(session), self._supervisor.sessions.get(session)
        first = holding[0] if holding else None
        self._rebase(session, first.ref if first else None, first.policy if first else None)
        if home is None or gated is None or self._supervisor.released:
            return  # nothing has started in it yet
        if not self._sorter.follow(home, gated, holding, revoked):
            self._later()


def _read(answer: Any) -> Iterator[tuple[str, tuple[Held, ...], tuple[PersonaRef, ...], bool]]:
    """Session, what holds, what else may, whether it was revoked; an answer that is none is nothing."""
    try:
        for session, value in answer["sessions"].items():
            holding = tuple(
                Held(_ref(item), str(item["policy"]), Whitelist(tuple(map(parse_pattern, item["commands"]))))
                for item in value["personas"]
            )
            yield str(session), holding, tuple(map(_ref, value["others"])), value["revoked"] is True
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        log.error("what the broker says of running sessions cannot be read: %r", error)


def _ref(item: Any) -> PersonaRef:
    return PersonaRef(str(item["name"]), int(item["version"]))
