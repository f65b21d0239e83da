"""Requests and decisions as JSON values, exactly as docs/protocol.md has them.

Decoding is where the outside comes in: wrong types and sizes beyond the bounds are refused with the
field's path.  Fields that this version does not know are refused in requests and skipped in decisions;
``persona.wire`` has what a peer of another version is told.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from persona import wire
from persona.decisions import Decision, Denied, Granted, Lease, PersonaRef, Program, Request, Subject, Width
from persona.home_programs import is_below
from persona.json_fields import (
    HELP_MAX,
    PATH_MAX,
    TAG_MAX,
    CodecError,
    boolean,
    code,
    integer,
    join,
    known,
    mapping,
    number,
    optional,
    reason,
    string,
    strings,
)

MAX_BODY = 256 * 1024  # bytes of any request
MAX_ARGS = 1024
MAX_ARGUMENTS_SIZE = 64 * 1024  # characters of all arguments
MAX_ALIASES = 64
MAX_GROUPS = 3072  # of one user, and named by policies of one VM: no others travel; at 64 bytes 206 KB
MAX_GROUPS_IN_USE = 65536  # named by policies of one VM
_ORIGIN = 256


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
    return string(value, path, TAG_MAX)


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
    home = string(item.get("home", ""), f"{path}.home", PATH_MAX)
    if home and (not is_below(home) or not str(item["path"]).endswith(f"/{home}")):
        raise CodecError(f"{path}.home", "expected the end of 'path', without '.' and '..'")
    return Program(
        string(item["path"], f"{path}.path", PATH_MAX),
        strings(item["names"], f"{path}.names", MAX_ALIASES + 1),
        strings(item["paths"], f"{path}.paths", MAX_ALIASES + 1, PATH_MAX),
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
        cwd=string(item["cwd"], f"{path}.cwd", PATH_MAX),
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
        "help": decision.help if len(decision.help) <= HELP_MAX else decision.help[: HELP_MAX - 1] + "…",
        **common,
    }


def decode_decision(value: object, path: str = "") -> Decision:
    """A decision; what a newer broker says more is skipped, it knows whom it speaks to.  Raises ``CodecError``."""
    value = value if isinstance(value, dict) else {}
    kind = value.get("decision")
    common = ("decision", "persona", "policy", "lease", "generation")
    if kind == "granted":
        item = known(value, path, common)
        persona = known(item["persona"], join(path, "persona"), ("name", "version"))
        return Granted(
            PersonaRef(
                string(persona["name"], join(path, "persona.name")),
                integer(persona["version"], join(path, "persona.version")),
            ),
            string(item["policy"], join(path, "policy")),
            _decode_lease(item["lease"], join(path, "lease")),
            integer(item["generation"], join(path, "generation")),
            version_in(value, path, "policy_version"),
            _origin(value, path),
        )
    if kind != "denied":
        raise CodecError(join(path, "decision"), "expected 'granted' or 'denied'")
    item = known(value, path, (*common, "reason", "help"))
    return Denied(
        reason(item["reason"], join(path, "reason")),
        optional(item["policy"], join(path, "policy"), string),
        optional(item["persona"], join(path, "persona"), string),
        string(item["help"], join(path, "help"), HELP_MAX),
        _decode_lease(item["lease"], join(path, "lease")),
        integer(item["generation"], join(path, "generation")),
        version_in(value, path, "persona_version"),
        version_in(value, path, "policy_version"),
        _origin(value, path),
    )


def version_in(value: Mapping[str, Any], path: str, name: str) -> int | None:
    """``None`` also where a broker says none, as 0.1.0."""
    return optional(value.get(name), join(path, name), integer)


def _origin(value: Mapping[str, Any], path: str) -> str:
    return string(value.get("policy_origin", ""), join(path, "policy_origin"), _ORIGIN)


def _decode_lease(value: object, path: str) -> Lease:
    item = known(value, path, ("seconds", "width"))
    seconds = number(item["seconds"], f"{path}.seconds")
    if seconds > 86400:
        raise CodecError(path, "expected at most a day")
    width = code(item["width"], f"{path}.width")
    # a width that this version does not know: for this once
    return Lease(seconds, Width(width)) if width in list(Width) else Lease(0.0, Width.ARGV)
