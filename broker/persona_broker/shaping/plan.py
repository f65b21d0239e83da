"""What ``persona-host plan`` shows: where the arbiter would bring each VM, if everything stayed as it is now."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from persona.shown import amount
from persona_broker.host.core.arbiter import Kept, LiveSession, Rules, Shape, Target, Vm, arbitrate, classes
from persona_broker.shaping.inputs import is_seen, of_host
from persona_broker.view import View

# a single look has no time to wait for, and goes all the way
_AT_ONCE = replace(Rules(), enter_hold_s=0.0, hold_s=0.0, take_every_s=0.0, cpu_step=1.0, memory_step=1.0)


@dataclass(frozen=True, slots=True)
class Row:
    """One VM; ``rank`` is that of its class, ``None`` where it has no priority."""

    vm: Vm
    rank: int | None
    target: Target

    def as_json(self) -> dict[str, Any]:
        """One of a host's ``vms``."""
        return {
            "vm": self.vm.name,
            "sessions": len(self.vm.sessions),
            "priority": _priority(self.vm),
            "class": self.rank,
            "now": _fields(self.vm.in_force),
            "target": _fields(self.target.shape),
            "why": str(self.target.why),
            "detail": self.target.detail,
        }

    def line(self) -> str:
        """The same for people."""
        priority = _priority(self.vm)
        said = "-" if priority is None else str(priority)
        why = str(self.target.why) + (f": {self.target.detail}" if self.target.detail else "")
        return (
            f"  {self.vm.name:36} {len(self.vm.sessions):8} {said:>8}  {_shown(self.vm, self.vm.in_force):36}"
            f"{_shown(self.vm, self.target.shape):36}{why}"
        )


_HEAD = f"  {'VM':36} {'SESSIONS':>8} {'PRIORITY':>8}  {'NOW':36}{'WOULD HAVE':36}WHY"


@dataclass(frozen=True, slots=True)
class HostPlan:
    """A host of the settings, and its running VMs, the higher class first; none where it is not seen."""

    host: str
    is_seen: bool
    rows: tuple[Row, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """One of the ``items``."""
        return {"host": self.host, "is_seen": self.is_seen, "vms": [row.as_json() for row in self.rows]}

    def lines(self) -> Iterator[str]:
        """The same for people."""
        if not self.is_seen:
            yield f"{self.host}: the broker does not see it; persona-broker and persona-host have to run"
            return
        yield f"{self.host}: {len(self.rows) or 'no'} running VM{'' if len(self.rows) == 1 else 's'}"
        if self.rows:
            yield _HEAD
        yield from (row.line() for row in self.rows)


def of(name: str, view: View, sessions: Mapping[str, tuple[LiveSession, ...]], now: float) -> HostPlan:
    """The plan for a host at ``now`` (Unix seconds)."""
    seen = view.hosts.get(name)
    if seen is None or not is_seen(seen, view, now):
        return HostPlan(name, is_seen=False)
    host, vms = of_host(seen, view, sessions, now)
    targets, _ = arbitrate(_AT_ONCE, 0.0, host, vms, Kept())
    ranks = classes(_AT_ONCE, vms)
    rows = [Row(vm, ranks.get(vm.name), targets[vm.name]) for vm in vms]
    rows.sort(key=lambda row: (-1 if row.rank is None else row.rank, row.vm.name), reverse=True)
    return HostPlan(name, is_seen=True, rows=tuple(rows))


def _priority(vm: Vm) -> int | None:
    return max((session.priority for session in vm.sessions), default=None)


def _fields(shape: Shape | None) -> dict[str, Any] | None:
    return None if shape is None else {"weight": shape.weight, "cpus": shape.cpus, "memory": shape.memory}


def _shown(vm: Vm, shape: Shape | None) -> str:
    if shape is None:
        return "-"
    cpus = f"{vm.cpus if shape.cpus is None else shape.cpus:g} of {vm.cpus} cores"
    return f"weight {shape.weight}, {cpus}, {amount(shape.memory)}"
