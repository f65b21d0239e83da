"""What holds right now: the conditions of all policies, judged once a change and not once a request."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from persona.conditions import Hours, Threshold, When
from persona.documents import Policy
from persona.health import VmHealth
from persona.problems import Reason


@dataclass(frozen=True, slots=True)
class Sample:
    """The host's load, percent by metric, taken at ``at`` (Unix seconds) by ``source``."""

    at: float
    load: Mapping[str, float]
    source: str


@dataclass(frozen=True, slots=True)
class Unmet:
    """A condition that does not hold, with the sentence that a refused user reads."""

    reason: Reason
    detail: str


AHEAD_MAX_S = 5.0  # that another machine's clock may be ahead
Latches = frozenset[Threshold]  # the thresholds that count as exceeded


def latch(previous: Latches, thresholds: Iterable[Threshold], sample: Sample) -> Latches:
    """Which thresholds count as exceeded: reached ``below``, and not yet back under ``again_below``.

    A metric that the sample lacks leaves its thresholds as they were.
    """
    return frozenset(
        threshold
        for threshold in thresholds
        if (
            threshold in previous
            if (load := sample.load.get(threshold.metric)) is None
            else load >= (threshold.again_below if threshold in previous else threshold.below)
        )
    )


@dataclass(frozen=True, slots=True)
class ConditionInputs:
    """The inputs of every condition; ``max_age_s`` is how long a sample says anything."""

    sample: Sample | None
    latches: Latches | None  # ``None`` = not known, and so no load is below anything
    now: float  # Unix seconds
    max_age_s: float


def judge(when: When, world: ConditionInputs) -> Unmet | None:
    """The first condition that does not hold on any VM, or ``None``.  Unknown load is not below anything."""
    return judge_load(when, world) or judge_hours(when, world.now)


def judge_load(when: When, world: ConditionInputs) -> Unmet | None:
    """The first threshold of load that is not kept."""
    for threshold in when.host_load:
        unmet = _judge_load(threshold, world)
        if unmet is not None:
            return unmet
    return None


def judge_hours(when: When, now: float) -> Unmet | None:
    """Whether the hours are over; ``now`` in Unix seconds."""
    if when.hours is not None and not _within(when.hours, now):
        return Unmet(Reason.OUTSIDE_HOURS, f"it holds {when.hours.text}")
    return None


def _within(hours: Hours, now: float) -> bool:
    return hours.contains(datetime.fromtimestamp(now, UTC))


def is_fresh(at: float | None, now: float, max_age_s: float) -> bool:
    """Whether what was seen at a moment still says anything; a clock may be ahead by some seconds."""
    return at is not None and -AHEAD_MAX_S <= now - at <= max_age_s


def _judge_load(threshold: Threshold, world: ConditionInputs) -> Unmet | None:
    name = {"cpu": "CPU"}.get(threshold.metric, threshold.metric)
    sample = world.sample
    if sample is None or world.latches is None or threshold.metric not in sample.load:
        return Unmet(Reason.LOAD_UNKNOWN, f"the host's {name} load is not known")
    if not is_fresh(sample.at, world.now, world.max_age_s):
        age_s = world.now - sample.at
        return Unmet(Reason.LOAD_UNKNOWN, f"the host's {name} load was last measured {age_s:.0f} s ago")
    if threshold in world.latches:
        load = sample.load[threshold.metric]
        again = f", again below {threshold.again_below:g} %" if threshold.again_below != threshold.below else ""
        return Unmet(
            Reason.LOAD_EXCEEDS_THRESHOLD,
            f"the host's {name} load is {load:.0f} %, it holds below {threshold.below:g} %{again}",
        )
    return None


Unhealthy = Mapping[str, Mapping[VmHealth, Unmet]]  # by VM that reported, what it does not meet
_UNREPORTED = Unmet(Reason.VM_UNHEALTHY, "how healthy the VM is, is not known: it has not reported yet")


@dataclass(frozen=True, slots=True)
class OnHost:
    """What does not hold on a host, by policy name; an empty ``host`` = nobody knows on which a VM is."""

    host: str
    unmet: Mapping[str, Unmet]


Placed = Mapping[str, OnHost]  # by VM that is bound to a domain


@dataclass(frozen=True, slots=True)
class ConditionState:
    """Which policies' conditions do not hold, as of ``generation``: by policy name, by VM, and by VM on its host.

    ``unmet`` is of VMs that are bound to no domain, by the load of the broker's machine.  ``generations`` are later
    ones that concern a VM alone.
    """

    generation: int
    unmet: Mapping[str, Unmet]
    unhealthy: Unhealthy = field(default_factory=dict)
    placed: Placed = field(default_factory=dict)
    generations: Mapping[str, int] = field(default_factory=dict)

    def generation_for(self, vm: str) -> int:
        """The newest generation that concerns a VM."""
        return self.generations.get(vm, self.generation)

    def unmet_of(self, policy: Policy, vm: str) -> Unmet | None:
        """Why a policy does not hold on a VM; ``None`` = it holds."""
        placed = self.placed.get(vm)
        found = (self.unmet if placed is None else placed.unmet).get(policy.name)
        health = policy.when.vm_health
        if found is not None or health is None:
            return found
        told = self.unhealthy.get(vm)
        return _UNREPORTED if told is None else told.get(health)


def look(
    conditions: Mapping[When, Iterable[str]],
    world: ConditionInputs,
    generation: int,
    unhealthy: Unhealthy | None = None,
    placed: Placed | None = None,
    generations: Mapping[str, int] | None = None,
) -> ConditionState:
    """Judges each condition once, whatever the number of policies (the names) that share it.

    ``unhealthy`` is the word of ``policy.vm_health.HealthJudge`` on the VMs, ``placed`` that of
    ``policy.host_load.HostJudge`` on those that are bound to a domain.
    """
    unmet: dict[str, Unmet] = {}
    for when, names in conditions.items():
        found = judge(when, world)
        if found is not None:
            unmet.update(dict.fromkeys(names, found))
    return ConditionState(generation, unmet, unhealthy or {}, placed or {}, generations or {})


def thresholds(conditions: Iterable[When]) -> frozenset[Threshold]:
    """Every threshold that some condition has."""
    return frozenset(threshold for when in conditions for threshold in when.host_load)
