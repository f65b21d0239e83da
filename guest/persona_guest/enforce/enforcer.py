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
from persona_guest import files
from persona_guest.broker.documents import Personas
from persona_guest.core.persona_cgroups import MANAGED, PersonaCgroup, manager_of, place_of, scope_of
from persona_guest.core.reassignment import NOBODY, NOBODYS, bereft, named
from persona_guest.enforce import plan as plans
from persona_guest.enforce.cgroups.limits import PAGE
from persona_guest.enforce.facility import Facility
from persona_guest.enforce.plan import Plan
from persona_guest.enforce.plan_text import in_words, telling
from persona_guest.gate.pending import Gated, Pending
from persona_guest.kernel import seccomp
from persona_guest.kernel.cgroup import Hierarchy, cgroup_of
from persona_guest.kernel.task import Task
from persona_guest.loop import Loop
from persona_guest.program.identity import Image
from persona_guest.session.model import Session
from persona_guest.session.placement import Placement, load

log = logging.getLogger("persona.enforce")

_LEAVE_S = (0.2, 1.0, 5.0)  # the last process of a session may not be quite gone when its listener is

Watch = Callable[[PersonaCgroup], None]


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
        self.placements: dict[str, Placement] = {}
        self._loop = loop
        self._facilities = tuple(facilities)
        self._personas = personas
        self._directory = directory
        self._base = base
        self._watch = watch
        self._fetching: set[PersonaRef] = set()
        self._unsaved: set[str] = set()  # sessions whose file does not say where they live now

    # --- one exec ---------------------------------------------------------------------------------

    def place(self, pending: Pending, granted: Granted | None) -> None:
        """Brings a task that waits for its exec to where it belongs.

        Raises ``PersonaError`` (or ``OSError`` where the task is gone): then it must not start.
        """
        gated = pending.gated
        placement = gated.placement
        before = pending.before()
        if placement is None:
            placement = gated.placement = self._settle(gated.session, pending.task, before)
        elif before != placement.opener and (granted is None or granted.persona == placement.only or placement.managed):
            return  # most execs: it was born where it belongs (docs/decisions/0011-where-processes-live.md)
        try:
            self._put(placement, pending, granted)
        except ProcessLookupError:
            raise
        except OSError as error:
            raise PersonaError(Reason.ENFORCEMENT_FAILED, f"its cgroup: {error}") from error

    def cgroups_of(self, uid: int) -> list[str]:
        """A user's places as directories, but for what is their service manager's.  Safe to call from any thread."""
        placements = [placement for placement in list(self.placements.values()) if placement.uid == uid]
        places = [place for placement in placements for place in list(placement.places.values())]
        return [self.tree.path(place.cgroup) for place in places if not place.managed]

    @staticmethod
    def attempt(plan: Plan, what: str) -> None:
        """Applies a plan that nobody waits for; that it failed is in the journal, where ``what`` says what stays."""
        try:
            plans.apply(plan)
        except (PersonaError, OSError) as error:
            log.error("%s: %s", what, error)

    def _settle(self, session: Session, task: Task, before: Image) -> Placement:
        placement = self.placements.get(session.id)
        if placement is None:
            base = self._base(session.id) or NOBODY
            placement = self.placements[session.id] = Placement(
                session.id, session.uid, cgroup_of(task.tid), before, base
            )
        return placement

    def _put(self, placement: Placement, pending: Pending, granted: Granted | None) -> None:
        task = pending.task
        if not placement.places and _is_services(placement, task):
            return  # before the session is its user's: the same program may be one that they may start
        current = cgroup_of(task.tid)
        if manager_of(current, placement.uid) is not None:
            if MANAGED not in placement.places:
                self.enter(placement, placement.base, current)
            return
        if granted is None and _is_services(placement, task):
            return
        if not seccomp.still_valid(pending.gated.listener, pending.ident):
            raise ProcessLookupError(errno.ESRCH, "what was looked at may be another's task")
        ref = placement.base if granted is None else granted.persona
        place = placement.places.get(ref.name)
        if place is None or place.persona.version < ref.version:
            place = self.enter(placement, ref, current)
        if current != place.cgroup:
            self.tree.move(place.cgroup, task.tid)

    # --- places -----------------------------------------------------------------------------------

    def enter(
        self, placement: Placement, ref: PersonaRef, current: str = "", *, withdrawn: bool = False
    ) -> PersonaCgroup:
        """The place of a persona in a session, made, or brought to this version.  Raises ``PersonaError``."""
        found = current if scope_of(current, placement.uid) or manager_of(current, placement.uid) else placement.found
        if scope_of(found, placement.uid):
            placement.found = found
        persona = self.document(ref)
        shared = persona.resource_limits.per == "persona"
        place = place_of(placement.session, placement.uid, ref, found, shared=shared, withdrawn=withdrawn)
        known = placement.places.get(place.key)
        if known == place:
            if placement.session in self._unsaved:
                self._save(placement)
            return place
        plans.apply(self._entering(place, bereft(persona) if withdrawn else persona))
        placement.add(place)
        _tell(place, known)
        if known is not None and known.cgroup != place.cgroup:
            self.tree.empty(known.cgroup, place.cgroup)
            self._leave(known)
        self._watch(place)
        self._save(placement)
        return place

    def leave(self, placement: Placement, key: str) -> None:
        """Takes the place of this key apart, once no process lives there: its rules, its limits, its cgroup."""
        self._leave(placement.places[key])
        placement.drop(key)
        self._try_to_save(placement)

    def document(self, ref: PersonaRef) -> Persona:
        """Raises ``PersonaError`` where it is not here."""
        return NOBODYS if ref == NOBODY else self._personas.get(ref)

    def left(self, place: PersonaCgroup, persona: Persona) -> int:
        """How many bytes of its memory limit a place lacks for what earlier sessions of its user left."""
        limit = persona.resource_limits.memory_bytes
        if limit is None or place.shared:
            return 0
        with contextlib.suppress(OSError, ValueError):  # it went away, or somebody else set it to no limit
            return max(0, limit - limit % PAGE - int(self.tree.read(place.cgroup, "memory.max")))
        return 0

    def _entering(self, place: PersonaCgroup, persona: Persona) -> Plan:
        return tuple(step for facility in self._facilities for step in facility.enter(place, persona))

    def _leave(self, place: PersonaCgroup) -> bool:
        """Whether every facility could; what could not says so in the journal."""
        left = True
        for facility in reversed(self._facilities):
            try:
                plans.apply(facility.leave(place))
            except (PersonaError, OSError) as error:
                log.warning("%s: %s cannot be left yet: %s", facility.name, place.cgroup, error)
                left = False
        return left

    def _save(self, placement: Placement) -> None:
        """Raises ``PersonaError``: nothing starts in a place that the next agent would not know."""
        self._unsaved.add(placement.session)
        try:
            placement.save(self._directory)
        except OSError as error:
            raise PersonaError(Reason.ENFORCEMENT_FAILED, f"where it lives cannot be kept: {error}") from error
        self._unsaved.discard(placement.session)

    def _try_to_save(self, placement: Placement) -> None:
        """For what has been done already; ``reconcile`` tries again."""
        try:
            self._save(placement)
        except PersonaError as error:
            log.error("session %s: %s", placement.session, error.message)

    # --- sessions ---------------------------------------------------------------------------------

    def ended(self, session: Session) -> None:
        """The last process of a session is gone."""
        self._unsaved.discard(session.id)
        placement = self.placements.pop(session.id, None)
        if placement is not None:
            self._clear(placement, 0)

    def _clear(self, placement: Placement, tries: int) -> None:
        def again() -> None:
            left = [self._leave(place) for place in placement.places.values()]
            if all(left):
                (self._directory / f"{placement.session}.json").unlink(missing_ok=True)
            elif tries + 1 < len(_LEAVE_S):
                self._clear(placement, tries + 1)

        self._loop.call_later(_LEAVE_S[tries], again)

    def restore(self, sessions: dict[str, Gated]) -> None:
        """Takes up what the agent before this one kept, then makes everything so."""
        files.clear_unfinished(self._directory)
        for path in self._directory.glob("*.json"):
            gated = sessions.get(path.stem)
            try:
                placement = load(path)
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.error("%s: %s; its session is placed anew", path, error)
                path.unlink(missing_ok=True)
                continue
            if gated is None:
                path.unlink(missing_ok=True)
            else:
                gated.placement = self.placements[placement.session] = placement
        for ident, gated in sessions.items():  # from an agent that had no places: a service manager starts little anew
            with contextlib.suppress(OSError):
                found = cgroup_of(gated.session.monitor)
                if gated.placement is None and manager_of(found, gated.session.uid) is not None:
                    gated.placement = self.placements[ident] = Placement(ident, gated.session.uid, found, Image(0, 0))
        for placement in self.placements.values():
            for place in placement.places.values():
                self._watch(place)
                if not place.withdrawn and not place.managed:
                    self._thaw(place)
        self.reconcile()

    def _thaw(self, place: PersonaCgroup) -> None:
        """An agent that ended while it looked through a place may have left it stopped."""
        try:
            self.tree.thaw(place.cgroup)
        except OSError as error:
            log.error("%s is not thawed: %s", place.cgroup, error)

    def wanted(self) -> dict[PersonaCgroup, Persona]:
        """Every place in use, and what it is under.  Raises ``PersonaError`` where a document is not here."""
        found = {}
        for placement in self.placements.values():
            for place in placement.places.values():
                persona = self.document(place.persona)
                found[place] = bereft(persona) if place.withdrawn else persona
        return found

    def plan(self) -> list[tuple[str, Plan]]:
        """What would be changed now, by facility.  Raises ``PersonaError``."""
        wanted = self.wanted()
        return [(facility.name, facility.reconcile(wanted)) for facility in self._facilities]

    def reconcile(self) -> None:
        """Makes what is found what should be; what cannot be is in the journal, and denied when it matters."""
        for placement in [self.placements[session] for session in self._unsaved if session in self.placements]:
            self._try_to_save(placement)
        try:
            wanted = self.wanted()
        except PersonaError as error:  # what is there stays as it is, rather than go for want of a document
            log.error("limits and network rules of sessions are not looked after now: %s", error.message)
            self._fetch_missing()
            return
        for facility in self._facilities:
            try:
                plan = facility.reconcile(wanted)
                plans.apply(plan)  # whole or not: a place without its limits must not be there
                if mended := telling(plan):
                    log.info("%s was not as it should be and is again: %s", facility.name, in_words(mended))
            except (PersonaError, OSError) as error:
                log.error("%s: cannot be made so: %s", facility.name, error)
            except Exception:  # whatever a user leaves to be found: the agent answers the others
                log.exception("%s: cannot be made so", facility.name)

    def _fetch_missing(self) -> None:
        """The documents of places that are not here; with the last of them it is reconciled again, at once."""
        refs = {place.persona for placement in self.placements.values() for place in placement.places.values()} - {
            NOBODY
        }

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
        for placement in list(self.placements.values()):
            for place in placement.places.values():
                if place.managed:
                    self._leave(place)
        self.placements.clear()
        for facility in reversed(self._facilities):
            try:
                for failure in plans.apply_each(facility.release()):
                    log.error("%s: something stays: %s", facility.name, failure)
            except (PersonaError, OSError) as error:
                log.error("%s: something stays: %s", facility.name, error)
        for path in self._directory.glob("*.json"):
            os.unlink(path)


def _is_services(placement: Placement, task: Task) -> bool:
    """Whether it is sshd's or cron's own, which stays with them.  Raises ``OSError`` when it is gone."""
    return placement.uid != 0 and not any(task.credentials().uids)


def _tell(place: PersonaCgroup, before: PersonaCgroup | None) -> None:
    """One line for the journal when a session has a persona in use that it had not, or another version of it."""
    persona = named(place.persona)
    if place.withdrawn:
        log.info("session %s (uid %d): what %s does not allow any more is set apart", place.session, place.uid, persona)
    elif before is None:
        log.info("session %s (uid %d): %s is in use", place.session, place.uid, persona)
    elif before.persona != place.persona:
        was = named(before.persona)
        log.info("session %s (uid %d): %s is in use instead of %s", place.session, place.uid, persona, was)
