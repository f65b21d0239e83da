"""Counters of one worker process, in Prometheus text.

Labelled with the process, so that a sum over workers is honest.
"""

import os
import threading
from collections import Counter

from persona.decisions import Decision, Denied
from persona_broker.state import View

_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1.0)
_lock = threading.Lock()
_decisions: Counter[str] = Counter()
_admissions: Counter[str] = Counter()
_latency = [0] * (len(_BUCKETS_S) + 1)
_latency_sum = 0.0


def decided(decision: Decision, seconds: float) -> None:
    """Counts one decision and its time."""
    global _latency_sum
    outcome = str(decision.reason) if isinstance(decision, Denied) else "granted"
    with _lock:
        _decisions[outcome] += 1
        _latency_sum += seconds
        _latency[next((i for i, edge in enumerate(_BUCKETS_S) if seconds <= edge), len(_BUCKETS_S))] += 1


def admitted(yes: bool) -> None:
    """Counts one admission."""
    with _lock:
        _admissions["admitted" if yes else "refused"] += 1


def render(view: View, lost: int) -> str:
    """All numbers as text, one a line."""
    pid = os.getpid()
    lines = [
        f"persona_broker_generation {view.generation}",
        f"persona_broker_policies {len(view.snapshot.policies)}",
        f"persona_broker_conditions_unmet {len(view.outlook.unmet)}",
        f"persona_broker_records_lost_total {lost}",
    ]
    with _lock:
        lines += [
            f'persona_broker_decisions_total{{outcome="{outcome}",worker="{pid}"}} {count}'
            for outcome, count in sorted(_decisions.items())
        ]
        lines += [
            f'persona_broker_admissions_total{{outcome="{outcome}",worker="{pid}"}} {count}'
            for outcome, count in sorted(_admissions.items())
        ]
        total = 0
        for edge, count in zip((*_BUCKETS_S, "+Inf"), _latency, strict=True):
            total += count
            lines.append(f'persona_broker_decision_seconds_bucket{{le="{edge}",worker="{pid}"}} {total}')
        lines.append(f'persona_broker_decision_seconds_sum{{worker="{pid}"}} {_latency_sum:.6f}')
        lines.append(f'persona_broker_decision_seconds_count{{worker="{pid}"}} {total}')
    return "\n".join(lines) + "\n"
