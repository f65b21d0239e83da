"""Rules by which the memory and CPU of a host are distributed: the arbiter's, Proxmox's, and none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from persona_broker.host.core.arbiter import Host, Kept, Rules, Shape, Vm, arbitrate

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Seen:
    """A host at one moment: what the arbiter gets to know, and its memory in bytes with what is used of it."""

    host: Host
    memory: int
    used: int


def shares(room: float, wants: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Who gets how much: by weight, nobody more than they want, and what one leaves goes to the others."""
    got = [0.0] * len(wants)
    weight = sum(weights)
    for at in sorted(range(len(wants)), key=lambda at: wants[at] / weights[at]):
        got[at] = min(wants[at], room * weights[at] / weight)
        room, weight = room - got[at], weight - weights[at]
    return got


class Rule(Protocol):
    """Decides for one host."""

    def shapes(self, now: int, seen: Seen, vms: Sequence[Vm]) -> tuple[Mapping[str, Shape], float]:
        """What VMs are to have, and when to ask again at the latest although nothing happened (``inf``: never)."""


class Nobody:
    """Leaves every VM as it is defined."""

    def shapes(self, now: int, seen: Seen, vms: Sequence[Vm]) -> tuple[Mapping[str, Shape], float]:
        """Asks for no change, at no time."""
        return {}, float("inf")


class Arbiter:
    """The real one."""

    def __init__(self, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        self._memory = Kept()

    def shapes(self, now: int, seen: Seen, vms: Sequence[Vm]) -> tuple[Mapping[str, Shape], float]:
        """Its targets; it is asked again when a time is up that it waits for."""
        targets, self._memory = arbitrate(self.rules, now, seen.host, vms, self._memory)
        shapes = {name: target.shape for name, target in targets.items() if target.shape is not None}
        if any(shapes.get(vm.name, vm.in_force) != vm.in_force for vm in vms):
            return shapes, now + 1
        return shapes, self._due(now)

    def _due(self, now: int) -> float:
        rules = self.rules
        dues = [
            latch.contrary_since + (rules.leave_hold_s if latch.holds else rules.enter_hold_s)
            for latch in (self._memory.cpu, self._memory.memory)
            if latch.contrary_since is not None
        ]
        for past in self._memory.past.values():
            dues += [past.gave_at + rules.hold_s] if past.gave_at is not None else []
            dues += [past.took_at + rules.take_every_s] if past.took_at is not None else []
        return min((due for due in dues if due > now), default=float("inf"))


class Proxmox:
    """A model of what Proxmox VE does with balloons (PVE/AutoBalloon.pm and pvestatd, version 8).

    Every ten seconds it aims at 80 % of the host's memory.  What all VMs have above their minimum, and what is missing
    to the aim or too much, is dealt out in proportion to their shares (here: equal ones); a VM goes 100 MiB towards
    that at once.  Growing begins with VMs that have less free memory than a quarter of their minimum, shrinking with
    those that have more.  Who is logged in does not matter to it, nor does CPU, nor what guests use beyond that.  The
    minimum is half of a VM's memory, as the arbiter's floor.  In its favour: nothing shrinks while it has to give.
    """

    every_s = 10

    def __init__(self) -> None:
        self._next = 0

    def shapes(self, now: int, seen: Seen, vms: Sequence[Vm]) -> tuple[Mapping[str, Shape], float]:
        """New balloons; where it changed nothing, it would not either before something happens."""
        if now < self._next:
            return {}, self._next
        self._next = now + self.every_s
        missing = seen.memory * 80 // 100 - seen.used
        if abs(missing) <= 10 * _MIB:
            return {}, float("inf")
        tight = [vm for vm in vms if (vm.balloon or 0) - (vm.used or 0) <= vm.memory // 2 // 4]
        first = tight if missing > 0 else [vm for vm in vms if vm not in tight]
        found = self._moved(first, missing) or self._moved(vms, missing)
        shapes = {
            vm.name: replace(vm.in_force, memory=found[vm.name])
            for vm in vms
            if vm.in_force is not None and found.get(vm.name, vm.in_force.memory) != vm.in_force.memory
        }
        return shapes, self._next if shapes else float("inf")

    @staticmethod
    def _moved(vms: Sequence[Vm], missing: int) -> dict[str, int]:
        """The sizes of those that grow or shrink by their share of what is missing."""
        has = {vm.name: vm.balloon or 0 for vm in vms}
        above = sum(has[vm.name] - vm.memory // 2 for vm in vms) + missing
        most = [vm.memory - vm.memory // 2 for vm in vms]
        found = {}
        for vm, share in zip(vms, shares(max(0, above), most, [1] * len(vms)), strict=True):
            wants = vm.memory // 2 + int(share) - has[vm.name]
            step = max(-100 * _MIB, min(100 * _MIB, wants))
            if step * missing > 0:
                found[vm.name] = has[vm.name] + step
        return found
