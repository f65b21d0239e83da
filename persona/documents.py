"""The two documents that operators write: a persona, and the policy that hands it out."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from persona.conditions import When, read_when
from persona.dependencies import Dependency, parse_dependency
from persona.health import vm_health_mapping
from persona.network import NetworkRule, parse_rule
from persona.parsing import Bad, DocumentError, Finding, Reader, integer, one_of, text
from persona.patterns import WHITELIST_MAX, Whitelist, check_whitelist, parse_pattern
from persona.quantities import bytes_from, parse_cpu
from persona.schema import NAME, PERSONA, POLICY, fields

DESCRIPTION_MAX = 1000
_MEMORY_LEAST = 4 << 20  # below it not even a shell starts
_RATE_LEAST = 4096  # a page a second
_GLOB = re.compile(r"[A-Za-z0-9._*?-]{1,64}", re.ASCII)
_SUBJECT = re.compile(r"\*|[A-Za-z_][A-Za-z0-9_.-]{0,63}\$?", re.ASCII)
_USER = re.compile(NAME)


@dataclass(frozen=True, slots=True)
class DiskIo:
    """Bytes and operations per second."""

    read_bps: int | None = None
    write_bps: int | None = None
    read_iops: int | None = None
    write_iops: int | None = None


@dataclass(frozen=True, slots=True)
class ResourceLimits:
    """CPU in percent of one core, memory in bytes; ``None`` = not limited."""

    cpu_percent: float | None = None
    memory_bytes: int | None = None
    disk_io: DiskIo = DiskIo()
    pids: int | None = None
    per: str = "session"


@dataclass(frozen=True, slots=True)
class Persona:
    """What may be run, with how much, reaching where.  Immutable; a change is a new version."""

    name: str
    command_whitelist: Whitelist
    resource_limits: ResourceLimits = ResourceLimits()
    network_access: tuple[NetworkRule, ...] = ()
    dependencies: tuple[Dependency, ...] = ()
    priority: int = 50
    description: str = ""
    on_revoke: str = "finish"


@dataclass(frozen=True, slots=True)
class Policy:
    """Who gets which persona, for which commands, on which VMs, when."""

    name: str
    users: tuple[str, ...]
    groups: tuple[str, ...]
    commands: Whitelist
    vms: tuple[str, ...]
    when: When
    persona: str
    description: str = ""


Document = Persona | Policy


def parse_document(value: object) -> Document:
    """One parsed mapping as a document.  Raises ``DocumentError`` with everything that is wrong."""
    findings: list[Finding] = []
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind == "Persona":
        document: Document = _persona(Reader(value, fields(PERSONA), findings))
    elif kind == "Policy":
        document = _policy(Reader(value, fields(POLICY), findings))
    else:
        found = "" if kind is None else f", not {str(kind)[:80]!r}"
        raise DocumentError([Finding("kind", f"expected 'kind: Persona' or 'kind: Policy'{found}")])
    if findings:
        raise DocumentError(findings)
    return document


def _persona(reader: Reader) -> Persona:
    limits = reader.below("resource_limits", fields(PERSONA, "resource_limits"))
    disk = limits.below("disk_io", fields(PERSONA, "resource_limits", "disk_io"))
    if not reader.has("command_whitelist"):
        reader.note("command_whitelist", "missing", "an empty list allows nothing")
    iops = integer(1, 1 << 31)
    return Persona(
        name=reader.read("name", _name, "", required=True),
        command_whitelist=_whitelist(reader, "command_whitelist"),
        resource_limits=ResourceLimits(
            cpu_percent=limits.read("cpu", parse_cpu, None),
            memory_bytes=limits.read("memory", bytes_from(_MEMORY_LEAST), None),
            disk_io=DiskIo(
                disk.read("read_bps", bytes_from(_RATE_LEAST), None),
                disk.read("write_bps", bytes_from(_RATE_LEAST), None),
                disk.read("read_iops", iops, None),
                disk.read("write_iops", iops, None),
            ),
            pids=limits.read("pids", integer(1, 4_194_304), None),
            per=limits.read("per", one_of("session", "persona"), "session"),
        ),
        network_access=_unique(reader, "network_access", reader.each("network_access", parse_rule)),
        dependencies=_unique(reader, "dependencies", reader.each("dependencies", parse_dependency)),
        priority=reader.read("priority", integer(0, 1000), 50),
        description=reader.read("description", text(DESCRIPTION_MAX), ""),
        on_revoke=reader.read("on_revoke", one_of("finish", "freeze", "kill"), "finish"),
    )


def _policy(reader: Reader) -> Policy:
    subjects = reader.below("subjects", fields(POLICY, "subjects"))
    users = subjects.each("users", _subject)
    groups = subjects.each("groups", _subject)
    if not users and not groups and not any(f.path.startswith("subjects") for f in reader.findings):
        reader.note("subjects", "names nobody", "list users, groups, or '*' for everyone")
    when = reader.below("when", fields(POLICY, "when"))
    load_fields = fields(POLICY, "when", "host_load", "cpu")
    return Policy(
        name=reader.read("name", _name, "", required=True),
        users=users,
        groups=groups,
        commands=_whitelist(reader, "commands") if reader.has("commands") else Whitelist((parse_pattern("**"),)),
        vms=reader.each("vms", _vm) if reader.has("vms") else ("*",),
        when=read_when(when, load_fields, fields(POLICY, "when", "vm_health")),
        persona=reader.read("persona", _name, "", required=True),
        description=reader.read("description", text(DESCRIPTION_MAX), ""),
    )


T = TypeVar("T")


def _unique(reader: Reader, name: str, items: tuple[T, ...]) -> tuple[T, ...]:
    for index, item in enumerate(items):
        if item in items[:index]:
            reader.note(f"{name}[{index}]", f"'{item}' is there twice", "remove one")
    return items


def _whitelist(reader: Reader, name: str) -> Whitelist:
    before = len(reader.findings)
    patterns = reader.each(name, parse_pattern, WHITELIST_MAX)
    if len(reader.findings) == before:
        for index, message, fix in check_whitelist(patterns):
            reader.note(f"{name}[{index}]", message, fix)
    return Whitelist(patterns)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _USER.match(value):
        raise Bad(f"{value!r} is no name", "a letter, then letters, digits, '.', '_' or '-'; at most 64")
    return value


def _subject(value: Any) -> str:
    if not isinstance(value, str) or not _SUBJECT.fullmatch(value):
        raise Bad(f"{value!r} is no user or group name", "or '*' for everyone")
    return value


def _vm(value: Any) -> str:
    if not isinstance(value, str) or not _GLOB.fullmatch(value):
        raise Bad(f"{value!r} is no VM name", "'*' and '?' are wildcards")
    return value


def check_set(documents: Iterable[Document]) -> list[tuple[Document, Finding]]:
    """What is wrong between documents: names twice, policies whose persona is not there."""
    documents = list(documents)
    found: list[tuple[Document, Finding]] = []
    seen: set[tuple[type[Document], str]] = set()
    personas = {document.name for document in documents if isinstance(document, Persona)}
    for document in documents:
        kind = type(document)
        if (kind, document.name) in seen:
            found.append((document, Finding("name", f"{kind.__name__} {document.name!r} is there twice")))
        seen.add((kind, document.name))
        if isinstance(document, Policy) and document.persona not in personas:
            fix = f"known: {', '.join(sorted(personas))}" if personas else "no persona is defined"
            found.append((document, Finding("persona", f"there is no persona {document.persona!r}", fix)))
    return found


def to_mapping(document: Document) -> dict[str, Any]:
    """The canonical form: every field that says something, in the units that the parser reads back."""
    if isinstance(document, Persona):
        return _drop_empty(
            {
                "kind": "Persona",
                "name": document.name,
                "description": document.description,
                "command_whitelist": [pattern.text for pattern in document.command_whitelist.patterns],
                "resource_limits": _limits(document.resource_limits),
                "network_access": [str(rule) for rule in document.network_access],
                "dependencies": [str(dependency) for dependency in document.dependencies],
                "priority": document.priority,
                "on_revoke": document.on_revoke,
            },
            keep=("command_whitelist", "priority"),
        )
    load = {t.metric: {"below": t.below, "again_below": t.again_below} for t in document.when.host_load}
    hours = document.when.hours.text if document.when.hours else None
    health = vm_health_mapping(document.when.vm_health) if document.when.vm_health else None
    return _drop_empty(
        {
            "kind": "Policy",
            "name": document.name,
            "description": document.description,
            "subjects": _drop_empty({"users": list(document.users), "groups": list(document.groups)}),
            "commands": [pattern.text for pattern in document.commands.patterns],
            "vms": list(document.vms),
            "when": _drop_empty({"host_load": load, "vm_health": health, "hours": hours}),
            "persona": document.persona,
        },
        keep=("commands", "vms"),
    )


def _limits(limits: ResourceLimits) -> dict[str, Any]:
    disk = limits.disk_io
    return _drop_empty(
        {
            "cpu": f"{limits.cpu_percent:g}%" if limits.cpu_percent is not None else None,
            "memory": limits.memory_bytes,
            "disk_io": _drop_empty({name: getattr(disk, name) for name in DiskIo.__dataclass_fields__}),
            "pids": limits.pids,
            "per": limits.per if limits.per != "session" else None,
        }
    )


def _drop_empty(mapping: dict[str, Any], keep: tuple[str, ...] = ()) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key in keep or value not in (None, "", [], {})}


def digest(document: Document) -> str:
    """SHA-256 of the canonical form: equal digests, equal versions."""
    canonical = json.dumps(to_mapping(document), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
