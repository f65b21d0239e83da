"""What a sink is told, and what it has to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from persona.answers import iso
from persona_broker.audit.core.checkpoint import Checkpoint
from persona_broker.audit.core.format import Row, joined, to_json


@dataclass(frozen=True, slots=True)
class Line:
    """One record or checkpoint.  ``severity`` as in RFC 5424; ``text`` is a JSON object on one line, ASCII."""

    number: int
    at_us: int
    kind: str  # "record" or "checkpoint"
    severity: int
    text: str


class Sink(Protocol):
    """One place that records go to.  Used by one thread."""

    name: str

    def send(self, lines: Sequence[Line]) -> None:
        """Returns when all of them arrived, as far as can be known; raises ``OSError``, and is called again then."""

    def close(self) -> None:
        """Ends what is open."""


WARNING, NOTICE, INFORMATIONAL = 4, 5, 6


def line_of(row: Row) -> Line:
    """A record as sinks have it: an entry of ``audit export``."""
    record = joined(row.facts, row.person)
    severity = INFORMATIONAL if row.guest is not None else NOTICE
    if record.get("decision") == "denied":
        severity = WARNING
    return Line(row.number, row.at_us, "record", severity, to_json(exported(row)))


def line_of_checkpoint(checkpoint: Checkpoint) -> Line:
    """A checkpoint as sinks have it."""
    text = to_json({"checkpoint": checkpoint.to_mapping()})
    return Line(checkpoint.number, checkpoint.at_us, "checkpoint", NOTICE, text)


def exported(row: Row) -> dict[str, object]:
    """An entry of ``audit export``; the names stay."""
    record = joined(row.facts, row.person)
    at = record.get("at")
    return {
        "number": row.number,
        "received_at": iso(row.at_us / 1e6),
        "vm": row.guest,
        "machine": row.stream.machine if row.stream is not None else None,
        "boot": row.stream.boot if row.stream is not None else None,
        "counter": row.counter,
        "erased": row.person is None,
        "hash": row.hash.hex(),
        "record": {**record, "at": iso(at) if isinstance(at, int | float) else None},
    }
