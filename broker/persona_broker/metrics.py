"""Counters of all workers in one piece of shared memory, shown as Prometheus text.

Each worker adds to a row that only it writes; a scrape sums the rows.  So it says the same whichever
worker answers it, and a worker that dies takes nothing along.
"""

import mmap
import re
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from persona.decisions import Decision, Denied
from persona.problems import Reason
from persona_broker.coverage import Lack
from persona_broker.spread import Spread
from persona_broker.view import View

API_ROWS = range(64)  # one a worker, more than there can be (settings.WORKERS_MAX)
EVENTS_ROWS = range(64, 66)
AUDIT_ROW = 66

_REASON = re.compile(r"[a-z0-9_]{1,64}", re.ASCII)  # a guest's word: no other goes into a label
_OUTCOMES = ("granted", *Reason)
_ADMISSIONS = ("admitted", "refused")
_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1.0, float("inf"))
_AUDIT = ("audit kept", "audit conflicts", "audit refused", "audit dropped")
SINKS = ("journald", "syslog", "json_lines")
_OF_SINKS = tuple(f"{sink} {what}" for sink in SINKS for what in ("in use", "failing", "number"))
# which go with the process that said so
_LEVELS = ("streams", "audit failing", "audit number", "audit missing", "checkpoint seconds", *_OF_SINKS)
_names = (*_OUTCOMES, *_ADMISSIONS, *_BUCKETS_S, "nanoseconds", *_AUDIT, *_LEVELS)
_cell: dict[str | float, int] = {name: index for index, name in enumerate(_names)}
_memory = memoryview(mmap.mmap(-1, (AUDIT_ROW + 1) * len(_cell) * 8)).cast("Q")  # made before the workers fork
_lock = threading.Lock()  # threads of one worker; no worker waits for another
_begin = 0


def use_row(row: int) -> None:
    """From now on this process counts there, on top of what a predecessor counted."""
    global _begin
    _begin = row * len(_cell)
    for level in _LEVELS:
        _memory[_begin + _cell[level]] = 0  # no count: it went with the predecessor


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


def audited(kept: int, conflicts: int) -> None:
    """Counts records that are in the audit, and numbers of guests that came with two contents."""
    with _lock:
        _memory[_begin + _cell["audit kept"]] += kept
        _memory[_begin + _cell["audit conflicts"]] += conflicts


def audit_refused(count: int) -> None:
    """Counts records that guests have to keep, because the audit cannot be written."""
    with _lock:
        _memory[_begin + _cell["audit refused"]] += count


def audit_dropped(count: int) -> None:
    """Counts records that were dropped for that."""
    with _lock:
        _memory[_begin + _cell["audit dropped"]] += count


def audit_failing(failing: bool) -> None:
    """Notes whether this process could write the audit when it last tried."""
    _memory[_begin + _cell["audit failing"]] = int(failing)


def audit_number(number: int) -> None:
    """The number of the newest record, as the audit's own process last saw it."""
    _memory[_begin + _cell["audit number"]] = number


def audit_missing(count: int) -> None:
    """How many numbers of guests never came, as the audit's own process last saw it."""
    _memory[_begin + _cell["audit missing"]] = count


def checkpoint_made(at: float) -> None:
    """When the newest checkpoint was made (Unix seconds)."""
    _memory[_begin + _cell["checkpoint seconds"]] = int(at)


def sink(name: str, failing: bool, number: int) -> None:
    """How a sink does; ``number`` is the newest record that arrived there, -1 = as before."""
    _memory[_begin + _cell[f"{name} in use"]] = 1
    _memory[_begin + _cell[f"{name} failing"]] = int(failing)
    if number >= 0:
        _memory[_begin + _cell[f"{name} number"]] = number


def failing_sinks() -> list[str]:
    """The sinks that did not work when they were last tried."""
    return [name for name in SINKS if any(_memory[_cell[f"{name} failing"] :: len(_cell)])]


def is_audit_failing() -> bool:
    """Whether a process of this broker could not write the audit when it last tried."""
    return any(_memory[_cell["audit failing"] :: len(_cell)])


def render(view: View, lost: int, spread: Spread | None) -> str:
    """All numbers of this broker as text; ``spread`` is that of the newest change-set."""
    return "\n".join([*_lines(view, lost), *_spread(spread)]) + "\n"


_PREFIX = "persona_broker_"
# Every metric: its type and what it says, for whoever builds an alert or a chart on it.
METRICS = {
    "generation": ("gauge", "Number of the newest change that can change a decision."),
    "policies": ("gauge", "Applied policies that can be read."),
    "conditions_unmet": ("gauge", "Policies whose conditions of load or time do not hold now."),
    "documents_unreadable": ("gauge", "Applied documents that cannot be read and grant nothing; check names them."),
    "streams": ("gauge", "Open event streams; each running guest has one."),
    "records_lost_total": ("counter", "Records of decisions that guests could not keep until they were sent."),
    "audit_records_total": ("counter", "Records of guests that are in the audit, each counted once."),
    "audit_conflicts_total": ("counter", "Numbers of guests that came again with another content."),
    "audit_refused_total": ("counter", "Records that guests had to keep, because the audit could not be written."),
    "audit_dropped_total": ("counter", "Records that were dropped, because the audit could not be written."),
    "audit_failing": ("gauge", "Whether the audit could not be written when it was last tried (1)."),
    "audit_missing": ("gauge", "Numbers of guests that never came and no guest explains; audit gaps lists them."),
    "audit_checkpoint_age_seconds": ("gauge", "Seconds since a checkpoint was made; without new records none is."),
    "audit_sink_failing": ("gauge", "Whether a sink did not work when it was last tried (1)."),
    "audit_sink_waiting": ("gauge", "Records that a sink did not get yet."),
    "load_sample_age_seconds": ("gauge", "Seconds since the load of the host was sampled."),
    "load_percent": ("gauge", "Load of the host when it was last sampled."),
    "host_sample_age_seconds": ("gauge", "Seconds since a host was sampled by persona-host."),
    "host_load_percent": ("gauge", "Load of a host when it was last sampled."),
    "coverage_gaps": ("gauge", "Domains without an agent, agents without a domain, and so on; coverage names them."),
    "health_report_age_seconds": ("gauge", "Seconds since a VM last reported its health."),
    "vm_layer_active": ("gauge", "Whether a layer of a VM's gate is active (1) or not (0)."),
    "vm_conditions_unmet": ("gauge", "Conditions of health that policies ask of a VM and it does not meet."),
    "guests_behind": ("gauge", "Guests that do not have the newest change of documents; rollout names them."),
    "denials_surge": ("gauge", "Denials beyond what is expected, by reason, since the newest change of documents."),
    "decisions_total": ("counter", "Decisions on program starts: granted, or the reason of the denial."),
    "admissions_total": ("counter", "Logins that guests asked about: admitted or refused."),
    "decision_seconds": ("histogram", "Time to answer one question about a program start."),
}


def _lines(view: View, lost: int) -> Iterator[str]:
    sums = {name: sum(_memory[index :: len(_cell)]) for name, index in _cell.items()}
    yield from _one("generation", view.generation)
    yield from _one("policies", len(view.snapshot.policies))
    yield from _one("conditions_unmet", len(view.condition_state.unmet))
    yield from _unreadable(view)
    yield from _one("streams", sums["streams"])
    yield from _one("records_lost_total", lost)
    for cell, name in zip(_AUDIT, ("records", "conflicts", "refused", "dropped"), strict=True):
        yield from _one(f"audit_{name}_total", sums[cell])
    yield from _one("audit_failing", int(is_audit_failing()))
    yield from _one("audit_missing", sums["audit missing"])
    yield from _head("audit_checkpoint_age_seconds")
    if sums["checkpoint seconds"]:
        yield f"{_PREFIX}audit_checkpoint_age_seconds {time.time() - sums['checkpoint seconds']:.3f}"
    used = [name for name in SINKS if sums[f"{name} in use"]]
    yield from _head("audit_sink_failing")
    for name in used:
        yield f'{_PREFIX}audit_sink_failing{{sink="{name}"}} {sums[f"{name} failing"]}'
    yield from _head("audit_sink_waiting")
    for name in used:
        waiting = max(0, sums["audit number"] - sums[f"{name} number"])
        yield f'{_PREFIX}audit_sink_waiting{{sink="{name}"}} {waiting}'
    if view.sample is not None:
        yield from _one("load_sample_age_seconds", round(time.time() - view.sample.at, 3))
        yield from _head("load_percent")
        for metric, percent in view.sample.load.items():
            yield f'{_PREFIX}load_percent{{metric="{metric}"}} {percent:g}'
    yield from _hosts(view)
    yield from _health(view)
    for name, outcomes in (("decisions_total", _OUTCOMES), ("admissions_total", _ADMISSIONS)):
        yield from _head(name)
        for outcome in outcomes:
            if sums[outcome]:
                yield f'{_PREFIX}{name}{{outcome="{outcome}"}} {sums[outcome]}'
    yield from _head("decision_seconds")
    total = 0
    for edge in _BUCKETS_S:
        total += sums[edge]
        label = "+Inf" if edge == float("inf") else f"{edge:g}"
        yield f'{_PREFIX}decision_seconds_bucket{{le="{label}"}} {total}'
    yield f"{_PREFIX}decision_seconds_sum {sums['nanoseconds'] / 1e9:.9f}"
    yield f"{_PREFIX}decision_seconds_count {total}"


def _unreadable(view: View) -> Iterator[str]:
    """How many applied documents cannot be read, 0 too, so that an alert can be on it; each by name in ``check``."""
    yield from _head("documents_unreadable")
    kinds = [item.kind if item.kind in ("Persona", "Policy") else "other" for item in view.snapshot.unreadable]
    for kind in ("Persona", "Policy", "other"):
        count = kinds.count(kind)
        yield f'{_PREFIX}documents_unreadable{{kind="{kind}"}} {count}'


def _spread(spread: Spread | None) -> Iterator[str]:
    """Nothing where it is not known; each reason of denials that surge."""
    if spread is None:
        return
    yield from _one("guests_behind", len(spread.without))
    yield from _head("denials_surge")
    for item in spread.denials:
        if item.surge and _REASON.fullmatch(item.reason):
            yield f'{_PREFIX}denials_surge{{reason="{item.reason}"}} {item.since - item.expected:g}'


def _hosts(view: View) -> Iterator[str]:
    """Of the hosts that persona-host watches; a host's name has no character that a label would need to escape."""
    now = time.time()
    yield from _head("host_sample_age_seconds")
    for name, host in view.hosts.items():
        yield f'{_PREFIX}host_sample_age_seconds{{host="{name}"}} {now - host.sample.at:.3f}'
    yield from _head("host_load_percent")
    for name, host in view.hosts.items():
        for metric, percent in host.sample.load.items():
            yield f'{_PREFIX}host_load_percent{{host="{name}",metric="{metric}"}} {percent:g}'
    yield from _head("coverage_gaps")
    counted = Counter(gap.lack for gap in view.gaps(now))
    for lack in Lack:
        yield f'{_PREFIX}coverage_gaps{{lack="{lack}"}} {counted[lack]}'


def _health(view: View) -> Iterator[str]:
    """Of the VMs that report; a name of a VM has no character that a label would need to escape."""
    yield from _head("health_report_age_seconds")
    for vm, reported in view.health.items():
        yield f'{_PREFIX}health_report_age_seconds{{vm="{vm}"}} {time.time() - reported.at:.3f}'
    yield from _head("vm_layer_active")
    for vm, reported in view.health.items():
        for layer, active in reported.report.layers.items():
            yield f'{_PREFIX}vm_layer_active{{vm="{vm}",layer="{layer}"}} {int(active)}'
    yield from _head("vm_conditions_unmet")
    for vm, unmet in view.condition_state.unhealthy.items():
        yield f'{_PREFIX}vm_conditions_unmet{{vm="{vm}"}} {len(unmet)}'


def _one(name: str, value: float) -> Iterator[str]:
    yield from _head(name)
    yield f"{_PREFIX}{name} {value}"


def _head(name: str) -> Iterator[str]:
    kind, text = METRICS[name]
    yield f"# HELP {_PREFIX}{name} {text}"
    yield f"# TYPE {_PREFIX}{name} {kind}"
