"""Puts each command where its persona binds it, and keeps what is bound as it should be.

A session that ever used one persona costs nothing here: its processes are there, and their children are
born there.  Everything runs in the loop's thread.
"""

import contextlib
import errno
import functools
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from persona.decisions import Denied, Granted, PersonaRef
from persona.documents import Persona
from persona.problems import PersonaError, Reason
from persona_guest.core.following import NOBODY, NOBODYS, bereft
from persona_guest.core.places import MANAGED, Place, manager_of, place_of, scope_of
from persona_guest.core.sessions import Session
from persona_guest.enforce import plan as plans
from persona_guest.enforce.home import Home, load
from persona_guest.enforce.interface import Facility
from persona_guest.enforce.plan import Plan
from persona_guest.gate.identity import Image
from persona_guest.gate.pending import Gated, Pending
from persona_guest.kernel import seccomp
from persona_guest.kernel.cgroup import Hierarchy, cgroup_of
from persona_guest.kernel.task import Task
from persona_guest.loop import Loop
from persona_guest.personas import Personas

log = logging.getLogger("persona.enforce")

_LEAVE_S = (0.2, 1.0, 5.0)  # the last process of a session may not be quite gone when its listener is

Watch = Callable[[Place], None]


class Enforcer:
    """``base`` tells the persona that a session was admitted with; ``watch`` is told of each place that is entered."""

    def __init__(
        self,
        loop: Loop,
        tree: Hierarchy,
        facilities: Iterable[Facility],
        personas: Personas,
        directory: Path,
        base: Callable[[str], PersonaRef | None],
        watch: Watch,
    ) -> None:
        self.tree = tree
        self.homes: dict[str, Home] = {}
        self._loop = loop
        self._facilities = tuple(facilities)
        self._personas = personas
        self._directory = directory
        self._base = base
        self._watch = watch
        self._fetching: set[PersonaRef] = set()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    # --- one exec ---------------------------------------------------------------------------------

    def place(self, pending: Pending, granted: Granted | None) -> None:
        """Brings a task that waits for its exec to where it belongs.

        Raises ``PersonaError`` (or ``OSError`` where the task is gone): then it must not start.
        """
        gated = pending.gated
        home = gated.home
        before = pending.before()
        if home is None:
            home = gated.home = self._settle(gated.session, pending.task, before)
        elif before != home.opener and (granted is None or granted.persona == home.only or home.managed):
            return
        try:
            self._put(home, pending, granted)
        except ProcessLookupError:
            raise
        except OSError as error:
            raise PersonaError(Reason.ENFORCEMENT_FAILED, f"its cgroup: {error}") from error

    def cgroups_of(self, uid: int) -> list[str]:
        """The directories of his places, but for what is his service manager's.  Safe to call from any thread."""
        homes = [home for home in list(self.homes.values()) if home.uid == uid]
        places = [place for home in homes for place in list(home.places.values())]
        return [self.tree.path(place.cgroup) for place in places if not place.managed]

    def _settle(self, session: Session, task: Task, before: Image) -> Home:
        home = self.homes.get(session.id)
        if home is None:
            base = self._base(session.id) or NOBODY
            home = self.homes[session.id] = Home(session.id, session.uid, cgroup_of(task.tid), before, base)
        return home

    def _put(self, home: Home, pending: Pending, granted: Granted | None) -> None:
        task = pending.task
        if not home.places and _is_services(home, task):
            return  # before the session is its user's: the same program may be one that he may start
        current = cgroup_of(task.tid)
        if manager_of(current, home.uid) is not None:
            if MANAGED not in home.places:
                self.enter(home, home.base, current)
            return
        if granted is None and _is_services(home, task):
            return
        if not seccomp.still_valid(pending.gated.listener, pending.ident):
            raise ProcessLookupError(errno.ESRCH, "what was looked at may be another's task")
        ref = home.base if granted is None else granted.persona
        place = home.places.get(ref.name)
        if place is None or place.persona.version < ref.version:
            place = self.enter(home, ref, current)
        if current != place.cgroup:
            self.tree.move(place.cgroup, task.tid)

    # --- places -----------------------------------------------------------------------------------

    def enter(self, home: Home, ref: PersonaRef, current: str = "", *, withdrawn: bool = False) -> Place:
        """The place of a persona in a session, made, or brought to this version.  Raises ``PersonaError``."""
        found = current if scope_of(current, home.uid) or manager_of(current, home.uid) else home.found
        if scope_of(found, home.uid):
            home.found = found
        persona = self.document(ref)
        shared = persona.resource_limits.per == "persona"
        place = place_of(home.session, home.uid, ref, found, shared=shared, withdrawn=withdrawn)
        known = home.places.get(place.key)
        if known == place:
            return place
        plans.apply(self._entering(place, bereft(persona) if withdrawn else persona))
        home.add(place)
        if known is not None and known.cgroup != place.cgroup:
            self.tree.empty(known.cgroup, place.cgroup)
            self._leave(known)
        self._watch(place)
        self._save(home)
        return place

    def leave(self, home: Home, key: str) -> None:
        """Nothing lives there any more."""
        self._leave(home.places[key])
        home.drop(key)
        self._save(home)

    def document(self, ref: PersonaRef) -> Persona:
        """Raises ``PersonaError`` where it is not here."""
        return NOBODYS if ref == NOBODY else self._personas.get(ref)

    def _entering(self, place: Place, persona: Persona) -> Plan:
        return tuple(step for facility in self._facilities for step in facility.enter(place, persona))

    def _leave(self, place: Place) -> bool:
        """Whether every facility could; what could not says so in the journal."""
        left = True
        for facility in reversed(self._facilities):
            try:
                plans.apply(facility.leave(place))
            except (PersonaError, OSError) as error:
                log.warning("%s: %s cannot be left yet: %s", facility.name, place.cgroup, error)
                left = False
        return left

    def _save(self, home: Home) -> None:
        try:
            home.save(self._directory)
        except OSError as error:
            raise PersonaError(Reason.ENFORCEMENT_FAILED, f"where it lives cannot be kept: {error}") from error

    # --- sessions ---------------------------------------------------------------------------------

    def ended(self, session: Session) -> None:
        """The last process of a session is gone."""
        home = self.homes.pop(session.id, None)
        if home is not None:
            self._clear(home, 0)

    def _clear(self, home: Home, attempt: int) -> None:
        def again() -> None:
            left = [self._leave(place) for place in home.places.values()]
            if all(left):
                (self._directory / f"{home.session}.json").unlink(missing_ok=True)
            elif attempt + 1 < len(_LEAVE_S):
                self._clear(home, attempt + 1)

        self._loop.call_later(_LEAVE_S[attempt], again)

    def restore(self, sessions: dict[str, Gated]) -> None:
        """Takes up what the agent before this one kept, then makes everything so."""
        for path in self._directory.glob("*.json"):
            gated = sessions.get(path.stem)
            try:
                home = load(path)
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.error("%s: %s; its session is placed anew", path, error)
                path.unlink(missing_ok=True)
                continue
            if gated is None:
                path.unlink(missing_ok=True)
            else:
                gated.home = self.homes[home.session] = home
        for ident, gated in sessions.items():  # from an agent that had no places: a service manager starts little anew
            with contextlib.suppress(OSError):
                found = cgroup_of(gated.session.monitor)
                if gated.home is None and manager_of(found, gated.session.uid) is not None:
                    gated.home = self.homes[ident] = Home(ident, gated.session.uid, found, Image(0, 0))
        for home in self.homes.values():
            for place in home.places.values():
                self._watch(place)
                if not place.withdrawn and not place.managed:
                    self._thaw(place)
        self.reconcile()

    def _thaw(self, place: Place) -> None:
        """An agent that ended while it looked through a place may have left it stopped."""
        try:
            self.tree.thaw(place.cgroup)
        except OSError as error:
            log.error("%s is not thawed: %s", place.cgroup, error)

    def wanted(self) -> dict[Place, Persona]:
        """Every place in use, and what it is under.  Raises ``PersonaError`` where a document is not here."""
        found = {}
        for home in self.homes.values():
            for place in home.places.values():
                persona = self.document(place.persona)
                found[place] = bereft(persona) if place.withdrawn else persona
        return found

    def plan(self) -> list[tuple[str, Plan]]:
        """What would be changed now, by facility.  Raises ``PersonaError``."""
        wanted = self.wanted()
        return [(facility.name, facility.reconcile(wanted)) for facility in self._facilities]

    def reconcile(self) -> None:
        """Makes what is found what should be; what cannot be is in the journal, and denied when it matters."""
        try:
            wanted = self.wanted()
        except PersonaError as error:  # what is there stays as it is, rather than go for want of a document
            log.error("nothing is looked after: %s", error.message)
            self._fetch_missing()
            return
        for facility in self._facilities:
            try:
                plans.apply(facility.reconcile(wanted))  # whole or not: a place without its limits must not be there
            except (PersonaError, OSError) as error:
                log.error("%s: cannot be made so: %s", facility.name, error)
            except Exception:  # whatever a user leaves to be found: the agent answers the others
                log.exception("%s: cannot be made so", facility.name)

    def _fetch_missing(self) -> None:
        """The documents of places that are not here; with the last of them it is reconciled again, at once."""
        refs = {place.persona for home in self.homes.values() for place in home.places.values()} - {NOBODY}

        def arrived(ref: PersonaRef, denied: Denied | None) -> None:
            self._fetching.discard(ref)
            if denied is None and not self._fetching:
                self.reconcile()

        for ref in refs - self._fetching:
            try:
                self._personas.get(ref)
            except PersonaError:
                self._fetching.add(ref)
                self._personas.ensure(ref, functools.partial(arrived, ref))

    def release(self) -> None:
        """Nothing of ours stays; the sessions go on without limits."""
        for home in list(self.homes.values()):
            for place in home.places.values():
                if place.managed:
                    self._leave(place)
        self.homes.clear()
        for facility in reversed(self._facilities):
            try:
                for failure in plans.apply_each(facility.reconcile({})):
                    log.error("%s: something stays: %s", facility.name, failure)
            except (PersonaError, OSError) as error:
                log.error("%s: something stays: %s", facility.name, error)
        for path in self._directory.glob("*.json"):
            os.unlink(path)


def _is_services(home: Home, task: Task) -> bool:
    """Whether it is sshd's or cron's own, which stays with them.  Raises ``OSError`` when it is gone."""
    return home.uid != 0 and not any(task.credentials().uids)
