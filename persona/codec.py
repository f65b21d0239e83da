"""Requests, decisions and records as JSON values, exactly as docs/protocol.md has them.

Decoding is where the outside comes in: unknown fields, wrong types and sizes beyond the bounds are
refused with the field's path.  ``json.loads`` and the byte bound before it are the caller's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from persona.decisions import Decision, Denied, Granted, Lease, PersonaRef, Program, Request, Subject, Width
from persona.problems import Fault, PersonaError, Reason

MAX_BODY = 256 * 1024  # bytes of any request
MAX_ARGS = 1024
MAX_ARGUMENTS_SIZE = 64 * 1024  # characters of all arguments
MAX_ALIASES = 64
MAX_GROUPS = 256
MAX_RECORDS = 500
_NAME, _PATH, _HELP = 256, 4096, 2000

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


def encode_subject(subject: Subject) -> dict[str, Any]:
    """SUBJECT."""
    return {"user": subject.user, "groups": list(subject.groups), "vm": subject.vm}


def decode_subject(value: object, path: str = "subject") -> Subject:
    """Raises ``CodecError``."""
    item = mapping(value, path, ("user", "groups", "vm"))
    user = string(item["user"], f"{path}.user")
    if not user:
        raise CodecError(f"{path}.user", "empty")
    return Subject(user, strings(item["groups"], f"{path}.groups", MAX_GROUPS), string(item["vm"], f"{path}.vm"))


def encode_program(program: Program) -> dict[str, Any]:
    """PROGRAM."""
    return {"path": program.path, "names": list(program.names), "paths": list(program.paths)}


def decode_program(value: object, path: str = "program") -> Program:
    """Raises ``CodecError``."""
    item = mapping(value, path, ("path", "names", "paths"))
    return Program(
        string(item["path"], f"{path}.path", _PATH),
        strings(item["names"], f"{path}.names", MAX_ALIASES + 1),
        strings(item["paths"], f"{path}.paths", MAX_ALIASES + 1, _PATH),
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


def encode_decision(decision: Decision) -> dict[str, Any]:
    """DECISION."""
    common = {
        "lease": {"seconds": decision.lease.seconds, "width": str(decision.lease.width)},
        "generation": decision.generation,
        "policy": decision.policy,
    }
    if isinstance(decision, Granted):
        persona = {"name": decision.persona.name, "version": decision.persona.version}
        return {"decision": "granted", "persona": persona, **common}
    return {
        "decision": "denied",
        "reason": str(decision.reason),
        "persona": decision.persona,
        "help": decision.help,
        **common,
    }


def decode_decision(value: object, path: str = "") -> Decision:
    """Raises ``CodecError``."""
    kind = value.get("decision") if isinstance(value, dict) else None
    common = ("decision", "persona", "policy", "lease", "generation")
    if kind == "granted":
        item = mapping(value, path, common)
        persona = mapping(item["persona"], _join(path, "persona"), ("name", "version"))
        return Granted(
            PersonaRef(
                string(persona["name"], _join(path, "persona.name")),
                integer(persona["version"], _join(path, "persona.version")),
            ),
            string(item["policy"], _join(path, "policy")),
            _decode_lease(item["lease"], _join(path, "lease")),
            integer(item["generation"], _join(path, "generation")),
        )
    if kind != "denied":
        raise CodecError(_join(path, "decision"), "expected 'granted' or 'denied'")
    item = mapping(value, path, (*common, "reason", "help"))
    return Denied(
        _reason(item["reason"], _join(path, "reason")),
        optional(item["policy"], _join(path, "policy"), string),
        optional(item["persona"], _join(path, "persona"), string),
        string(item["help"], _join(path, "help"), _HELP),
        _decode_lease(item["lease"], _join(path, "lease")),
        integer(item["generation"], _join(path, "generation")),
    )


def _decode_lease(value: object, path: str) -> Lease:
    item = mapping(value, path, ("seconds", "width"))
    seconds = number(item["seconds"], f"{path}.seconds")
    if item["width"] not in list(Width) or seconds > 86400:
        raise CodecError(path, "expected at most a day, of width 'program' or 'argv'")
    return Lease(seconds, Width(item["width"]))


def _reason(value: object, path: str) -> Reason:
    try:
        return Reason(str(value))
    except ValueError:
        raise CodecError(path, "unknown reason") from None


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
)


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the audit trail, as the guest saw it.  ``at`` is Unix seconds."""

    at: float
    session: str
    user: str
    program: str
    argv: tuple[str, ...]
    decision: str
    reason: Reason | None
    persona: str | None
    persona_version: int | None
    policy: str | None
    event: str
    leased: bool
    complain: bool


_RECORD_FIELDS = tuple(Record.__dataclass_fields__)


def encode_record(record: Record) -> dict[str, Any]:
    """RECORD."""
    value: dict[str, Any] = {name: getattr(record, name) for name in _RECORD_FIELDS}
    value["argv"] = list(record.argv)
    value["reason"] = None if record.reason is None else str(record.reason)
    return value


def decode_record(value: object, path: str = "record") -> Record:
    """Raises ``CodecError``."""
    item = mapping(value, path, _RECORD_FIELDS)
    if item["decision"] not in ("granted", "denied") or item["event"] not in EVENTS:
        raise CodecError(path, "unknown decision or event")
    return Record(
        at=number(item["at"], f"{path}.at"),
        session=string(item["session"], f"{path}.session"),
        user=string(item["user"], f"{path}.user"),
        program=string(item["program"], f"{path}.program", _PATH),
        argv=strings(item["argv"], f"{path}.argv", 16, 1024),
        decision=item["decision"],
        reason=optional(item["reason"], f"{path}.reason", _reason),
        persona=optional(item["persona"], f"{path}.persona", string),
        persona_version=optional(item["persona_version"], f"{path}.persona_version", integer),
        policy=optional(item["policy"], f"{path}.policy", string),
        event=item["event"],
        leased=boolean(item["leased"], f"{path}.leased"),
        complain=boolean(item["complain"], f"{path}.complain"),
    )
