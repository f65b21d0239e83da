"""Records as JSON values, exactly as docs/protocol.md has them, and whose numbers they bear.

What this version does not know of a record is kept.
"""

import json
import re
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from persona import wire
from persona.codec import version_in
from persona.json_fields import (
    PATH_MAX,
    CodecError,
    boolean,
    code,
    integer,
    known,
    number,
    optional,
    reason,
    string,
    strings,
)
from persona.problems import AnyReason

MAX_RECORDS = 500
MAX_EXTRA = 4096  # characters of JSON: what a record says that this version does not know
_DEPTH_EXTRA = 8
_HEX = re.compile(r"[0-9a-f]{32}", re.ASCII)

EVENTS = (
    "exec",
    "admission",
    "break_glass",
    "stopped",
    "killed",
    "session_end",
    "limit",
    "frozen",
    "network",
    "lost",
)
_EVENTS_OF_0_1_0 = frozenset(EVENTS) - {"lost"}  # it refuses all others; later versions keep them as they are


@dataclass(frozen=True, slots=True)
class Stream:
    """Whose numbers a guest's records bear: of one incarnation of the machine, in one boot of it; 32 hex digits each.

    Within a stream numbers begin with 1, rise by one, and none is used twice.
    """

    machine: str
    boot: str


def encode_stream(stream: Stream) -> dict[str, Any]:
    """STREAM."""
    return {"machine": stream.machine, "boot": stream.boot}


def decode_stream(value: object, path: str = "stream") -> Stream:
    """Raises ``CodecError``."""
    item = known(value, path, ("machine", "boot"))
    for name in ("machine", "boot"):
        if not _HEX.fullmatch(string(item[name], f"{path}.{name}")):
            raise CodecError(f"{path}.{name}", "expected 32 hex digits, in small letters")
    return Stream(item["machine"], item["boot"])


@dataclass(frozen=True, slots=True)
class Lost:
    """Records that a guest could not keep: the numbers of the first and the last of them, and a code that says why."""

    first: int
    last: int
    why: str

    @property
    def count(self) -> int:
        """How many they are."""
        return self.last - self.first + 1


def _decode_lost(value: object, path: str) -> Lost:
    item = known(value, path, ("first", "last", "why"))
    first, last = (integer(item[name], f"{path}.{name}") for name in ("first", "last"))
    if not 1 <= first <= last:
        raise CodecError(path, "expected 'first' from 1 to 'last'")
    return Lost(first, last, code(item["why"], f"{path}.why"))


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the audit trail, as the guest saw it.  ``at`` is Unix seconds.

    A new field needs a default value: it is what a record of an older guest has, and is not sent.  ``number`` is the
    record's own in its stream, 0 = it has none.  ``lost`` is what a record of the event ``lost`` is about.  ``extra``
    is the JSON of the fields that only a newer guest knows.
    """

    at: float
    session: str
    user: str
    program: str
    argv: tuple[str, ...]
    decision: str
    reason: AnyReason | None
    persona: str | None
    persona_version: int | None
    policy: str | None
    event: str
    leased: bool
    complain: bool
    number: int = 0
    lost: Lost | None = None
    extra: str = ""
    policy_version: int | None = None


_RECORD_FIELDS = tuple(field.name for field in fields(Record) if field.name != "extra")
_RECORD_OF_0_1_0 = tuple(field.name for field in fields(Record) if field.default is MISSING)


def encode_record(record: Record, version: int = wire.CURRENT) -> dict[str, Any]:
    """RECORD, for a broker of this version of the protocol."""
    value: dict[str, Any] = {name: getattr(record, name) for name in _RECORD_OF_0_1_0}
    value["argv"] = list(record.argv)
    value["reason"] = None if record.reason is None else str(record.reason)
    if record.policy_version is not None:
        value["policy_version"] = record.policy_version
    if record.number:
        value["number"] = record.number
    if record.lost is not None:
        value["lost"] = asdict(record.lost)
    return record_for({**json.loads(record.extra), **value} if record.extra else value, version)


def record_for(value: dict[str, Any], version: int) -> dict[str, Any]:
    """A RECORD of this version as a broker of another one can read it."""
    if version > wire.FIRST:
        return value
    told = {name: value[name] for name in _RECORD_OF_0_1_0}
    if told["reason"] is not None:
        told["reason"] = wire.reason_for(reason(told["reason"], "reason"), version)
    if told["event"] not in _EVENTS_OF_0_1_0:
        told["event"] = "exec"
    return told


def decode_record(value: object, path: str = "record") -> Record:
    """A record; of an older guest without the newest fields, of a newer one with ``extra``.  Raises ``CodecError``."""
    item = known(value, path, _RECORD_OF_0_1_0)
    new = value if isinstance(value, dict) else {}
    if item["decision"] not in ("granted", "denied"):
        raise CodecError(f"{path}.decision", "expected 'granted' or 'denied'")
    return Record(
        at=number(item["at"], f"{path}.at"),
        session=string(item["session"], f"{path}.session"),
        user=string(item["user"], f"{path}.user"),
        program=string(item["program"], f"{path}.program", PATH_MAX),
        argv=strings(item["argv"], f"{path}.argv", 16, 1024),
        decision=item["decision"],
        reason=optional(item["reason"], f"{path}.reason", reason),
        persona=optional(item["persona"], f"{path}.persona", string),
        persona_version=optional(item["persona_version"], f"{path}.persona_version", integer),
        policy=optional(item["policy"], f"{path}.policy", string),
        event=code(item["event"], f"{path}.event"),
        leased=boolean(item["leased"], f"{path}.leased"),
        complain=boolean(item["complain"], f"{path}.complain"),
        number=integer(new.get("number", 0), f"{path}.number"),
        lost=optional(new.get("lost"), f"{path}.lost", _decode_lost),
        extra=_extra(value),
        policy_version=version_in(value, path, "policy_version") if isinstance(value, dict) else None,
    )


def _extra(value: object) -> str:
    """The fields of a record that this version does not know, as JSON; of too much only how much it was."""
    more = {name: item for name, item in value.items() if name not in _RECORD_FIELDS} if isinstance(value, dict) else {}
    if not more:
        return ""
    if not _is_shallow(more, _DEPTH_EXTRA):
        return '{"left_out":"it is nested too deep"}'
    try:
        text = json.dumps(more, separators=(",", ":"), allow_nan=False)
    except ValueError:  # Python reads and writes these, no other JSON: the whole record would be found by no search
        return '{"left_out":"it has a number that is none in JSON"}'
    return text if len(text) <= MAX_EXTRA else f'{{"left_out":{len(text)}}}'


def _is_shallow(value: object, depth: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not items or (depth > 0 and all(_is_shallow(item, depth - 1) for item in items))
