"""Limits: one cgroup a place, with its persona's numbers; below cgroups that systemd delegated to us.

Two things are systemd's and get values all the same, because nothing below them could do it: the weights of
a session's scope and of its user's slice, and the limits of a user's service manager.  They are looked
after at intervals (``reconcile``), and put back.
"""

import logging
from collections.abc import Iterable, Iterator

from persona.documents import Persona
from persona.problems import PersonaError, Reason
from persona_guest.core.limits import (
    CONTROLLERS,
    UNLIMITED,
    WEIGHT_DEFAULT,
    Setting,
    settings_of,
    weight_of,
    weights_of,
)
from persona_guest.core.places import HOUSE, LOGIN, Place
from persona_guest.enforce.disks import disks
from persona_guest.enforce.interface import Wanted
from persona_guest.enforce.plan import Operation, Plan
from persona_guest.enforce.steps import Empty, HandOn, Make, Note, Remove, Set, TakeBack
from persona_guest.kernel.cgroup import Hierarchy

log = logging.getLogger("persona.enforce")

_USERS = "user.slice"


class Cgroups:
    """The facility; everything it needs to know it reads from the hierarchy when it plans."""

    name = "cgroups"

    def __init__(self, tree: Hierarchy, mountinfo: str = "/proc/self/mountinfo", devices: str = "/sys/dev/block"):
        self._tree = tree
        self._mountinfo = mountinfo
        self._devices = devices

    # --- one place --------------------------------------------------------------------------------

    def enter(self, place: Place, persona: Persona) -> Plan:
        """The cgroups down to the place, then its numbers; only what is not so already."""
        settings = settings_of(persona.resource_limits, disks(self._mountinfo, self._devices))
        weights = weights_of(weight_of(persona.priority))
        if place.managed:
            return (
                *self._noted(place.cgroup, place.origin),
                *self._set(place.cgroup, (*settings, *weights), new=False),
            )
        steps: list[Operation] = []
        for cgroup in self._above(place):
            steps += self._handing_on(cgroup)
        if place.shared:
            steps += self._set(place.parent, (*settings, *weights), new=not self._tree.exists(place.parent))
            settings, weights = settings_of(UNLIMITED, ()), ()
        new = not self._tree.exists(place.cgroup)
        if new:
            steps.append(Make(self._tree, place.cgroup))
        steps += self._set(place.cgroup, (*settings, *weights), new=new)
        if self._in_house(place):
            steps += self._noted(place.cgroup, place.origin)
        else:
            steps += self._weigh(place, weight_of(persona.priority))
        return tuple(steps)

    def leave(self, place: Place) -> Plan:
        """Its cgroup, and what of ours above it has nothing else below."""
        if not self._tree.exists(place.cgroup):
            return self._leave_above(place)
        if place.managed:
            return self._put_back(place.cgroup)
        return (Remove(self._tree, place.cgroup), *self._leave_above(place))

    def _leave_above(self, place: Place) -> Plan:
        if self._in_house(place):
            if not self._tree.exists(place.parent) or self._others(place.parent, place.cgroup):
                return ()
            last = not self._others(HOUSE, place.parent) and not self._tree.populated(f"{HOUSE}/{LOGIN}")
            return (Remove(self._tree, place.parent), *(self._away() if last else ()))
        return () if place.managed else self._weigh(place, 0)

    def _others(self, cgroup: str, child: str) -> list[str]:
        return [name for name in self._tree.children(cgroup) if name != LOGIN and f"{cgroup}/{name}" != child]

    def _away(self) -> Plan:
        """The house itself, once nothing lives there."""
        return tuple(Remove(self._tree, cgroup) for cgroup in (f"{HOUSE}/{LOGIN}", HOUSE) if self._tree.exists(cgroup))

    @staticmethod
    def _in_house(place: Place) -> bool:
        return place.cgroup.startswith(HOUSE + "/")

    def _above(self, place: Place) -> list[str]:
        """The cgroups between systemd's and the place that must hand controllers on."""
        if self._in_house(place):  # systemd takes it away whenever it is empty; its unit is active all the same
            return [HOUSE, place.parent]
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

    def _weigh(self, place: Place, weight: int) -> Plan:
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
        if not cgroup.endswith(".slice"):  # of those only the weight was ours
            settings = (*settings, *settings_of(UNLIMITED, disks(self._mountinfo, self._devices)))
        return (*self._set(cgroup, settings, new=False), Note(self._tree, cgroup, ""))

    # --- all of it --------------------------------------------------------------------------------

    def reconcile(self, wanted: Wanted) -> Plan:
        """What is wanted is entered; what is ours and not wanted goes, its processes back to where they were."""
        steps: list[Operation] = []
        for place, persona in wanted.items():
            if self._in_house(place) or self._tree.exists(place.cgroup if place.managed else place.parent):
                try:
                    steps += self.enter(place, persona)
                except PersonaError as error:  # it goes at this moment; the others are looked after
                    log.warning("%s: %s", place.cgroup, error.message)
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
        for name in self._tree.children(HOUSE):
            if name != LOGIN:
                steps += self._clear(f"{HOUSE}/{name}", keep)
        if not wanted and self._tree.exists(HOUSE) and not self._homeless():
            steps += self._away()
        return tuple(steps)

    def _homeless(self) -> bool:
        """Whether anything lives in the house that came from nowhere that is left."""
        living = [
            f"{HOUSE}/{name}/{below}"
            for name in self._tree.children(HOUSE)
            for below in self._tree.children(f"{HOUSE}/{name}")
        ]
        return self._tree.populated(f"{HOUSE}/{LOGIN}") or any(
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
        names = self._tree.children(parent)
        gone = [name for name in names if f"{parent}/{name}" not in keep]
        for name in gone:
            cgroup = f"{parent}/{name}"
            origin = self._origin(cgroup)
            if origin is None and self._tree.populated(cgroup):
                origin = f"{HOUSE}/{LOGIN}"
                yield Make(self._tree, origin)
            yield from self._remove(cgroup, origin or "")
        if len(gone) == len(names):
            yield Remove(self._tree, parent)

    def _remove(self, cgroup: str, into: str) -> Iterator[Operation]:
        if self._tree.populated(cgroup):
            if "1" in self._tree.read(cgroup, "cgroup.freeze"):
                yield Set(self._tree, cgroup, Setting("cgroup.freeze", "0"), "1")
            yield Empty(self._tree, cgroup, into, tuple(self._tree.processes(cgroup)))
        yield Remove(self._tree, cgroup)
