"""Running processes follow: when what applies to a session changes, so do the limits of what runs in it.

Asked of the broker after each event, for all sessions at once.  What the new persona allows moves under
it; with the rest happens what the old one's ``on_revoke`` says.
"""

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from persona.decisions import Denied, PersonaRef
from persona.documents import Persona
from persona.patterns import Whitelist, parse_pattern
from persona.problems import PersonaError
from persona_guest.core.following import NOBODY, Held, choose
from persona_guest.core.places import MANAGED, manager_of
from persona_guest.enforce.home import Home
from persona_guest.enforcer import Enforcer
from persona_guest.gate.guard import Guard
from persona_guest.gate.identity import Identifier, Image
from persona_guest.gate.running import Running, look
from persona_guest.gate.supervisor import Supervisor
from persona_guest.loop import Loop
from persona_guest.personas import Personas
from persona_guest.questions import Questions

log = logging.getLogger("persona.enforce")

GRACE_S = 5.0  # between the message and SIGTERM, and the end
_SESSIONS_A_CALL = 500
_AGAIN_S = 1.0
_PASSES = 8  # what is moved may have children meanwhile
_NAMED_MAX = 64  # of what is frozen or killed at once, so many are recorded one by one

Shells = tuple[Image, ...]
Pairs = Sequence[tuple[Held, Persona]]
Rebase = Callable[[str, PersonaRef | None, str | None], None]
Told = Callable[[Home, str], None]
Noted = Callable[[Home, Persona, str, Running], None]


class Follower:
    """``rebase`` is told what a session is under from now on, ``tell`` tells its user, ``note`` records."""

    def __init__(
        self,
        loop: Loop,
        enforcer: Enforcer,
        supervisor: Supervisor,
        questions: Questions,
        personas: Personas,
        identifier: Identifier,
        guard: Guard,
        rebase: Rebase,
        tell: Told,
        note: Noted,
    ) -> None:
        self._loop = loop
        self._enforcer = enforcer
        self._supervisor = supervisor
        self._questions = questions
        self._personas = personas
        self._identifier = identifier
        self._guard = guard
        self._rebase = rebase
        self._tell = tell
        self._note = note
        self._asking = 0
        self._again = False

    # --- what applies now -------------------------------------------------------------------------

    def changed(self) -> None:
        """Something did; a question that is under way is asked again after its answer."""
        if self._asking:
            self._again = True
            return
        sessions = list(self._enforcer.homes)
        for start in range(0, len(sessions), _SESSIONS_A_CALL):
            self._asking += 1
            self._questions.current(sessions[start : start + _SESSIONS_A_CALL], self._answered)

    def began(self, session: str) -> None:
        """A session that has just begun: what may apply to it next is fetched before it does."""
        self._asking += 1
        self._questions.current([session], self._answered)

    def _answered(self, answer: Any | Denied) -> None:
        self._asking -= 1
        if isinstance(answer, Denied):
            log.warning("what applies to running sessions is not known: %s", answer.help)
            self._loop.call_later(_AGAIN_S, self.changed)
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
            return
        needed = {held.ref for held in holding}
        missing = len(needed)

        def here(denied: Denied | None) -> None:
            nonlocal missing
            missing -= 1
            if denied is not None:
                log.error("session %s does not follow yet: %s", session, denied.help)
                self._loop.call_later(_AGAIN_S, self.changed)
                missing = -1
            elif missing == 0:
                self._loop.deliver(lambda: self._follow(session, holding, revoked))

        if not needed:
            self._follow(session, holding, revoked)
        for ref in needed:
            self._personas.ensure(ref, here)

    # --- one session ------------------------------------------------------------------------------

    def _follow(self, session: str, holding: tuple[Held, ...], revoked: bool) -> None:
        home, gated = self._enforcer.homes.get(session), self._supervisor.sessions.get(session)
        first = holding[0] if holding else None
        self._rebase(session, first.ref if first else None, first.policy if first else None)
        if home is None or gated is None or self._supervisor.released:
            return  # nothing has started in it yet
        home.base = first.ref if first else NOBODY
        self._guard.enter(gated.session)  # what its processes call themselves is in their own memory
        try:
            pairs = [(held, self._enforcer.document(held.ref)) for held in holding]
            shells = () if revoked else gated.shells
            for key in [key for key in home.places if key != MANAGED]:
                self._sort(home, key, pairs, shells)
            if not home.places and manager_of(home.found, home.uid) is not None:
                self._enforcer.enter(home, home.base, home.found)
            if MANAGED in home.places:
                self._manage(home, pairs, shells)
            home.holding = holding
        except (PersonaError, OSError) as error:
            log.error("session %s does not follow: %s", session, error)
            self._loop.call_later(_AGAIN_S, self.changed)
        finally:
            self._guard.leave()

    def _sort(self, home: Home, key: str, pairs: Pairs, shells: Shells) -> None:
        """Every process of a place goes to where it would be started now, or stays, or is withdrawn."""
        place = home.places[key]
        old = self._enforcer.document(place.persona)
        done: dict[int, Running] = {}  # by pid: what needs no further look
        withdrawn: dict[int, Running] = {}
        stays = returns = False
        for _ in range(_PASSES):
            found = list(self._look(pid for pid in self._enforcer.tree.processes(place.cgroup) if pid not in done))
            if not found:
                break
            for pid, running in found:
                ref = self._target(running, home, old, pairs, shells)
                if ref is None:
                    target = self._enforcer.enter(home, place.persona, withdrawn=True)
                    if not place.withdrawn:
                        withdrawn[pid] = running
                else:
                    target = self._enforcer.enter(home, ref)
                if target.cgroup == place.cgroup:
                    done[pid] = running
                    stays = True
                else:
                    with contextlib.suppress(ProcessLookupError):
                        self._enforcer.tree.move(target.cgroup, pid)
                    returns |= place.withdrawn
        if not stays and not self._enforcer.tree.populated(place.cgroup):
            self._enforcer.leave(home, key)
        if returns and old.on_revoke == "freeze":
            self._tell(home, f"persona: {old.name} applies again; what was frozen goes on")
        if withdrawn:
            self._withdraw(home, place.persona, old, withdrawn)

    @staticmethod
    def _target(running: Running, home: Home, old: Persona, pairs: Pairs, shells: Shells) -> PersonaRef | None:
        ref = choose(running.trusted, pairs)
        if ref is None and (running.image in shells or (old.on_revoke == "finish" and home.base != NOBODY)):
            return home.base  # the login shell is admission's, until the session itself is revoked
        return ref

    def _withdraw(self, home: Home, ref: PersonaRef, old: Persona, rest: dict[int, Running]) -> None:
        cgroup = self._enforcer.enter(home, ref, withdrawn=True).cgroup
        if old.on_revoke == "kill":
            self._end(home, old, cgroup, rest)
        elif old.on_revoke == "freeze":
            self._enforcer.tree.write(cgroup, "cgroup.freeze", "1")
            self._tell(home, f"persona: {old.name} no longer applies: {_names(rest)} frozen until it does again")
            for running in list(rest.values())[:_NAMED_MAX]:
                self._note(home, old, "frozen", running)

    def _manage(self, home: Home, pairs: Pairs, shells: Shells) -> None:
        """The service manager keeps its place under whatever is the base now.

        Its parts cannot be frozen one by one (its user could thaw them): ``freeze`` lets them finish.
        """
        place = home.places[MANAGED]
        if place.persona == home.base:
            return
        old = self._enforcer.document(place.persona)
        self._enforcer.enter(home, home.base, place.cgroup)
        if old.on_revoke == "kill":
            rest = {
                pid: running
                for pid, running in self._look(self._below(place.cgroup))
                if self._target(running, home, old, pairs, shells) is None
                and not running.plumbing(self._supervisor.settings)
            }
            if rest:
                self._end(home, old, None, rest)

    def _below(self, cgroup: str) -> list[int]:
        tree, waiting = self._enforcer.tree, [cgroup]
        found: list[int] = []
        while waiting and len(found) < 65536:
            here = waiting.pop()
            found += tree.processes(here)
            waiting += [f"{here}/{name}" for name in tree.children(here)]
        return found

    # --- processes --------------------------------------------------------------------------------

    def _look(self, pids: Iterable[int]) -> Iterator[tuple[int, Running]]:
        for pid in pids:
            with contextlib.suppress(OSError):  # it ended meanwhile
                yield pid, look(pid, self._identifier)

    def _end(self, home: Home, old: Persona, cgroup: str | None, rest: dict[int, Running]) -> None:
        """Asks them to end, and after the grace ends them: all of a cgroup, or one by one."""
        self._tell(home, f"persona: {old.name} no longer applies: {_names(rest)} ends in {GRACE_S:.0f} s")
        held: list[int] = []
        for pid, running in rest.items():
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(pid)
                held.append(pidfd)
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            if len(held) <= _NAMED_MAX:
                self._note(home, old, "killed", running)

        def over() -> None:
            for pidfd in held:
                if cgroup is None:
                    with contextlib.suppress(OSError):
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
            if cgroup is not None:
                with contextlib.suppress(FileNotFoundError):  # all that was there has come back, or ended
                    self._enforcer.tree.write(cgroup, "cgroup.kill", "1")
                self._loop.call_later(0.5, lambda: self._gone(home, cgroup))

        self._loop.call_later(GRACE_S, over)

    def _gone(self, home: Home, cgroup: str) -> None:
        for key, place in list(home.places.items()):
            if place.cgroup == cgroup and not self._enforcer.tree.populated(cgroup):
                self._enforcer.leave(home, key)


def _names(rest: dict[int, Running]) -> str:
    names = sorted({running.name for running in rest.values()})
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


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
