"""``rollout``: which guests have taken a revision, and how denials moved since."""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from persona.answers import iso, local
from persona.problems import Fault, PersonaError
from persona.shown import line, word
from persona_broker.audit.chain import Chain
from persona_broker.audit.denials import denials
from persona_broker.audit.files import beside
from persona_broker.cli.store import say, with_history
from persona_broker.policy.rollout import Seen, Taken
from persona_broker.settings import Settings
from persona_broker.spread import Spread, spread
from persona_broker.store.interface import ChangeSet

_SAID = {
    Taken.TAKEN: "has it",
    Taken.TOLD: "was told, and has asked nothing since",
    Taken.BEHIND: "does not have it",
    Taken.NEVER: "was never connected",
}


def show(arguments: argparse.Namespace, settings: Settings) -> int:
    """``rollout [REV]``: 0 every guest has it, 1 one does not, or more is denied since than before."""
    store = with_history(settings)
    number = store.revision() if arguments.revision is None else arguments.revision
    change = store.change_set(number)
    if change is None:
        raise PersonaError(Fault.NOT_FOUND, f"there is no revision {number}; the newest is {store.revision()}")
    if change.generation is None:
        why = "an older version of the broker made it, and did not write down when it took effect"
        raise PersonaError(Fault.NOT_FOUND, f"revision {number}: {why}; ask for a later one")
    counted = partial(denials, Chain(beside(Path(settings.db))))
    found = spread(store, counted, change, change.generation, time.time())
    say(arguments, _value(change, found), "\n".join(_lines(change, found)))
    return 1 if found.without or any(item.surge for item in found.denials) else 0


def _value(change: ChangeSet, found: Spread) -> dict[str, Any]:
    guests: list[dict[str, Any]] = []
    for name, state in found.guests.items():
        known = found.seen.get(name, Seen())
        guests.append({"vm": name, "state": state, "told_at": _time(known.told_at), "asked_at": _time(known.asked_at)})
    denials = [
        {"reason": item.reason, "since": item.since, "expected": item.expected, "surge": item.surge}
        for item in found.denials
    ]
    return {
        "revision": change.revision,
        "at": iso(change.at),
        "guests": guests,
        "without": found.without,
        "since_s": round(found.since.seconds, 1),
        "before_s": round(found.before.seconds, 1),
        "denials": denials,
    }


def _time(at: float | None) -> str | None:
    return None if at is None else iso(at)


def _lines(change: ChangeSet, found: Spread) -> Iterator[str]:
    author = word(change.author.name) if change.author.name else "somebody unknown"
    message = f"  {line(change.author.message)}" if change.author.message else ""
    yield f"revision {change.revision}  {local(change.at)}  {author}{message}"
    for name, state in found.guests.items():
        known = found.seen.get(name, Seen())
        last = max((at for at in (known.told_at, known.asked_at) if at is not None), default=None)
        yield f"  {word(name)}  {_SAID[state]}" + (f"  (last heard of {local(last)})" if last is not None else "")
    yield f"guests that have it: {len(found.guests) - len(found.without)} of {len(found.guests)}"
    spans = _span(found.since.seconds), _span(found.before.seconds)
    yield f"denials in the {spans[0]} since, and as many as the {spans[1]} before let expect:"
    for item in found.denials:
        reason = word(item.reason)
        warning = f"  ! a surge: 'persona-broker records tail --reason {reason}' shows them" if item.surge else ""
        yield f"  {reason}: {item.since}, expected {item.expected:g}{warning}"
    if not found.denials:
        yield "  none"


def _span(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
