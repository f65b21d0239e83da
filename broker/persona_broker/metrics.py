"""Counters of all workers in one piece of shared memory, shown as Prometheus text.

Each worker adds to a row that only it writes; a scrape sums the rows.  So it says the same whichever
worker answers it, and a worker that dies takes nothing along.
"""

import mmap
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator

from persona.decisions import Decision, Denied
from persona.problems import Reason
from persona_broker.state import View

API_ROWS = range(64)  # one a worker, more than there can be (settings.WORKERS_MAX)
EVENTS_ROWS = range(64, 66)

_OUTCOMES = ("granted", *Reason)
_ADMISSIONS = ("admitted", "refused")
_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1.0, float("inf"))
_names = (*_OUTCOMES, *_ADMISSIONS, *_BUCKETS_S, "nanoseconds", "streams")
_cell: dict[str | float, int] = {name: index for index, name in enumerate(_names)}
_memory = memoryview(mmap.mmap(-1, EVENTS_ROWS.stop * len(_cell) * 8)).cast("Q")  # made before the workers fork
_lock = threading.Lock()  # threads of one worker; no worker waits for another
_begin = 0


def use_row(row: int) -> None:
    """From now on this process counts there, on top of what a predecessor counted."""
    global _begin
    _begin = row * len(_cell)
    _memory[_begin + _cell["streams"]] = 0  # a level, not a count: it went with the predecessor


def decided(decision: Decision, seconds: float) -> None:
    """Counts one decision and its time."""
    outcome = decision.reason if isinstance(decision, Denied) else "granted"
    bucket = _BUCKETS_S[bisect_left(_BUCKETS_S, seconds)]
    with _lock:
        _memory[_begin + _cell[outcome]] += 1
        _memory[_begin + _cell[bucket]] += 1
        _memory[_begin + _cell["nanoseconds"]] += int(seconds * 1e9)


def admitted(yes: bool) -> None:
    """Counts one admission."""
    with _lock:
        _memory[_begin + _cell["admitted" if yes else "refused"]] += 1


def streams(count: int) -> None:
    """How many event streams are open."""
    _memory[_begin + _cell["streams"]] = count


def render(view: View, lost: int) -> str:
    """All numbers of this broker as text."""
    return "\n".join(_lines(view, lost)) + "\n"


def _lines(view: View, lost: int) -> Iterator[str]:
    sums = {name: sum(_memory[index :: len(_cell)]) for name, index in _cell.items()}
    yield from _one("generation", "gauge", view.generation)
    yield from _one("policies", "gauge", len(view.snapshot.policies))
    yield from _one("conditions_unmet", "gauge", len(view.outlook.unmet))
    yield from _one("streams", "gauge", sums["streams"])
    yield from _one("records_lost_total", "counter", lost)
    if view.sample is not None:
        yield from _one("load_sample_age_seconds", "gauge", round(time.time() - view.sample.at, 3))
        yield "# TYPE persona_broker_load_percent gauge"
        for metric, percent in view.sample.load.items():
            yield f'persona_broker_load_percent{{metric="{metric}"}} {percent:g}'
    yield from _health(view)
    for name, outcomes in (("decisions_total", _OUTCOMES), ("admissions_total", _ADMISSIONS)):
        yield f"# TYPE persona_broker_{name} counter"
        for outcome in outcomes:
            if sums[outcome]:
                yield f'persona_broker_{name}{{outcome="{outcome}"}} {sums[outcome]}'
    yield "# TYPE persona_broker_decision_seconds histogram"
    total = 0
    for edge in _BUCKETS_S:
        total += sums[edge]
        label = "+Inf" if edge == float("inf") else f"{edge:g}"
        yield f'persona_broker_decision_seconds_bucket{{le="{label}"}} {total}'
    yield f"persona_broker_decision_seconds_sum {sums['nanoseconds'] / 1e9:.9f}"
    yield f"persona_broker_decision_seconds_count {total}"


def _health(view: View) -> Iterator[str]:
    """Of the VMs that report; a name of a VM has no character that a label would need to escape."""
    yield "# TYPE persona_broker_health_report_age_seconds gauge"
    for vm, reported in view.health.items():
        yield f'persona_broker_health_report_age_seconds{{vm="{vm}"}} {time.time() - reported.at:.3f}'
    yield "# TYPE persona_broker_vm_layer_active gauge"
    for vm, reported in view.health.items():
        for layer, active in reported.report.layers.items():
            yield f'persona_broker_vm_layer_active{{vm="{vm}",layer="{layer}"}} {int(active)}'
    yield "# TYPE persona_broker_vm_conditions_unmet gauge"
    for vm, unmet in view.outlook.unhealthy.items():
        yield f'persona_broker_vm_conditions_unmet{{vm="{vm}"}} {len(unmet)}'


def _one(name: str, kind: str, value: float) -> Iterator[str]:
    yield f"# TYPE persona_broker_{name} {kind}"
    yield f"persona_broker_{name} {value}"
