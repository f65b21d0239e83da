"""Puts each command where its persona binds it, and keeps what is bound as it should be.

A session that ever used one persona costs nothing here: its processes are there, and their children are
born there.  Everything runs in the loop's thread.
"""

import contextlib
import errno
import functools
import logging
from collections.abc import Callable, Iterable

from persona.decisions import Denied, Granted, PersonaRef
from persona.documents import Persona
from persona.problems import PersonaError, Reason
from persona_guest.broker.documents import Personas
from persona_guest.core.file_id import Image
from persona_guest.core.persona_cgroups import MANAGED, PersonaCgroup, manager_of, place_of, scope_of
from persona_guest.core.reassignment import NO_PERSONA, bereft, named
from persona_guest.enforce import plan as plans
from persona_guest.enforce.facility import Facility
from persona_guest.enforce.plan import Plan
from persona_guest.enforce.plan_text import in_words, telling
from persona_guest.gate.pending import Pending
from persona_guest.kernel import seccomp
from persona_guest.kernel.cgroup import Hierarchy, cgroup_of
from persona_guest.kernel.task import Task
from persona_guest.loop import Loop
from persona_guest.session.model import Login
from persona_guest.session.placement import Placement
from persona_guest.session.registry import Registry

log = logging.getLogger("persona.enforce")

_LEAVE_S = (0.2, 1.0, 5.0)  # the last process of a session may not be quite gone when its listener is

Watch = Callable[[PersonaCgroup], None]


class Enforcer:
    """``watch`` is told of each place that is entered."""

    def __init__(
        self,
        loop: Loop,
        registry: Registry,
        tree: Hierarchy,
        facilities: Iterable[Facility],
        personas: Personas,
        watch: Watch,
    ) -> None:
        self.tree = tree
        self._registry = registry
        self._loop = loop
        self._facilities = tuple(facilities)
        self._personas = personas
        self._watch = watch
        self._fetching: set[PersonaRef] = set()
        self._released = False

    @property
    def binds(self) -> bool:
        """Whether this machine has anything to bind personas with."""
        return bool(self._facilities)

    # --- one exec ---------------------------------------------------------------------------------

    def read_task(self, pending: Pending) -> None:
        """Reads which program the task runs now.  Raises ``OSError`` when it is gone."""
        pending.before()

    def place(self, pending: Pending, granted: Granted | None) -> None:
        """Brings a task that waits for its exec to where it belongs.

        Raises ``PersonaError`` (or ``OSError`` where the task is gone): then it must not start.
        """
        login = pending.login
        if self._released:
            return
        placement = login.placement
        before = pending.before()
        if placement is None:
            placement = login.placement = Placement(
                login.session.id,
                login.session.uid,
                cgroup_of(pending.task.tid),
                before,
                login.default_persona or NO_PERSONA,
            )
        elif before != placement.opener and (granted is None or granted.persona == placement.only or placement.managed):
            return  # most execs: it was born where it belongs (docs/decisions/0011-where-processes-live.md)
        try:
            self._put(placement, pending, granted)
        except ProcessLookupError:
            raise
        except OSError as error:
            raise PersonaError(Reason.ENFORCEMENT_FAILED, f"its cgroup: {error}") from error

    @staticmethod
    def attempt(plan: Plan, what: str) -> None:
        """Applies a plan that nobody waits for.  A failure is in the journal, where ``what`` says what stays."""
        try:
            plans.apply(plan)
        except (PersonaError, OSError) as error:
            log.error("%s: %s", what, error)

    def _put(self, placement: Placement, pending: Pending, granted: Granted | None) -> None:
        task = pending.task
        if not placement.places and _is_services(placement, task):
            return  # before the session is its user's: the same program may be one that they may start
        current = cgroup_of(task.tid)
        if manager_of(current, placement.uid) is not None:
            if MANAGED not in placement.places:
                self.enter(placement, placement.default_persona, current)
            return
        if granted is None and _is_services(placement, task):
            return
        if not seccomp.still_valid(pending.login.listener, pending.ident):
            raise ProcessLookupError(errno.ESRCH, "what was looked at may be another's task")
        ref = placement.default_persona if granted is None else granted.persona
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
        place = place_of(placement.session_id, placement.uid, ref, found, shared=shared, withdrawn=withdrawn)
        known = placement.places.get(place.key)
        if known == place:
            if placement.unsaved:
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
        if (login := self._registry.get(placement.session_id)) is not None:
            self._registry.try_to_save(login)  # it has been done already

    def document(self, ref: PersonaRef) -> Persona:
        """The document of a persona's version.  Raises ``PersonaError`` where it is not here."""
        return self._personas.get(ref)

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
        login = self._registry.get(placement.session_id)
        placement.unsaved = True
        try:
            if login is not None:
                self._registry.save(login)
        except OSError as error:
            raise PersonaError(Reason.ENFORCEMENT_FAILED, f"where it lives cannot be kept: {error}") from error

    # --- sessions ---------------------------------------------------------------------------------

    def ended(self, login: Login) -> None:
        """The last process of a session is gone: takes its places apart, a moment later."""
        if login.placement is not None:
            self._clear(login.placement, 0)

    def _clear(self, placement: Placement, tries: int) -> None:
        def again() -> None:
            left = [self._leave(place) for place in placement.places.values()]
            if not all(left) and tries + 1 < len(_LEAVE_S):
                self._clear(placement, tries + 1)

        self._loop.call_later(_LEAVE_S[tries], again)

    def restore(self) -> None:
        """Takes up the places of the sessions that the agent before this one had, then makes everything so."""
        for login in self._registry.gated():  # from an agent that had no places: a service manager starts little anew
            session = login.session
            with contextlib.suppress(OSError):
                found = cgroup_of(session.monitor)
                if login.placement is None and manager_of(found, session.uid) is not None:
                    login.placement = Placement(session.id, session.uid, found, Image(0, 0))
        for placement in self._registry.placements():
            for key, place in list(placement.places.items()):
                if not self.tree.exists(place.cgroup):  # taken apart meanwhile, and nobody could write that down
                    placement.drop(key)
                    continue
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
        for placement in self._registry.placements():
            for place in placement.places.values():
                persona = self.document(place.persona)
                found[place] = bereft(persona) if place.withdrawn else persona
        return found

    def plan(self) -> list[tuple[str, Plan]]:
        """What would be changed now, by facility.  Raises ``PersonaError``."""
        wanted = self.wanted()
        return [(facility.name, facility.reconcile(wanted)) for facility in self._facilities]

    def reconcile(self) -> None:
        """Brings what is found to what should be.  What fails is in the journal, and denied when it matters."""
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
        refs = {place.persona for placement in self._registry.placements() for place in placement.places.values()}

        def arrived(ref: PersonaRef, denied: Denied | None) -> None:
            self._fetching.discard(ref)
            if denied is None and not self._fetching:
                self.reconcile()

        for ref in refs - self._fetching - {NO_PERSONA}:
            try:
                self._personas.get(ref)
            except PersonaError:
                self._fetching.add(ref)
                self._personas.ensure(ref, functools.partial(arrived, ref))

    def release(self) -> None:
        """Removes everything of ours and binds nothing any more; the sessions go on without limits."""
        self._released = True
        for login in self._registry.gated():
            for place in login.placement.places.values() if login.placement is not None else ():
                if place.managed:
                    self._leave(place)
            login.placement = None
            self._registry.try_to_save(login)
        for facility in reversed(self._facilities):
            try:
                for failure in plans.apply_each(facility.release()):
                    log.error("%s: something stays: %s", facility.name, failure)
            except (PersonaError, OSError) as error:
                log.error("%s: something stays: %s", facility.name, error)


def cgroups_of(registry: Registry, tree: Hierarchy, uid: int) -> list[str]:
    """A user's places as directories, but for what is their service manager's.  Safe to call from any thread."""
    placements = [placement for placement in registry.placements() if placement.uid == uid]
    places = [place for placement in placements for place in list(placement.places.values())]
    return [tree.path(place.cgroup) for place in places if not place.managed]


def _is_services(placement: Placement, task: Task) -> bool:
    """Whether it is sshd's or cron's own, which stays with them.  Raises ``OSError`` when it is gone."""
    return placement.uid != 0 and not any(task.credentials().uids)


def _tell(place: PersonaCgroup, before: PersonaCgroup | None) -> None:
    """One line for the journal when a session has a persona in use that it had not, or another version of it."""
    persona = named(place.persona)
    if place.withdrawn:
        log.info(
            "session %s (uid %d): what %s does not allow any more is set apart", place.session_id, place.uid, persona
        )
    elif before is None:
        log.info("session %s (uid %d): %s is in use", place.session_id, place.uid, persona)
    elif before.persona != place.persona:
        was = named(before.persona)
        log.info("session %s (uid %d): %s is in use instead of %s", place.session_id, place.uid, persona, was)
