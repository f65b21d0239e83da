"""What the chain is made of, byte by byte (docs/audit.md): records, their two parts, and the hash over each.

A record has *facts*, which stay for ever, and a *person's part* (user, program, arguments, what only newer guests say),
which can be erased: the chain covers a salted digest of that part, so it still verifies when only the digest is left.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from persona_broker.audit.core.streams import Gap

# Members of a record that are no text of a person; whatever else it has is in the person's part.  The broker adds
# ``lost`` (what a marker says) and ``conflict_with`` to them; what a guest calls so itself is in the person's part.
FACTS = (
    "at",
    "session",
    "decision",
    "reason",
    "persona",
    "persona_version",
    "policy",
    "event",
    "leased",
    "complain",
)
SALT_BYTES = 16
HASH_BYTES = 32

_FACTS = frozenset(FACTS)
_GENESIS = "persona audit chain 1\n"

# ASCII alone: what is not, is escaped.  Raises ValueError for numbers that are none in JSON.  What came as JSON has no
# cycle to look for.
to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode


@dataclass(frozen=True, slots=True)
class Stream:
    """In what a guest counts its records: one incarnation of the machine and one boot, 32 hexadecimal digits each."""

    machine: str
    boot: str


class Entry(NamedTuple):
    """What is to be kept; ``facts`` and ``person`` are JSON objects, ``counter`` is the guest's number or ``None``."""

    facts: str
    person: str
    counter: int | None = None
    marker: Gap | None = None  # the numbers that a guest says it dropped


@dataclass(frozen=True, slots=True)
class Row:
    """One link of the chain.  ``at_us``: when the broker received it, Unix microseconds by its clock.

    ``guest`` is ``None`` for what the broker itself says.  ``person`` is ``None`` where it was erased.
    """

    number: int
    at_us: int
    guest: str | None
    stream: Stream | None
    counter: int | None
    facts: str
    person: str | None
    hash: bytes


def split(record: Mapping[str, Any], counter: int | None = None, marker: Gap | None = None) -> Entry:
    """A record as two JSON objects."""
    facts = {name: record[name] for name in record if name in _FACTS}
    person = {name: record[name] for name in record if name not in _FACTS}
    if marker is not None:
        facts["lost"] = {"first": marker.first, "last": marker.last, "why": marker.why}
    return Entry(to_json(facts), to_json(person), counter, marker)


def joined(facts: str, person: str | None) -> dict[str, Any]:
    """The record again; without the person's part where that was erased."""
    record: dict[str, Any] = json.loads(facts)
    if person is not None:
        record = {**json.loads(person), **record}
    return record


def genesis(chain: str) -> bytes:
    """What the first record of a chain follows."""
    return hashlib.sha256(f"{_GENESIS}{chain}".encode()).digest()


def person_digest(salt: bytes, person: str) -> bytes:
    """What the chain covers of a person's part."""
    return hashlib.sha256(salt + person.encode()).digest()


def message(
    number: int, at_us: int, guest: str | None, stream: Stream | None, counter: int | None, facts: str
) -> bytes:
    """What the chain covers of a record besides the digest; what is not there is empty."""
    machine, boot = (stream.machine, stream.boot) if stream is not None else ("", "")
    counted = "" if counter is None else counter
    return f"{number}\n{at_us}\n{guest or ''}\n{machine}\n{boot}\n{counted}\n{facts}".encode()


def link(previous: bytes, digest: bytes, said: bytes) -> bytes:
    """The hash of a record, over the one before it."""
    return hashlib.sha256(previous + digest + said).digest()
