"""One host after the other through its days, under one rule, and what was seen of it.

A host is looked at when something happens there, each second while a balloon moves, and when its rule wants to be asked
again.  Between two looks nothing changes but balloons, so that nothing is missed.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from persona_broker.host.core.arbiter import WEIGHT, Host, Rules, Shape, Vm, classes

from tests.simulation.fleet import DAY, TICK, Doing, Fleet, Machine, Own, Plan
from tests.simulation.rules import Rule, Seen, shares

_OWN_CPUS = 0.5
_BALLOON_BPS = 256 << 20  # how fast a balloon moves
_RULES = Rules()


@dataclass
class Figures:
    """What was seen of a fleet, of hosts and VMs together.

    ``demanded`` and ``granted`` are core seconds by persona while VMs of a host wanted more CPU than it has.
    ``memory`` and ``over`` are by ticks of the day: byte seconds used of hosts, and seconds over capacity; ``short_s``
    VM seconds in which a guest had less memory than it used.  ``changes`` are by host, VM and hour, and ``logins`` how
    often its sessions became more or fewer.  ``equals`` has, by host and two VMs of one size and class, for how long
    one of them or both had less CPU than they wanted, and what each had of as much as both wanted.
    """

    demanded: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    granted: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    contended_s: int = 0
    memory: list[float] = field(default_factory=lambda: [0.0] * (DAY // TICK))
    over: list[int] = field(default_factory=lambda: [0] * (DAY // TICK))
    short_s: int = 0
    changes: Counter[tuple[int, str, int]] = field(default_factory=Counter)
    logins: Counter[tuple[int, str, int]] = field(default_factory=Counter)
    equals: dict[tuple[int, str, str], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0] * 3))
    looks: int = 0
    faults: list[str] = field(default_factory=list)

    def satisfied(self, persona: str) -> float:
        """The share of the CPU that it wanted while that was short, from 0 to 1."""
        return self.granted[persona] / self.demanded[persona]


def simulate(fleet: Fleet, rule: Callable[[], Rule], each_second: bool = False) -> Figures:
    """Runs each host of the fleet under a rule of its own."""
    figures = Figures()
    for number, plan in enumerate(fleet.plans()):
        HostRun(number, plan, rule(), figures, each_second).run(fleet.until)
    return figures


def _floor(vm: Vm) -> int:
    """What nobody may take: half of a VM's memory, and what is in use."""
    return max(vm.memory // 2, vm.used or 0)


class _Guest:
    """A VM as the simulation goes on: what is in force for it, how big its balloon is, and its CPU."""

    def __init__(self, machine: Machine, doing: Doing) -> None:
        self.machine, self.doing = machine, doing
        self.shape = Shape(WEIGHT, None, machine.memory)
        self.balloon = machine.memory
        self.got = 0.0
        self.gave_at = self.took_at = -DAY
        self.seen: Vm | None = None

    @property
    def moves(self) -> bool:
        return self.machine.follows and self.balloon != self.shape.memory

    @property
    def wants(self) -> float:
        return self.doing.cpus if self.shape.cpus is None else min(self.doing.cpus, self.shape.cpus)

    @property
    def lacks(self) -> bool:
        """Whether it has less CPU than it wants."""
        return self.got < self.doing.cpus - 1e-9

    def move(self, seconds: int) -> None:
        most = _BALLOON_BPS * seconds
        self.balloon += max(-most, min(most, self.shape.memory - self.balloon))
        self.seen = None

    def vm(self) -> Vm:
        if self.seen is None:
            machine, doing = self.machine, self.doing
            self.seen = Vm(
                machine.name, machine.cpus, machine.memory, doing.sessions, self.shape, self.balloon, doing.used
            )
        return self.seen


class HostRun:
    """One host, from the first midnight on."""

    def __init__(self, number: int, plan: Plan, rule: Rule, figures: Figures, each_second: bool) -> None:
        self._number, self._plan, self._rule, self._figures = number, plan, rule, figures
        self._each_second = each_second
        self._now = 0
        self._own = 0
        nothing = Doing((), 0.0, 0, 0, "")
        self._guests = [_Guest(machine, nothing) for machine in plan.machines]
        self._by_name = {guest.machine.name: guest for guest in self._guests}
        self._is_contended = False
        self._used = 0
        self._load = 0.0
        self._equal: list[tuple[list[float], _Guest, _Guest]] = []
        self._moving: list[_Guest] = []

    def run(self, until: int) -> None:
        """Until that second."""
        events, at, due = self._plan.events, 0, 0.0
        while True:
            now = min(due, self._now + 1) if self._moving or self._each_second else due
            now = min(now, until, events[at][0] if at < len(events) else until)
            self._pass(int(now))
            if now >= until:
                return
            while at < len(events) and events[at][0] == now:
                self._happens(events[at][1], events[at][2])
                at += 1
            due = self._look()

    def _happens(self, which: int, what: Doing | Own) -> None:
        if isinstance(what, Own):
            self._own = what.memory
            return
        guest = self._guests[which]
        if len(what.sessions) != len(guest.doing.sessions):
            self._figures.logins[self._number, guest.machine.name, self._now // 3600] += 1
        guest.doing, guest.seen = what, None

    def _look(self) -> float:
        self._figures.looks += 1
        self._measure()
        free = max(0, self._plan.memory - self._used)
        load = {"cpu": self._load, "memory": 100.0 * min(1.0, self._used / self._plan.memory)}
        vms = [guest.vm() for guest in self._guests]
        seen = Seen(Host(load, free), self._plan.memory, self._used)
        shapes, due = self._rule.shapes(self._now, seen, vms)
        changed = {name: shape for name, shape in shapes.items() if shape != self._by_name[name].shape}
        if changed:
            self._check(changed, vms, free)
        for name, shape in changed.items():
            self._by_name[name].shape, self._by_name[name].seen = shape, None
            self._figures.changes[self._number, name, self._now // 3600] += 1
        self._moving = [guest for guest in self._guests if guest.moves]
        self._distribute()
        return due

    def _measure(self) -> None:
        """Memory and load as they are now."""
        self._used = self._own + sum(min(guest.balloon, guest.doing.used + guest.doing.cache) for guest in self._guests)
        self._load = 100.0 * min(1.0, (_OWN_CPUS + sum(guest.wants for guest in self._guests)) / self._plan.cores)

    def _distribute(self) -> None:
        """The CPU, as the kernel does by weights and caps, until something changes again."""
        guests, cores = self._guests, self._plan.cores - _OWN_CPUS
        wants = [guest.wants for guest in guests]
        self._is_contended = sum(guest.doing.cpus for guest in guests) > cores
        got = shares(cores, wants, [guest.shape.weight for guest in guests]) if sum(wants) > cores else wants
        for guest, cpus in zip(guests, got, strict=True):
            guest.got = cpus
        self._equal = self._equals() if self._is_contended else []

    def _equals(self) -> list[tuple[list[float], _Guest, _Guest]]:
        """Pairs of one size and class in which somebody has less than they want."""
        ranks = classes(_RULES, [guest.vm() for guest in self._guests])
        groups: dict[tuple[int, int], list[_Guest]] = defaultdict(list)
        for guest in self._guests:
            if guest.machine.name in ranks and guest.doing.persona:
                groups[ranks[guest.machine.name], guest.machine.cpus].append(guest)
        return [
            (self._figures.equals[self._number, one.machine.name, other.machine.name], one, other)
            for group in groups.values()
            for at, one in enumerate(group)
            for other in group[at + 1 :]
            if one.lacks or other.lacks
        ]

    def _pass(self, until: int) -> None:
        """Counts what was, from the last look until now, and moves the balloons."""
        seconds, figures = until - self._now, self._figures
        if seconds:
            tick = self._now % DAY // TICK
            figures.memory[tick] += self._used * seconds
            figures.over[tick] += seconds * (self._used > self._plan.memory)
            figures.short_s += seconds * sum(guest.balloon < guest.doing.used for guest in self._guests)
            if self._is_contended:
                figures.contended_s += seconds
                for guest in self._guests:
                    if guest.doing.persona:
                        figures.demanded[guest.doing.persona] += guest.doing.cpus * seconds
                        figures.granted[guest.doing.persona] += guest.got * seconds
                for both, one, other in self._equal:
                    both[0] += seconds
                    both_want = min(one.doing.cpus, other.doing.cpus)
                    both[1] += min(one.got, both_want) * seconds
                    both[2] += min(other.got, both_want) * seconds
            for guest in self._moving:
                guest.move(seconds)
        self._now = until

    def _check(self, changed: dict[str, Shape], vms: Sequence[Vm], free: int) -> None:
        """Notes what may not be: giving what is not there, taking what is used or too soon, passing somebody over."""
        more = {name: shape.memory - self._by_name[name].shape.memory for name, shape in changed.items()}
        given = sum(size for size in more.values() if size > 0)
        coming = sum(max(0, guest.shape.memory - guest.balloon) for guest in self._guests)  # it was given before
        if given and given + coming > free:
            self._fault(f"gave {given} of {free} bytes, of which {coming} were given already")
        for vm in vms:
            if more.get(vm.name, 0) < 0 and changed[vm.name].memory < _floor(vm):
                self._fault(f"{vm.name}: took below its floor")
        if given:
            self._check_turns(changed, vms, more)
        for name, shape in changed.items():
            self._check_times(self._by_name[name], shape)

    def _check_times(self, guest: _Guest, shape: Shape) -> None:
        """Of a VM with sessions nothing is taken soon after something was given, nor soon after the last step."""
        was, cores = guest.shape, guest.machine.cpus
        more = (shape.weight - was.weight, (shape.cpus or cores) - (was.cpus or cores), shape.memory - was.memory)
        if min(more) < 0:
            if guest.doing.sessions and self._now - guest.gave_at < _RULES.hold_s:
                self._fault(f"{guest.machine.name} lost something {self._now - guest.gave_at} s after it got something")
            if guest.doing.sessions and self._now - guest.took_at < _RULES.take_every_s:
                self._fault(f"{guest.machine.name} lost something {self._now - guest.took_at} s after the last time")
            guest.took_at = self._now
        if max(more) > 0:
            guest.gave_at = self._now

    def _check_turns(self, changed: dict[str, Shape], vms: Sequence[Vm], more: dict[str, int]) -> None:
        """Nobody is given memory while one of its class is below its floor, has a smaller part, and gets nothing."""
        ranks = classes(_RULES, vms)
        for vm in vms:
            lacks = self._by_name[vm.name].shape.memory < _floor(vm)
            if not lacks or more.get(vm.name, 0) > 0:
                continue
            has = self._by_name[vm.name].shape.memory / vm.memory
            for other in vms:
                served = more.get(other.name, 0) > 0 and ranks.get(other.name, 0) == ranks.get(vm.name, 0)
                if served and self._by_name[other.name].shape.memory / other.memory > has:
                    self._fault(f"{vm.name} waited for memory while {other.name} got it")

    def _fault(self, what: str) -> None:
        self._figures.faults.append(f"host {self._number}, second {self._now}: {what}")
