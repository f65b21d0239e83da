"""Running processes of one session go where they belong now, and what no persona allows is frozen or ends.

What a session's persona allows moves under it; with the rest happens what the old one's ``on_revoke``
says.
"""

import contextlib
import errno
import logging
import time
from collections.abc import Iterable, Iterator, Sequence

from persona.decisions import PersonaRef
from persona.documents import Persona
from persona.problems import PersonaError
from persona_guest.core.following import NOBODY, Held, choose
from persona_guest.core.places import MANAGED, Place, manager_of
from persona_guest.ending import NAMED_MAX, Ending, Noted, Told, names_of, started
from persona_guest.enforce.home import Home
from persona_guest.enforcer import Enforcer
from persona_guest.gate.guard import Guard
from persona_guest.gate.identity import Identifier, Image
from persona_guest.gate.pending import Gated
from persona_guest.gate.running import Running, look
from persona_guest.loop import Loop
from persona_guest.settings import Settings

log = logging.getLogger("persona.enforce")

_PASSES = 8  # what is moved may have children meanwhile
_RUNNING = 3  # of the passes, so many before what is looked at is stopped for it
_STOPPED_S = 0.25  # of a session; that takes a millisecond, but what waits for the gate's own answer cannot be stopped
_CGROUPS_MAX = 2048  # of a service manager, which has a hundred, and so many processes
_PIDS_MAX = 65536

Shells = tuple[Image, ...]
Pairs = Sequence[tuple[Held, Persona]]


class Sorter:
    """``tell`` tells a session's user, ``note`` records what becomes of one process."""

    def __init__(
        self,
        settings: Settings,
        loop: Loop,
        enforcer: Enforcer,
        identifier: Identifier,
        guard: Guard,
        tell: Told,
        note: Noted,
    ) -> None:
        self._settings = settings
        self._enforcer = enforcer
        self._identifier = identifier
        self._guard = guard
        self._tell = tell
        self._note = note
        self._ending = Ending(loop, enforcer, tell, note)
        self._patience_s = 0.0  # what is left of _STOPPED_S: the loop and the guard wait for all places together

    def follow(self, home: Home, gated: Gated, holding: tuple[Held, ...], revoked: bool) -> bool:
        """Brings all that runs in a session to where it belongs; false where it could not be done yet."""
        home.base = holding[0].ref if holding else NOBODY
        self._patience_s = _STOPPED_S
        home.holding = None  # until all of it is done: from the middle, the way back is one to follow too
        outer = self._guard.enter(gated.session)  # what its processes call themselves is in their own memory
        try:
            pairs = [(held, self._enforcer.document(held.ref)) for held in holding]
            shells = () if revoked else gated.shells
            sorted_ = [self._sort(home, key, pairs, shells) for key in list(home.places) if key != MANAGED]
            whole = all(sorted_)
            if not home.places and manager_of(home.found, home.uid) is not None:
                self._enforcer.enter(home, home.base, home.found)
            if MANAGED in home.places:
                self._manage(home, pairs, shells)
            if whole:
                home.holding = holding
        except (PersonaError, OSError) as error:
            log.error("session %s does not follow: %s", home.session, error)
            return False
        except Exception:  # whatever a user's processes are: the agent answers the others, and tries all of this again
            log.exception("session %s does not follow", home.session)
            return False
        finally:
            self._guard.leave(outer)
        return whole

    def _sort(self, home: Home, key: str, pairs: Pairs, shells: Shells) -> bool:
        """Every process of a place goes to where it would be started now, or stays, or is withdrawn.

        What forks and ends faster than it can be looked at is frozen for it.  False where something is left even so.
        """
        place = here = home.places[key]
        tree = self._enforcer.tree
        old = self._enforcer.document(place.persona)
        done: set[int] = set()  # what needs no further look: what was born of it is listed by itself
        withdrawn: dict[int, Running] = {}
        stays = returns = whole = False
        frozen = place.withdrawn and old.on_revoke == "freeze" and tree.freezes(place.cgroup)
        try:
            for number in range(_PASSES):
                here = home.places[key]  # elsewhere, once a version has been entered whose limits are counted otherwise
                listed = [pid for pid in tree.processes(here.cgroup) if pid not in done]
                if not listed:
                    whole = True
                    break
                if number == _RUNNING:
                    self._stop(here.cgroup)
                    continue
                found = dict(self._look(listed))
                done.update(pid for pid in listed if pid not in found)
                for pid, running in found.items():
                    ref = self._target(running, home, old, pairs, shells)
                    if ref is None:
                        target = self._enforcer.enter(home, place.persona, withdrawn=True)
                        if not withdrawn and not tree.populated(target.cgroup):
                            self._ending.void(target.cgroup)
                        withdrawn[pid] = running
                    else:
                        target = self._enforcer.enter(home, ref)
                    if target.cgroup == here.cgroup:
                        done.add(pid)
                        stays = True
                    else:
                        with contextlib.suppress(ProcessLookupError):
                            tree.move(target.cgroup, pid)
                        returns |= place.withdrawn
        finally:  # the next try finds what was moved where it is withdrawn already
            try:
                if not frozen:  # nor by an agent that ended before it could thaw it
                    tree.thaw(here.cgroup)
            finally:
                if withdrawn:
                    self._withdraw(home, place, old, withdrawn)
        if not stays and not tree.populated(home.places[key].cgroup):
            self._enforcer.leave(home, key)
        if returns and old.on_revoke == "freeze":
            self._tell(home, f"persona: {old.name} applies again; what was frozen goes on")
        return whole

    def _stop(self, cgroup: str) -> None:
        began = time.monotonic()
        self._enforcer.tree.freeze(cgroup, self._patience_s)
        self._patience_s = max(0.0, self._patience_s - (time.monotonic() - began))

    @staticmethod
    def _target(running: Running, home: Home, old: Persona, pairs: Pairs, shells: Shells) -> PersonaRef | None:
        ref = choose(running.trusted, pairs)
        if ref is None and (running.image in shells or (old.on_revoke == "finish" and home.base != NOBODY)):
            return home.base  # the login shell is admission's, until the session itself is revoked
        return ref

    def _withdraw(self, home: Home, place: Place, old: Persona, rest: dict[int, Running]) -> None:
        """``place`` is where it was: perhaps withdrawn already, by an agent that ended before it ended this."""
        cgroup = self._enforcer.enter(home, place.persona, withdrawn=True).cgroup
        if old.on_revoke == "kill":
            if not place.withdrawn or not self._ending.under_way(cgroup):
                self._ending.all_of(home, old, cgroup, rest)
        elif old.on_revoke == "freeze":
            if place.withdrawn and self._enforcer.tree.freezes(cgroup):
                return
            self._enforcer.tree.freeze(cgroup)
            self._tell(home, f"persona: {old.name} no longer applies: {names_of(rest)} frozen until it does again")
            for running in list(rest.values())[:NAMED_MAX]:
                self._note(home, old, "frozen", running)

    def _manage(self, home: Home, pairs: Pairs, shells: Shells) -> None:
        """The service manager keeps its place under whatever is the base now.

        Its parts cannot be frozen one by one (its user could thaw them): ``freeze`` lets them finish.
        """
        place = home.places[MANAGED]
        if place.persona == home.base:
            return
        old = self._enforcer.document(place.persona)
        self._ending.returned(place.cgroup, home.base.name)
        rest: dict[int, Running] = {}
        whole = True
        if old.on_revoke == "kill":  # looked at before the base is another: what fails here is tried again
            pids, whole = self._below(place.cgroup)
            rest = {
                pid: running
                for pid, running in self._look(pids)
                if self._target(running, home, old, pairs, shells) is None and not running.plumbing(self._settings)
            }
        began = dict(started(rest))
        try:
            self._enforcer.enter(home, home.base, place.cgroup)
        finally:  # a base that cannot be kept on disk is the base all the same
            if home.places[MANAGED].persona == home.base:
                if not whole:
                    self._ending.all_of(home, old, place.cgroup, rest)
                elif rest:
                    self._ending.each(home, old, place.cgroup, rest, began)

    def _below(self, cgroup: str) -> tuple[list[int], bool]:
        """The processes of a service manager, and whether these are all: its user makes as many cgroups as he likes."""
        tree, waiting = self._enforcer.tree, [cgroup]
        found: list[int] = []
        whole = True
        for _ in range(_CGROUPS_MAX):
            if not waiting or len(found) >= _PIDS_MAX:
                break
            here = waiting.pop()
            try:
                found += tree.processes(here)
                waiting += [f"{here}/{name}" for name in tree.children(here)]
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:  # and as deep as no path leads
                    raise
                whole = False
        return found, whole and not waiting

    # --- processes --------------------------------------------------------------------------------

    def _look(self, pids: Iterable[int]) -> Iterator[tuple[int, Running]]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                yield pid, look(pid, self._identifier)
