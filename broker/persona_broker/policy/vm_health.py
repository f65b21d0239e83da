"""Which VMs are healthy, judged from their last reports: unknown is not healthy, and neither is old."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from persona.health import Bound, Report, Space, VmHealth
from persona.problems import Reason
from persona.shown import amount
from persona.wildcards import matches
from persona_broker.policy.conditions import Unhealthy, Unmet, is_fresh

Past = frozenset[Bound]
Conditions = Mapping[VmHealth, frozenset[str]]  # and the patterns of the VMs that each concerns
MAX_AGE_S = 45.0  # three missed reports
_SHOWN = 3  # failed units in a sentence


@dataclass(frozen=True, slots=True)
class Reported:
    """A VM's last report, when it came by the broker's clock (Unix seconds), and the bounds that it is past."""

    at: float
    report: Report
    past: Past


@dataclass(frozen=True, slots=True)
class _Figure:
    """What a report says of a bound: the worst value, in the bound's unit, and how to say it."""

    value: float
    said: str


def _space(bound: Bound, named: Mapping[str, Space], what: str) -> _Figure | None:
    """The fullest."""
    values = {name: space.free_percent if bound.percent else float(space.free) for name, space in named.items()}
    if not values:
        return None
    name = min(values, key=lambda key: values[key])
    free = f"{values[name]:.0f} %" if bound.percent else amount(values[name])
    return _Figure(values[name], f"{name} has {free} {what}")


def _figure(bound: Bound, report: Report) -> _Figure | None:
    """``None`` where the report cannot tell."""
    match bound.figure.partition("."):
        case ("disk_free", _, _):
            return _space(bound, report.disks, "free")
        case ("memory_available", _, _):
            return None if report.memory is None else _space(bound, {"memory": report.memory}, "available")
        case ("pressure", _, resource):
            percent = report.pressure.get(resource)
            return None if percent is None else _Figure(percent, f"pressure on {resource} is {percent:.0f} %")
        case ("load", _, _):
            load = report.load
            return None if load is None else _Figure(load, f"its load is {load:.2g} a CPU")
        case ("failed_units", _, _) if report.failed_units is not None:
            units = report.failed_units
            more = ", ..." if len(units) > _SHOWN else ""
            named = f" ({', '.join(units[:_SHOWN])}{more})" if units else ""
            return _Figure(len(units), f"{len(units)} units failed{named}")
        case ("errors", _, _) if report.errors is not None:
            return _Figure(report.errors, f"its journal has {report.errors} errors a minute")
        case ("clock_skew", _, _) if report.clock_skew_s is not None:
            skew = report.clock_skew_s
            return _Figure(abs(skew), f"its clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}")
    return None


def _is_past(bound: Bound, value: float, *, was: bool) -> bool:
    number = bound.again if was else bound.number
    return value <= number if bound.above else value >= number


def past_bounds(bounds: Iterable[Bound], report: Report, previous: Past) -> Past:
    """Which bounds count as passed, given which did before.  What is not known is judged when it is asked for."""
    return frozenset(
        bound
        for bound in bounds
        if (figure := _figure(bound, report)) is not None and _is_past(bound, figure.value, was=bound in previous)
    )


def bounds_of(conditions: Iterable[VmHealth]) -> frozenset[Bound]:
    """Every bound that some policy has."""
    return frozenset(bound for condition in conditions for bound in condition.bounds)


def judge(condition: VmHealth, reported: Reported) -> Unmet | None:
    """The first thing that is not as a policy asks, with its value and threshold; ``None`` = healthy."""
    report = reported.report
    for bound in condition.bounds:
        figure = _figure(bound, report)
        if figure is None:
            return _unmet(f"its {_name(bound)} is not known")
        # a bound that is new since the report came is looked at here
        if bound in reported.past or _is_past(bound, figure.value, was=False):
            return _unmet(f"{figure.said}, the policy holds {_range(bound)}")
    for layer in condition.layers:
        if not report.layers.get(layer, False):
            return _unmet(f"layer {layer} of its gate is not active")
    return None


def _unmet(detail: str) -> Unmet:
    return Unmet(Reason.VM_UNHEALTHY, f"the VM is not healthy: {detail}")


def _name(bound: Bound) -> str:
    return bound.figure.replace("_", " ").replace(".", " on ")


def _range(bound: Bound) -> str:
    def said(number: float) -> str:
        if bound.percent or bound.figure.startswith("pressure"):
            return f"{number:.3g} %"
        return amount(number) if bound.above else f"{number:.3g}" + (" s" if bound.figure == "clock_skew" else "")

    side = "above" if bound.above else "below"
    again = f", again {side} {said(bound.again)}" if bound.again != bound.number else ""
    return f"{side} {said(bound.number)}{again}"


class HealthJudge:
    """Judges each report once, and again only when it grows old or the conditions change.

    One per process; holds nothing but what it judged last.
    """

    def __init__(self, max_age_s: float) -> None:
        self._max_age_s = max_age_s
        self._old = _unmet(f"it last reported more than {max_age_s:g} s ago")
        self._conditions: Conditions = {}
        self._judged: dict[str, tuple[Reported, bool, Mapping[VmHealth, Unmet]]] = {}

    def look(self, conditions: Conditions, reports: Mapping[str, Reported], now: float) -> Unhealthy:
        """Of each VM that some condition concerns, what it does not meet; of an unchanged one the same mapping."""
        known = self._judged if conditions is self._conditions else {}
        judged: dict[str, tuple[Reported, bool, Mapping[VmHealth, Unmet]]] = {}
        for vm, reported in reports.items():
            fresh = is_fresh(reported.at, now, self._max_age_s)
            before = known.get(vm)
            if before is not None and before[0] is reported and before[1] is fresh:
                judged[vm] = before
            elif concerning := [condition for condition, globs in conditions.items() if _concerns(globs, vm)]:
                judged[vm] = (reported, fresh, self._judge(concerning, reported, fresh))
        self._conditions, self._judged = conditions, judged
        return {vm: entry[2] for vm, entry in judged.items()}

    def _judge(self, conditions: Iterable[VmHealth], reported: Reported, fresh: bool) -> Mapping[VmHealth, Unmet]:
        found = {condition: judge(condition, reported) if fresh else self._old for condition in conditions}
        return {condition: unmet for condition, unmet in found.items() if unmet is not None}


def _concerns(globs: Iterable[str], vm: str) -> bool:
    return any(matches(vm, glob) for glob in globs)
