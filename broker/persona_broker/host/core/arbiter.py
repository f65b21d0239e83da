"""What each VM of one host is to have: weight, CPU cap and memory, by the personas of its live sessions.  Pure.

The rules, in the order in which they win:

1. A VM without live sessions gets its baseline back, without waiting, as far as the host has the memory.
2. Without contention the limits of its sessions' personas, together, cap a VM.
3. Under contention a VM with a higher priority gains at the cost of those with a lower one.  Priorities that differ
   by ``gap`` or less are equal, and equals take nothing from each other.  Only sessions that do something have a
   priority: a VM whose sessions all do nothing is one of the lowest class, and one without sessions has rule 1.
4. What is given is given soon, weight and cap at once and memory in steps of a second; what is taken is taken slowly,
   in steps, never below the floor, not while what was given is younger than ``hold_s``, and the next step only after
   the last one was seen to work.
5. Who has a lower priority gets back only what leaves the host halfway below where memory counts as short: else it
   would be taken again.

Units: cores, bytes, percent, seconds (monotonic).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

WEIGHT = 100  # of a VM that nobody shapes
_CLASS_FACTOR = 4  # between neighbouring classes: at least twice the CPU, whatever else runs on the same cores
_WEIGHT_MAX = 6400
_QUANTUM = 64 << 20  # in which memory is given and taken: what a VM uses changes all the time
_SEEN = 0.02  # of a VM's memory, by which a balloon may miss its target


@dataclass(frozen=True, slots=True)
class Rules:
    """How contention is told, and how quickly the arbiter acts on it."""

    gap: int = 10  # of priorities
    cpu_enter: float = 90.0
    cpu_leave: float = 75.0
    memory_enter: float = 90.0
    memory_leave: float = 80.0
    enter_hold_s: float = 2.0
    leave_hold_s: float = 30.0
    hold_s: float = 60.0  # after something was given, before any of it is taken
    idle_s: float = 600.0  # a session that does nothing for so long holds no priority
    take_every_s: float = 10.0
    cpu_step: float = 0.25  # of a VM's cores, that are taken at once
    memory_step: float = 0.1  # of a VM's memory
    settle_s: float = 30.0  # in which a step must be seen to work
    memory_floor: float = 0.5  # of a VM's memory
    memory_beside: int = 256 << 20  # for a VM, beside what it uses or its sessions may use
    cpu_beside: float = 0.2  # for what runs outside of sessions
    host_reserve: int = 512 << 20


@dataclass(frozen=True, slots=True)
class LiveSession:
    """What matters here of a session's persona; ``None`` = not limited."""

    priority: int
    cpus: float | None = None
    memory: int | None = None
    idle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Shape:
    """What is, or is to be, in force for a VM; no cap is ``None``."""

    weight: int
    cpus: float | None
    memory: int


@dataclass(frozen=True, slots=True)
class Vm:
    """One VM as it is defined and as it was seen.

    ``in_force`` was read back from the hypervisor, ``balloon`` is the memory that it has now, ``used`` what it uses
    of it by its own agent.  ``None`` = not known.  ``left_alone`` says why nobody may shape it, where that is so.
    """

    name: str
    cpus: int
    memory: int
    sessions: tuple[LiveSession, ...] = ()
    in_force: Shape | None = None
    balloon: int | None = None
    used: int | None = None
    left_alone: str = ""

    @property
    def baseline(self) -> Shape:
        """What its definition says."""
        return Shape(WEIGHT, None, self.memory)

    def floor(self, rules: Rules) -> int:
        """The least memory that it is left with; all of it where nobody knows what it uses."""
        if self.used is None:
            return self.memory
        return min(self.memory, max(int(self.memory * rules.memory_floor), _rounded(self.used + rules.memory_beside)))


def _rounded(size: int) -> int:
    return -(-size // _QUANTUM) * _QUANTUM


@dataclass(frozen=True, slots=True)
class Host:
    """``load`` in percent by metric, of those that are known; ``free`` is ``None`` where that is not."""

    load: Mapping[str, float]
    free: int | None


@dataclass(frozen=True, slots=True)
class Contention:
    """Whether CPU or memory is contended, and since when (seconds) the load says the contrary."""

    holds: bool = False
    contrary_since: float | None = None

    def after(self, load: float | None, enter: float, leave: float, now: float, rules: Rules) -> "Contention":
        """As of now.  A load that is not known is neither high nor low."""
        contrary = load is not None and (load <= leave if self.holds else load >= enter)
        if not contrary:
            return Contention(self.holds)
        since = now if self.contrary_since is None else self.contrary_since
        hold_s = rules.leave_hold_s if self.holds else rules.enter_hold_s
        return Contention(not self.holds) if now - since >= hold_s else Contention(self.holds, since)


@dataclass(frozen=True, slots=True)
class Past:
    """What was done with a VM: when something was last given and taken, and the memory that was last asked for."""

    gave_at: float | None = None
    took_at: float | None = None
    asked: int | None = None
    asked_at: float = 0.0
    is_stuck: bool = False


_NEW = Past()


@dataclass(frozen=True, slots=True)
class Kept:
    """What one call leaves for the next."""

    cpu: Contention = Contention()
    memory: Contention = Contention()
    past: Mapping[str, Past] = field(default_factory=dict)


class Why(StrEnum):
    """Why a VM is to have what the plan says."""

    NO_SESSIONS = "no_sessions"
    PERSONAS = "personas"
    CONTENTION = "contention"
    NO_PROGRESS = "no_progress"
    LEFT_ALONE = "left_alone"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Target:
    """What a VM is to have; ``None`` = nothing is done, and ``why`` says why not."""

    shape: Shape | None
    why: Why
    detail: str = ""


def arbitrate(rules: Rules, now: float, host: Host, vms: Sequence[Vm], kept: Kept) -> tuple[dict[str, Target], Kept]:
    """The targets by VM, and what to keep for the next call."""
    cpu = kept.cpu.after(host.load.get("cpu"), rules.cpu_enter, rules.cpu_leave, now, rules)
    memory = kept.memory.after(host.load.get("memory"), rules.memory_enter, rules.memory_leave, now, rules)
    ranks = classes(rules, vms)
    highest = max(ranks.values(), default=0)
    shaper = _Shaper(rules, now, _Room(rules, host, vms))
    targets: dict[str, Target] = {}
    past: dict[str, Past] = {}
    for vm in sorted(vms, key=lambda vm: (-ranks.get(vm.name, 0), _satisfied(vm), vm.name)):
        was, rank = kept.past.get(vm.name, _NEW), ranks.get(vm.name, 0)
        if vm.in_force is None or vm.left_alone:
            why = Why.LEFT_ALONE if vm.left_alone else Why.UNKNOWN
            targets[vm.name], past[vm.name] = Target(None, why, vm.left_alone), was
            continue
        gives_way = memory.holds and rank < highest and bool(vm.sessions)
        wanted = _wanted(rules, vm, rank if cpu.holds else 0, gives_way)
        if rank < highest and vm.sessions:
            wanted = shaper.bearable(vm, vm.in_force, wanted)
        shape, was = shaper.step(vm, vm.in_force, wanted, rank, was)
        targets[vm.name] = Target(shape, _why(vm, shape, was, gives_way))
        past[vm.name] = was
    return targets, Kept(cpu, memory, past)


def classes(rules: Rules, vms: Iterable[Vm]) -> dict[str, int]:
    """The class of each VM that has a priority, the lowest is 0.

    A new one begins only above a gap: no two whose priorities differ by less are ever told apart.
    """
    priorities = {vm.name: max(active) for vm in vms if (active := _active(rules, vm))}
    ranks: dict[str, int] = {}
    rank, before = 0, None
    for name, priority in sorted(priorities.items(), key=lambda item: item[1]):
        if before is not None and priority - before > rules.gap:
            rank += 1
        ranks[name], before = rank, priority
    return ranks


def _active(rules: Rules, vm: Vm) -> list[int]:
    return [session.priority for session in vm.sessions if session.idle_s < rules.idle_s]


def _wanted(rules: Rules, vm: Vm, rank: int, gives_way: bool) -> Shape:
    """What it would have at once, if nobody had to be careful."""
    if not vm.sessions:
        return vm.baseline
    weight = min(_WEIGHT_MAX, WEIGHT * _CLASS_FACTOR**rank)
    cpus = _sum(session.cpus for session in vm.sessions)
    cap = None if cpus is None or cpus + rules.cpu_beside >= vm.cpus else cpus + rules.cpu_beside
    memory = 0 if gives_way else _sum(session.memory for session in vm.sessions)
    size = vm.memory if memory is None else min(vm.memory, _rounded(int(memory) + rules.memory_beside))
    return Shape(weight, cap, max(size, vm.floor(rules)))


def _why(vm: Vm, shape: Shape, was: Past, gives_way: bool) -> Why:
    if was.is_stuck:
        return Why.NO_PROGRESS
    if not vm.sessions:
        return Why.NO_SESSIONS
    return Why.CONTENTION if gives_way or shape.weight != WEIGHT else Why.PERSONAS


def _sum(values: Iterable[float | None]) -> float | None:
    found = list(values)
    return None if None in found else sum(value for value in found if value is not None)


def _satisfied(vm: Vm) -> float:
    return 1.0 if vm.in_force is None else vm.in_force.memory / vm.memory


class _Room:
    """The memory that may be given in one round, to higher classes first: lower ones have what those do not lack."""

    def __init__(self, rules: Rules, host: Host, vms: Iterable[Vm]) -> None:
        coming = sum(  # it was given, and is not taken up yet
            max(0, vm.in_force.memory - vm.balloon) for vm in vms if vm.in_force is not None and vm.balloon is not None
        )
        self._left = 0 if host.free is None else max(0, host.free - rules.host_reserve - coming)
        self._spare = min(self._left, _spare(rules, host) - coming)
        self._owed = 0  # bytes that VMs of this rank still miss: none of them is for a lower one
        self._rank: int | None = None

    @property
    def spare(self) -> int:
        """What can be given without making the host short."""
        return max(0, self._spare) // _QUANTUM * _QUANTUM

    def give(self, rank: int, missing: int, step: int) -> int:
        """Bytes for a VM that misses so many, one step at most; asked in the order of the ranks, the highest first."""
        if rank != self._rank:
            self._left, self._owed, self._rank = max(0, self._left - self._owed), 0, rank
        given = min(missing, step)
        if given > self._left:
            # the rest is nobody's: else an equal that has more, and lacks only a little, would get it
            given = self._left = self._left // _QUANTUM * _QUANTUM
        self._left -= given
        self._spare -= given
        self._owed += missing - given
        return given


def _spare(rules: Rules, host: Host) -> int:
    """How much less than its free memory a host may have before it is halfway to being short."""
    load, free = host.load.get("memory"), host.free or 0
    if load is None:
        return free
    if load >= 100:
        return 0
    keep = 1 - (rules.memory_enter + rules.memory_leave) / 200
    return free - int(keep * free / (1 - load / 100))


class _Shaper:
    """Goes as far towards what is wanted as may be gone now."""

    def __init__(self, rules: Rules, now: float, room: _Room) -> None:
        self._rules = rules
        self._now = now
        self._room = room

    def bearable(self, vm: Vm, have: Shape, wanted: Shape) -> Shape:
        """The same with no more memory than it needs, or than makes the host short."""
        if wanted.memory <= have.memory:
            return wanted
        most = max(vm.floor(self._rules), have.memory + self._room.spare)
        return replace(wanted, memory=min(wanted.memory, most))

    def step(self, vm: Vm, have: Shape, wanted: Shape, rank: int, was: Past) -> tuple[Shape, Past]:
        """What the VM is to have now, and what is to be known of that later."""
        if have == wanted and was.asked is None:
            return have, was
        was = self._seen(vm, was)
        may_take = not vm.sessions or self._may_take(was)
        shape = Shape(
            wanted.weight if may_take else max(wanted.weight, have.weight),
            self._cap(vm, have.cpus, wanted.cpus, may_take),
            self._size(vm, have.memory, wanted.memory, rank, may_take and was.asked is None),
        )
        if shape.memory != have.memory:
            was = replace(was, asked=shape.memory, asked_at=self._now)
        changes = _changes(vm, have, shape)
        if any(change > 0 for change in changes):
            was = replace(was, gave_at=self._now)
        if any(change < 0 for change in changes):
            was = replace(was, took_at=self._now)
        return shape, was

    def _seen(self, vm: Vm, was: Past) -> Past:
        """Whether the last step for the memory was seen to work, or had its time."""
        if was.asked is None:
            return was
        if vm.balloon is not None and abs(vm.balloon - was.asked) <= _SEEN * vm.memory:
            return replace(was, asked=None, is_stuck=False)
        return replace(was, is_stuck=was.is_stuck or self._now - was.asked_at > self._rules.settle_s)

    def _may_take(self, was: Past) -> bool:
        is_settled = was.gave_at is None or self._now - was.gave_at >= self._rules.hold_s
        return is_settled and (was.took_at is None or self._now - was.took_at >= self._rules.take_every_s)

    def _cap(self, vm: Vm, have: float | None, wanted: float | None, may_take: bool) -> float | None:
        has, wants = _cores(vm, have), _cores(vm, wanted)
        if wants >= has or not vm.sessions:
            return wanted
        return max(wants, has - self._rules.cpu_step * vm.cpus) if may_take else have

    def _size(self, vm: Vm, have: int, wanted: int, rank: int, may_take: bool) -> int:
        step, lacks = int(self._rules.memory_step * vm.memory), wanted - have
        if abs(lacks) < step + _QUANTUM:  # take a small rest along: it is not worth another step
            step = abs(lacks)
        if lacks > 0:
            return have + self._room.give(rank, lacks, step)
        # less than that is not worth a change: what a VM uses goes up and down
        return have - step if may_take and -lacks > _QUANTUM else have


def _cores(vm: Vm, cap: float | None) -> float:
    return vm.cpus if cap is None else cap


def _changes(vm: Vm, before: Shape, after: Shape) -> tuple[float, float, float]:
    """By how much each is more than before."""
    cpus = _cores(vm, after.cpus) - _cores(vm, before.cpus)
    return after.weight - before.weight, cpus, after.memory - before.memory
