"""What a guest delivers, at least once each: what is kept of it, and what of it came before."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from persona.json_fields import CodecError
from persona.record_codec import decode_record
from persona_broker.audit.core.events import event
from persona_broker.audit.core.format import Entry, Row, Stream, joined, to_json
from persona_broker.audit.segment import Writer


@dataclass(frozen=True, slots=True)
class Delivery:
    """The records of one call.  ``stream`` is ``None`` for guests that do not number them.

    ``lost``: how many it says that it lost, and ``refused`` how many were none, where the guest does not hear of that.
    """

    guest: str
    entries: Sequence[Entry]
    stream: Stream | None = None
    lost: int = 0
    refused: int = 0
    refused_why: str = ""


@dataclass(frozen=True, slots=True)
class Kept:
    """What became of a delivery; ``conflicts`` are numbers that came before with another content.

    ``lost``: how many numbers the guest says that it dropped, in markers that are new.
    """

    kept: int
    again: int
    conflicts: tuple[int, ...] = ()
    lost: int = 0


Earlier = Callable[[str, Stream, int], Iterable[Row]]  # what other segments have under a number, the newest first


def deliver(writer: Writer, delivery: Delivery, at_us: int, earlier: Earlier) -> Kept:
    """Appends what is new.  A number that came with the same content counts once; another is kept and marked."""
    kept = again = lost = 0
    conflicts: list[int] = []
    state = writer.state(delivery.guest, delivery.stream) if delivery.stream is not None else None
    for entry in delivery.entries:
        if state is None or entry.counter is None:
            writer.add(entry._replace(counter=None), at_us, delivery.guest)
            kept += 1
            continue
        counter: int = entry.counter
        received = state.received
        if received.has(counter):
            before = chain(writer.find(state, counter), earlier(state.guest, state.stream, counter))
            contradicted = _contradicted(entry, before)
            if contradicted is None:
                again += 1
                continue
            conflicts.append(counter)
            writer.conflict(state)
            entry = entry._replace(facts=_marked(entry.facts, contradicted))
        else:
            received.add(counter)
        if entry.marker is not None:
            received.explain(entry.marker.first, entry.marker.last, entry.marker.why)
            lost += entry.marker.count
        writer.add(entry, at_us, delivery.guest, state)
        kept += 1
    at = at_us / 1e6
    if delivery.lost:
        writer.add(event("records_lost", at, vm=delivery.guest, count=delivery.lost), at_us)
    if delivery.refused:
        why = delivery.refused_why
        writer.add(event("records_refused", at, vm=delivery.guest, count=delivery.refused, detail=why), at_us)
    return Kept(kept, again, tuple(conflicts), lost)


def _contradicted(entry: Entry, before: Iterable[Row]) -> int | None:
    """The first record with its number, where none is the same; what was pruned meanwhile is taken for the same."""
    first: int | None = None
    for row in before:
        if _same(row, entry):
            return None
        first = row.number if first is None else min(first, row.number)
    return first


def _same(row: Row, entry: Entry) -> bool:
    """Whether a record came before; also where another version of the broker wrote it in other words."""
    if row.facts == entry.facts and row.person in (entry.person, None):  # an erased one cannot be compared further
        return True
    old, new = _record(joined(row.facts, row.person)), _record(joined(entry.facts, entry.person))
    return old is not None and old == new


def _record(value: dict[str, Any]) -> object:
    value.pop("conflict_with", None)
    try:
        return decode_record(value)
    except CodecError:
        return None


def _marked(facts: str, number: int) -> str:
    return to_json({**json.loads(facts), "conflict_with": number})
