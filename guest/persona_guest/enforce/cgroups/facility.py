"""Limits: one cgroup a place, with its persona's numbers; below cgroups that systemd delegated to us.

Two things are systemd's and get values all the same, because nothing below them could do it: the weights of
a session's scope and of its user's slice with its bound of memory, and the limits of a user's service manager.
They are looked after at intervals (``reconcile``), and put back.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from persona.documents import Persona
from persona.problems import PersonaError, Reason
from persona_guest.core.persona_cgroups import (
    FALLBACK_ROOT,
    LOGIN,
    PersonaCgroup,
    fallback_slice_of,
    is_kept,
    renamed,
    slice_of,
)
from persona_guest.enforce.cgroups.disks import disks
from persona_guest.enforce.cgroups.limits import (
    CONTROLLERS,
    UNLIMITED,
    WEIGHT_DEFAULT,
    Setting,
    settings_of,
    weight_of,
    weights_of,
)
from persona_guest.enforce.cgroups.operations import MEMORY_NOTE, Empty, HandOn, Make, Note, Remove, Set, TakeBack
from persona_guest.enforce.cgroups.user_memory import UserMemory
from persona_guest.enforce.facility import Wanted
from persona_guest.enforce.plan import Operation, Plan
from persona_guest.kernel.cgroup import Hierarchy

log = logging.getLogger("persona.enforce")

_USERS = "user.slice"


class Cgroups:
    """The facility of limits.  It keeps nothing: each plan is made from what the hierarchy has then."""

    name = "cgroups"

    def __init__(self, tree: Hierarchy, mountinfo: str = "/proc/self/mountinfo", devices: str = "/sys/dev/block"):
        self._tree = tree
        self._mountinfo = mountinfo
        self._devices = devices
        self._memory = UserMemory(tree)

    # --- one place --------------------------------------------------------------------------------

    def enter(self, place: PersonaCgroup, persona: Persona) -> Plan:
        """Makes the cgroups down to the place and sets its limits; plans only what is not so already."""
        return self._enter(place, persona, self._memory.left, alone=True)

    def _enter(self, place: PersonaCgroup, persona: Persona, left: Callable[[int], int], *, alone: bool) -> Plan:
        """``alone``: the bound above is settled for this place; else the caller does so for all.

        ``left`` tells what a user left in memory.
        """
        limits = persona.resource_limits
        now = self._memory.room(place, limits.memory_bytes, left)
        settings = settings_of(replace(limits, memory_bytes=now), disks(self._mountinfo, self._devices))
        weights = weights_of(weight_of(persona.priority))
        settled = self._memory.settle(place.above, {place.cgroup: limits.memory_bytes}) if alone and place.above else ()
        if place.managed:
            return (
                *settled,
                *self._noted(place.cgroup, place.origin),
                *self._set(place.cgroup, (*settings, *weights), new=False),
            )
        steps: list[Operation] = []
        for cgroup in self._above(place):
            steps += self._handing_on(cgroup)
        steps += settled
        if place.shared:
            steps += self._set(place.parent, (*settings, *weights), new=not self._tree.exists(place.parent))
            settings, weights = settings_of(UNLIMITED, ()), ()
        new = not self._tree.exists(place.cgroup)
        if new:
            steps.append(Make(self._tree, place.cgroup))
        steps += self._set(place.cgroup, (*settings, *weights), new=new)
        steps += self._memory.noted(place, limits.memory_bytes, now)
        if self._in_house(place):
            steps += self._noted(place.cgroup, place.origin)
        else:
            steps += self._weigh(place, weight_of(persona.priority))
        return tuple(steps)

    def leave(self, place: PersonaCgroup) -> Plan:
        """Removes the place's cgroup.

        What is above it below ``FALLBACK_ROOT`` stays: what was left in memory counts there.
        """
        if not self._tree.exists(place.cgroup):
            return self._leave_above(place)
        if place.managed:
            return (*self._put_back(place.cgroup), *self._leave_above(place))
        return (Remove(self._tree, place.cgroup), *self._leave_above(place))

    def _leave_above(self, place: PersonaCgroup) -> Plan:
        weighed = () if place.managed or self._in_house(place) else self._weigh(place, 0)
        if place.above is None or not self._tree.exists(place.above):
            return weighed
        return (*weighed, *self._memory.settle(place.above, {}, gone=(place.cgroup,)))

    def lift(self, uid: int) -> Plan:
        """Takes off the bound of a user's memory, for they log in without being gated."""
        return tuple(step for above in (slice_of(uid), fallback_slice_of(uid)) for step in self._memory.lift(above))

    def _away(self) -> Plan:
        """``FALLBACK_ROOT`` itself, once no process is there."""
        return tuple(
            Remove(self._tree, cgroup)
            for cgroup in (f"{FALLBACK_ROOT}/{LOGIN}", FALLBACK_ROOT)
            if self._tree.exists(cgroup)
        )

    @staticmethod
    def _in_house(place: PersonaCgroup) -> bool:
        return place.cgroup.startswith(FALLBACK_ROOT + "/")

    def _above(self, place: PersonaCgroup) -> list[str]:
        """The cgroups between systemd's and the place that must hand controllers on."""
        if self._in_house(
            place
        ):  # systemd removes it once the unit's process has ended, and does not know the one that we make anew
            return [FALLBACK_ROOT, place.parent]
        if not self._tree.exists(place.parent):
            raise PersonaError(Reason.ENFORCEMENT_FAILED, f"there is no cgroup {place.parent}")
        return [place.parent]

    def _handing_on(self, cgroup: str) -> Iterator[Operation]:
        exists = self._tree.exists(cgroup)
        if not exists:
            yield Make(self._tree, cgroup)
        elif not set(CONTROLLERS) - set(self._tree.read(cgroup, "cgroup.subtree_control").split()):
            return
        yield HandOn(self._tree, cgroup)

    def _set(self, cgroup: str, settings: Iterable[Setting], *, new: bool) -> Iterator[Operation]:
        for setting in settings:
            before = None
            if not new:
                try:
                    before = setting.current(self._tree.read(cgroup, setting.file))
                except FileNotFoundError:
                    if setting.optional or setting.default:
                        continue
                    message = f"{cgroup} is gone"
                    if self._tree.exists(cgroup):
                        message = f"{cgroup} has no {setting.file}: its unit does not delegate the controller"
                    raise PersonaError(Reason.ENFORCEMENT_FAILED, message) from None
            if before != setting.value and not (new and setting.default):
                yield Set(self._tree, cgroup, setting, before)

    def _noted(self, cgroup: str, origin: str) -> Iterator[Operation]:
        if self._tree.noted(cgroup) != origin:
            yield Note(self._tree, cgroup, origin)

    # --- weights above ----------------------------------------------------------------------------

    def _weigh(self, place: PersonaCgroup, weight: int) -> Plan:
        """A scope weighs as much as the heaviest place in it, a user's slice as its heaviest scope.

        ``weight`` is the place's own to be; 0 = it goes away.  The scope may be gone before it, and the slice.
        """
        scope, _, name = place.cgroup.rpartition("/")
        slice_, _, scope_name = scope.rpartition("/")
        heaviest = max(weight, *self._weights(scope, but=(name, LOGIN)))
        of_user = max(heaviest, *self._weights(slice_, but=(scope_name,)))
        steps: list[Operation] = []
        if self._tree.exists(scope):
            steps += self._set(scope, weights_of(heaviest or WEIGHT_DEFAULT), new=False)
        if of_user:
            steps += (*self._noted(slice_, slice_), *self._set(slice_, weights_of(of_user), new=False))
        elif self._tree.noted(slice_):
            steps += self._put_back(slice_)
        return tuple(steps)

    def _weights(self, cgroup: str, but: tuple[str, ...]) -> list[int]:
        found = [0]
        for name in self._tree.children(cgroup):
            if name not in but and (cgroup.endswith(".scope") or name.endswith(".scope")):
                try:
                    found.append(int(self._tree.read(f"{cgroup}/{name}", "cpu.weight")))
                except (OSError, ValueError):
                    continue  # it went away, or has no controller
        return found

    def _put_back(self, cgroup: str) -> Plan:
        """A cgroup of systemd's without anything of ours."""
        settings = weights_of(WEIGHT_DEFAULT)
        if not cgroup.endswith(".slice"):  # of those only the weight is put back here; the memory bound is UserMemory's
            settings = (*settings, *settings_of(UNLIMITED, disks(self._mountinfo, self._devices)))
        return (*self._set(cgroup, settings, new=False), Note(self._tree, cgroup, ""))

    # --- all of it --------------------------------------------------------------------------------

    def reconcile(self, wanted: Wanted) -> Plan:
        """Enters what is wanted; removes what is ours and not wanted, its processes back to where they were.

        What users left in memory stays bounded.
        """
        steps, limits = self._places(wanted)
        gone = {step.cgroup for step in steps if isinstance(step, Remove)}
        gone |= {step.cgroup for step in steps if isinstance(step, Note) and not step.origin}
        for above in sorted({*limits, *self._bounded()}):
            steps += self._memory.settle(above, limits.get(above, {}), gone)
        return tuple(steps)

    def release(self) -> Plan:
        """Removes every cgroup and every value of ours."""
        steps, _ = self._places({})
        for above in self._bounded():
            steps += self._memory.lift(above)
        for name in self._tree.children(FALLBACK_ROOT):
            if name != LOGIN:
                steps.append(Remove(self._tree, f"{FALLBACK_ROOT}/{name}"))
        if self._tree.exists(FALLBACK_ROOT) and not self._homeless():
            steps += self._away()
        return tuple(steps)

    def _bounded(self) -> list[str]:
        """The cgroups of all that is one user's that have a bound of ours."""
        above = [f"{parent}/{name}" for parent in (_USERS, FALLBACK_ROOT) for name in self._tree.children(parent)]
        return [cgroup for cgroup in above if self._tree.noted(cgroup, MEMORY_NOTE)]

    def _places(self, wanted: Wanted) -> tuple[list[Operation], dict[str, dict[str, int | None]]]:
        """All but the bounds, and from which limits those follow."""
        steps: list[Operation] = []
        limits: dict[str, dict[str, int | None]] = {}
        left = functools.cache(self._memory.left)
        for place, persona in wanted.items():
            if self._in_house(place) or self._tree.exists(place.cgroup if place.managed else place.parent):
                try:
                    steps += self._enter(place, persona, left, alone=False)
                except PersonaError as error:  # it goes at this moment; the others are looked after
                    log.warning("%s: %s", place.cgroup, error.message)
                    continue
                if place.above is not None:
                    limits.setdefault(place.above, {})[place.cgroup] = persona.resource_limits.memory_bytes
        keep = {place.cgroup for place in wanted}
        kept_above = {place.parent for place in wanted}
        for slice_ in self._tree.children(_USERS):
            for unit in self._tree.children(f"{_USERS}/{slice_}"):
                cgroup = f"{_USERS}/{slice_}/{unit}"
                if unit.endswith(".scope") and LOGIN in self._tree.children(cgroup):
                    steps += self._tidy(cgroup, keep) if cgroup in kept_above else self._dissolve(cgroup)
                elif self._tree.noted(cgroup) and cgroup not in keep:
                    steps += self._put_back(cgroup)
            slice_path = f"{_USERS}/{slice_}"
            if self._tree.noted(slice_path) and not any(cgroup.startswith(slice_path + "/") for cgroup in kept_above):
                steps += self._put_back(slice_path)
        for name in self._tree.children(FALLBACK_ROOT):
            if name != LOGIN:
                steps += self._clear(f"{FALLBACK_ROOT}/{name}", keep)
        return steps, limits

    def _homeless(self) -> bool:
        """Whether any process is below ``FALLBACK_ROOT`` that came from nowhere that is left."""
        living = [
            f"{FALLBACK_ROOT}/{name}/{below}"
            for name in self._tree.children(FALLBACK_ROOT)
            for below in self._tree.children(f"{FALLBACK_ROOT}/{name}")
        ]
        return self._tree.populated(f"{FALLBACK_ROOT}/{LOGIN}") or any(
            self._tree.populated(cgroup) and not self._origin(cgroup) for cgroup in living
        )

    def _origin(self, cgroup: str) -> str | None:
        origin = self._tree.noted(cgroup)
        return origin if origin and self._tree.exists(origin) else None

    def _tidy(self, scope: str, keep: set[str]) -> Iterator[Operation]:
        """What is empty goes; what lives under a persona that nobody knows of any more keeps its limits."""
        for name in self._tree.children(scope):
            cgroup = f"{scope}/{name}"
            if name != LOGIN and cgroup not in keep and not self._tree.populated(cgroup):
                yield Remove(self._tree, cgroup)

    def _dissolve(self, scope: str) -> Iterator[Operation]:
        """A scope as systemd made it."""
        yield TakeBack(self._tree, scope)
        for name in self._tree.children(scope):
            yield from self._remove(f"{scope}/{name}", scope)
        yield from self._set(scope, weights_of(WEIGHT_DEFAULT), new=False)

    def _clear(self, parent: str, keep: set[str]) -> Iterator[Operation]:
        for name in self._tree.children(parent):
            cgroup = f"{parent}/{name}"
            if cgroup in keep:
                continue
            origin = renamed(cgroup, keep) or self._origin(cgroup)
            if origin is None and self._tree.populated(cgroup):
                origin = f"{FALLBACK_ROOT}/{LOGIN}"
                yield Make(self._tree, origin)
            yield from self._remove(cgroup, origin or "")
        if not is_kept(parent):
            yield Remove(self._tree, parent)

    def _remove(self, cgroup: str, into: str) -> Iterator[Operation]:
        if self._tree.populated(cgroup):
            if "1" in self._tree.read(cgroup, "cgroup.freeze"):
                yield Set(self._tree, cgroup, Setting("cgroup.freeze", "0"), "1")
            yield Empty(self._tree, cgroup, into, tuple(self._tree.processes(cgroup)))
        yield Remove(self._tree, cgroup)
