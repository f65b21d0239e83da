"""Requests, decisions and records as JSON values, exactly as docs/protocol.md has them.

Decoding is where the outside comes in: wrong types and sizes beyond the bounds are refused with the
field's path.  Fields that this version does not know are refused in requests, skipped in decisions and
kept in records; ``persona.wire`` has what a peer of another version is told.  ``json.loads`` and the byte
bound before it are the caller's.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, TypeVar

from persona import wire
from persona.decisions import Decision, Denied, Granted, Lease, PersonaRef, Program, Request, Subject, Width
from persona.home_programs import is_below
from persona.problems import AnyReason, Fault, PersonaError, Reason, UnknownReason

MAX_BODY = 256 * 1024  # bytes of any request
MAX_ARGS = 1024
MAX_ARGUMENTS_SIZE = 64 * 1024  # characters of all arguments
MAX_ALIASES = 64
MAX_GROUPS = 3072  # of one user, and named by policies of one VM: no others travel; at 64 bytes 206 KB
MAX_GROUPS_IN_USE = 65536  # named by policies of one VM
MAX_RECORDS = 500
MAX_EXTRA = 4096  # characters of JSON: what a record says that this version does not know
_DEPTH_EXTRA = 8
_NAME, _PATH, _HELP, _TAG, _ORIGIN = 256, 4096, 2000, 64, 256
_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
_HEX = re.compile(r"[0-9a-f]{32}", re.ASCII)

T = TypeVar("T")


class CodecError(PersonaError):
    """A value that is not what the protocol says; the message begins with the field's path."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(Fault.BAD_REQUEST, f"{path or 'body'}: {message}")


def mapping(value: object, path: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """A JSON object with these fields and no others.  Raises ``CodecError``."""
    if not isinstance(value, dict):
        raise CodecError(path, "expected an object")
    for name in required:
        if name not in value:
            raise CodecError(_join(path, name), "missing")
    for name in value:
        if name not in required and name not in optional:
            raise CodecError(_join(path, str(name)[:64]), "unknown field")
    return value


def known(value: object, path: str, required: tuple[str, ...]) -> Mapping[str, Any]:
    """A JSON object with at least these fields; a newer sender may say more.  Raises ``CodecError``."""
    if not isinstance(value, dict):
        raise CodecError(path, "expected an object")
    return mapping({name: value[name] for name in required if name in value}, path, required)


def string(value: object, path: str, limit: int = _NAME) -> str:
    """A string of at most ``limit`` characters.  Raises ``CodecError``."""
    if not isinstance(value, str) or len(value) > limit:
        raise CodecError(path, f"expected a string of at most {limit} characters")
    return value


def strings(value: object, path: str, count: int, limit: int = _NAME) -> tuple[str, ...]:
    """A list of strings.  Raises ``CodecError``."""
    if not isinstance(value, list) or len(value) > count:
        raise CodecError(path, f"expected a list of at most {count} strings")
    for index, item in enumerate(value):
        if not isinstance(item, str) or len(item) > limit:
            raise CodecError(f"{path}[{index}]", f"expected a string of at most {limit} characters")
    return tuple(value)


def integer(value: object, path: str) -> int:
    """A whole number that is not negative.  Raises ``CodecError``."""
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise CodecError(path, "expected a whole number")
    return value


def boolean(value: object, path: str) -> bool:
    """true or false.  Raises ``CodecError``."""
    if not isinstance(value, bool):
        raise CodecError(path, "expected true or false")
    return value


def number(value: object, path: str) -> float:
    """A finite number that is not negative.  Raises ``CodecError``."""
    if type(value) not in (int, float) or not 0 <= value < 1e12:  # type: ignore[operator]  # narrowed by type()
        raise CodecError(path, "expected a number")
    return float(value)  # type: ignore[arg-type]  # narrowed by type()


def optional(value: object, path: str, parse: Callable[[object, str], T]) -> T | None:
    """null, or what ``parse`` says."""
    return None if value is None else parse(value, path)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# --- subjects and requests --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GroupsInUse:
    """The group names in policies of one VM, and a tag that stands for just this set.

    A guest sends no others of its users' groups, and says by the tag from which list it chose.
    """

    tag: str = ""  # of a guest that has no list yet: no list has that tag
    names: frozenset[str] = frozenset()

    def narrowed(self, subject: Subject) -> Subject:
        """The subject with those of its groups only."""
        return replace(subject, groups=tuple(group for group in subject.groups if group in self.names))


def encode_groups_in_use(groups: GroupsInUse) -> dict[str, Any]:
    """GROUPS."""
    return {"tag": groups.tag, "names": sorted(groups.names)}


def decode_groups_in_use(value: object, path: str = "groups_in_use") -> GroupsInUse:
    """Raises ``CodecError``."""
    item = known(value, path, ("tag", "names"))
    names = strings(item["names"], f"{path}.names", MAX_GROUPS_IN_USE)
    return GroupsInUse(tag(item["tag"], f"{path}.tag"), frozenset(names))


def tag(value: object, path: str) -> str:
    """The tag of a list of groups in use.  Raises ``CodecError``."""
    return string(value, path, _TAG)


def groups(value: object, path: str) -> tuple[str, ...]:
    """The groups of one user.  Raises ``CodecError``."""
    return strings(value, path, MAX_GROUPS)


def encode_subject(subject: Subject) -> dict[str, Any]:
    """SUBJECT."""
    return {"user": subject.user, "groups": list(subject.groups), "vm": subject.vm}


def decode_subject(value: object, path: str = "subject") -> Subject:
    """Raises ``CodecError``."""
    item = mapping(value, path, ("user", "groups", "vm"))
    user = string(item["user"], f"{path}.user")
    if not user:
        raise CodecError(f"{path}.user", "empty")
    return Subject(user, groups(item["groups"], f"{path}.groups"), string(item["vm"], f"{path}.vm"))


def encode_program(program: Program) -> dict[str, Any]:
    """PROGRAM.

    ``loader`` is sent only where it is true.  A broker that does not know the field, and so cannot keep
    the rule, is not asked about loaders.  The same goes for ``home``: a broker that took it for any program
    could allow it by a whitelist.
    """
    value: dict[str, Any] = {"path": program.path, "names": list(program.names), "paths": list(program.paths)}
    if program.loader:
        value["loader"] = True
    if program.home:
        value["home"] = program.home
    return value


def version_needed(program: Program) -> int:
    """The version of the protocol that keeps what is said of a program; a broker before it is not asked."""
    return 2 if program.loader or program.home else wire.FIRST


def decode_program(value: object, path: str = "program") -> Program:
    """Raises ``CodecError``."""
    item = mapping(value, path, ("path", "names", "paths"), ("loader", "home"))  # older agents do not say
    home = string(item.get("home", ""), f"{path}.home", _PATH)
    if home and (not is_below(home) or not str(item["path"]).endswith(f"/{home}")):
        raise CodecError(f"{path}.home", "expected the end of 'path', without '.' and '..'")
    return Program(
        string(item["path"], f"{path}.path", _PATH),
        strings(item["names"], f"{path}.names", MAX_ALIASES + 1),
        strings(item["paths"], f"{path}.paths", MAX_ALIASES + 1, _PATH),
        boolean(item.get("loader", False), f"{path}.loader"),
        home,
    )


def encode_request(request: Request) -> dict[str, Any]:
    """REQUEST."""
    return {
        "subject": encode_subject(request.subject),
        "session": request.session,
        "program": encode_program(request.program),
        "argv": list(request.argv),
        "cwd": request.cwd,
        "argv_complete": request.argv_complete,
    }


def decode_request(value: object, path: str = "request") -> Request:
    """Raises ``CodecError``."""
    item = mapping(value, path, ("subject", "session", "program", "argv", "cwd", "argv_complete"))
    argv = strings(item["argv"], f"{path}.argv", MAX_ARGS, MAX_ARGUMENTS_SIZE)
    if sum(map(len, argv)) > MAX_ARGUMENTS_SIZE:
        raise CodecError(f"{path}.argv", f"more than {MAX_ARGUMENTS_SIZE} characters")
    return Request(
        subject=decode_subject(item["subject"], f"{path}.subject"),
        session=string(item["session"], f"{path}.session"),
        program=decode_program(item["program"], f"{path}.program"),
        argv=argv,
        cwd=string(item["cwd"], f"{path}.cwd", _PATH),
        argv_complete=boolean(item["argv_complete"], f"{path}.argv_complete"),
    )


# --- decisions --------------------------------------------------------------------------------------


def encode_decision(decision: Decision, version: int = wire.CURRENT) -> dict[str, Any]:
    """DECISION, for a guest of this version of the protocol."""
    common = {
        "lease": {"seconds": decision.lease.seconds, "width": str(decision.lease.width)},
        "generation": decision.generation,
        "policy": decision.policy,
    }
    if version > wire.FIRST:  # 0.1.0 would refuse the whole answer
        common["policy_version"] = decision.policy_version
        common["policy_origin"] = decision.policy_origin
    if isinstance(decision, Granted):
        persona = {"name": decision.persona.name, "version": decision.persona.version}
        return {"decision": "granted", "persona": persona, **common}
    if version > wire.FIRST:
        common["persona_version"] = decision.persona_version
    return {
        "decision": "denied",
        "reason": wire.reason_for(decision.reason, version),
        "persona": decision.persona,
        "help": decision.help if len(decision.help) <= _HELP else decision.help[: _HELP - 1] + "…",
        **common,
    }


def decode_decision(value: object, path: str = "") -> Decision:
    """A decision; what a newer broker says more is skipped, it knows whom it speaks to.  Raises ``CodecError``."""
    value = value if isinstance(value, dict) else {}
    kind = value.get("decision")
    common = ("decision", "persona", "policy", "lease", "generation")
    if kind == "granted":
        item = known(value, path, common)
        persona = known(item["persona"], _join(path, "persona"), ("name", "version"))
        return Granted(
            PersonaRef(
                string(persona["name"], _join(path, "persona.name")),
                integer(persona["version"], _join(path, "persona.version")),
            ),
            string(item["policy"], _join(path, "policy")),
            _decode_lease(item["lease"], _join(path, "lease")),
            integer(item["generation"], _join(path, "generation")),
            _version(value, path, "policy_version"),
            _place(value, path),
        )
    if kind != "denied":
        raise CodecError(_join(path, "decision"), "expected 'granted' or 'denied'")
    item = known(value, path, (*common, "reason", "help"))
    return Denied(
        reason(item["reason"], _join(path, "reason")),
        optional(item["policy"], _join(path, "policy"), string),
        optional(item["persona"], _join(path, "persona"), string),
        string(item["help"], _join(path, "help"), _HELP),
        _decode_lease(item["lease"], _join(path, "lease")),
        integer(item["generation"], _join(path, "generation")),
        _version(value, path, "persona_version"),
        _version(value, path, "policy_version"),
        _place(value, path),
    )


def _version(value: Mapping[str, Any], path: str, name: str) -> int | None:
    """``None`` also where a broker says none, as 0.1.0."""
    return optional(value.get(name), _join(path, name), integer)


def _place(value: Mapping[str, Any], path: str) -> str:
    return string(value.get("policy_origin", ""), _join(path, "policy_origin"), _ORIGIN)


def _decode_lease(value: object, path: str) -> Lease:
    item = known(value, path, ("seconds", "width"))
    seconds = number(item["seconds"], f"{path}.seconds")
    if seconds > 86400:
        raise CodecError(path, "expected at most a day")
    width = _code(item["width"], f"{path}.width")
    # a width that this version does not know: for this once
    return Lease(seconds, Width(width)) if width in list(Width) else Lease(0.0, Width.ARGV)


def reason(value: object, path: str) -> AnyReason:
    """A reason, also one that only a newer version knows.  Raises ``CodecError`` for what cannot be a code."""
    code = _code(value, path)
    return Reason(code) if code in list(Reason) else UnknownReason(code)


def _code(value: object, path: str) -> str:
    if not isinstance(value, str) or not _CODE.fullmatch(value):
        raise CodecError(path, "expected a code: small letters, digits and '_'")
    return value


# --- records ----------------------------------------------------------------------------------------

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
    return Lost(first, last, _code(item["why"], f"{path}.why"))


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
        program=string(item["program"], f"{path}.program", _PATH),
        argv=strings(item["argv"], f"{path}.argv", 16, 1024),
        decision=item["decision"],
        reason=optional(item["reason"], f"{path}.reason", reason),
        persona=optional(item["persona"], f"{path}.persona", string),
        persona_version=optional(item["persona_version"], f"{path}.persona_version", integer),
        policy=optional(item["policy"], f"{path}.policy", string),
        event=_code(item["event"], f"{path}.event"),
        leased=boolean(item["leased"], f"{path}.leased"),
        complain=boolean(item["complain"], f"{path}.complain"),
        number=integer(new.get("number", 0), f"{path}.number"),
        lost=optional(new.get("lost"), f"{path}.lost", _decode_lost),
        extra=_extra(value),
        policy_version=_version(value, path, "policy_version") if isinstance(value, dict) else None,
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
