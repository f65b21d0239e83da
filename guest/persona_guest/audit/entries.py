"""One record as it waits in the spool: with its number, as JSON, and as a frame of a segment."""

import json
import time
from dataclasses import dataclass
from typing import Any

from persona import wire
from persona.json_fields import CodecError
from persona.record_codec import Record, Stream, encode_record, record_for
from persona_guest.audit import records, spool_format
from persona_guest.audit.segments import Segment
from persona_guest.audit.spool_format import Held

# Why records are lost; docs/protocol.md.
SPOOL_FULL, QUEUE_FULL, REFUSED, AGENT_ENDED, DAMAGED = (
    "spool_full", "queue_full", "refused", "agent_ended", "damaged",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One record that waits: its number, its JSON, and what it takes of whose room."""

    number: int
    value: dict[str, Any]
    size: int
    held: Held

    @property
    def lost(self) -> tuple[int, int] | None:
        """The first and the last number of what it says is lost, where it is a marker."""
        lost = self.value.get("lost")
        return None if lost is None else (lost["first"], lost["last"])


@dataclass(frozen=True, slots=True)
class Batch:
    """The oldest records that wait, of one stream; ``end`` is where they end in the file ``segment``."""

    stream: Stream
    entries: tuple[Entry, ...]
    segment: Segment | None
    end: int


def _is_start(value: dict[str, Any]) -> bool:
    """Whether something started: also what complain mode let go on, which is no denial that room is kept for."""
    return bool(value["event"] == "exec" and (value["decision"] == "granted" or value["complain"]))


def entry_of(record: Record) -> tuple[Entry, bytes]:
    value = encode_record(record)
    frame = spool_format.frame(json.dumps(value, separators=(",", ":")).encode())
    return Entry(record.number, value, len(frame), (record.user, _is_start(value))), frame


def read_entry(payload: bytes) -> Entry:
    """A record from a segment, such as any broker can be told.  Raises ``ValueError``."""
    try:
        value = json.loads(payload)
        record_for(value, wire.FIRST)
        number, user, lost = value["number"], value["user"], value.get("lost")
        whole = type(number) is int and isinstance(user, str) and (lost is None or lost["first"] <= lost["last"])
    except (CodecError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"a frame that holds no record: {error!r}") from None
    if not whole:
        raise ValueError("a frame that holds no record")
    return Entry(number, value, len(payload) + spool_format.OVERHEAD, (user, _is_start(value)))


def first_of(entries: list[Entry], size: int) -> list[Entry]:
    """The first of them, of ``size`` bytes in all and one more."""
    taken = []
    for entry in entries:
        taken.append(entry)
        size -= entry.size
        if size <= 0:
            break
    return taken


def marker_of(first: int, last: int, why: str) -> Record:
    """What says that records are lost; its number is the next after them."""
    return records.lost(time.time(), first, last, why)
