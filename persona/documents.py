"""The documents that operators write: a persona, the policy that hands it out, and sets of commands for whitelists."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from persona.conditions import When, read_when
from persona.decisions import Program
from persona.dependencies import Dependency, parse_dependency
from persona.guesses import of_persona, of_policy
from persona.home_programs import HomePattern, parse_home_program
from persona.network import NetworkRule, parse_rule
from persona.parsing import Bad, DocumentError, Finding, Reader, Unread, close_to, integer, one_of, shown, text
from persona.patterns import WHITELIST_MAX, Pattern, Whitelist, check_whitelist, is_loader, parse_pattern
from persona.quantities import bytes_from, parse_cpu
from persona.schema import COMMAND_SET, NAME, ORDER_MAX, PERSONA, POLICY, fields

DESCRIPTION_MAX = 1000
_NAMED_MAX = 20  # personas that a finding lists
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
class Expansion:
    """How a whitelist that uses command sets came about.

    ``written`` is what its author wrote, a set as ``@NAME``.  ``origins`` has, for each pattern of the
    whitelist, the name of its set, empty for the author's own; nothing until ``sets.expand`` was called.
    """

    written: tuple[str, ...]
    origins: tuple[str, ...] = ()

    def place(self, index: int, text: str) -> int:
        """The index in ``written`` of what a pattern of the whitelist is there for."""
        return self.written.index(f"@{self.origins[index]}" if self.origins[index] else text)


@dataclass(frozen=True, slots=True)
class Persona:
    """What may be run, with how much, reaching where.  Immutable; a change is a new version.

    With an ``expansion`` that has no origins yet, the whitelist lacks what its sets allow.
    """

    name: str
    command_whitelist: Whitelist
    resource_limits: ResourceLimits = ResourceLimits()
    network_access: tuple[NetworkRule, ...] = ()
    dependencies: tuple[Dependency, ...] = ()
    priority: int = 50
    description: str = ""
    on_revoke: str = "finish"
    home_programs: tuple[HomePattern, ...] = ()
    expansion: Expansion | None = None  # ``None`` = it uses no command sets

    def allows(self, program: Program, argv: tuple[str, ...], complete: bool = True) -> bool:
        """Whether this command line may run; of a program in its user's home the arguments do not matter."""
        if program.home:
            return self.allows_in_home(program)
        return self.command_whitelist.allows(program, argv, complete)

    def allows_in_home(self, program: Program) -> bool:
        """Whether ``home_programs`` names a program in its user's home.  A loader runs any program: it never does."""
        return not is_loader(program) and any(pattern.matches(program.home) for pattern in self.home_programs)


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
    order: int | None = None  # ``None`` = its place is what the database has


@dataclass(frozen=True, slots=True)
class CommandSet:
    """Patterns, none of them a carve-out, that personas use as ``@NAME``."""

    name: str
    commands: Whitelist
    description: str = ""


Document = Persona | Policy | CommandSet


def parse_document(value: object, *, accepted: bool = False) -> Document:
    """One parsed mapping as a document.  Raises ``DocumentError`` with everything that is wrong.

    ``accepted``: a broker accepted and stored it.  Then its sets are expanded, and patterns that have no
    effect are no reason to refuse it: a set's entry may be there that a carve-out takes away.
    """
    findings: list[Finding] = []
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind == "Persona":
        document: Document = _persona(Reader(value, fields(PERSONA), findings, advice=of_persona), accepted=accepted)
    elif kind == "Policy":
        document = _policy(Reader(value, fields(POLICY), findings, advice=of_policy), accepted=accepted)
    elif kind == "CommandSet":
        document = _command_set(Reader(value, fields(COMMAND_SET), findings))
    elif isinstance(kind, Unread):
        raise DocumentError([Finding("kind", kind.message, kind.fix)])
    else:
        raise DocumentError([_no_kind(value, kind)])
    if findings:
        raise DocumentError(findings)
    return document


def _no_kind(value: object, kind: object) -> Finding:
    """What is wrong with a document that is none of the three."""
    wanted = "expected 'kind: Persona', 'Policy' or 'CommandSet'"
    if not isinstance(value, dict):
        several = "documents are parted by a line '---', not written as a list" if isinstance(value, list) else ""
        fix = several or "a field is written 'kind: Persona', with a space after the colon"
        return Finding("kind", f"{wanted} and other fields, not {shown(value)}", fix)
    if kind is not None:
        close = close_to(kind, ("Persona", "Policy", "CommandSet")) if isinstance(kind, str) else ""
        return Finding("kind", f"{wanted}, not {shown(kind)}", f"did you mean '{close}'?" if close else "")
    other = next((key for key in value if str(key).lower() == "kind"), None)
    return Finding("kind", f"{wanted}: missing", f"write 'kind' in small letters, not {shown(other)}" if other else "")


def _persona(reader: Reader, *, accepted: bool) -> Persona:
    limits = reader.below("resource_limits", fields(PERSONA, "resource_limits"))
    disk = limits.below("disk_io", fields(PERSONA, "resource_limits", "disk_io"))
    if not reader.has("command_whitelist"):
        reader.note("command_whitelist", "missing", "an empty list allows nothing")
    iops = integer(1, 1 << 31)
    whitelist, expansion = _with_sets(reader, accepted=accepted)
    return Persona(
        name=reader.read("name", _name, "", required=True),
        command_whitelist=whitelist,
        expansion=expansion,
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
        home_programs=_unique(reader, "home_programs", reader.each("home_programs", parse_home_program)),
    )


def _policy(reader: Reader, *, accepted: bool) -> Policy:
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
        commands=_commands(reader, accepted=accepted) if reader.has("commands") else Whitelist((parse_pattern("**"),)),
        vms=reader.each("vms", _vm) if reader.has("vms") else ("*",),
        when=read_when(when, load_fields, fields(POLICY, "when", "vm_health")),
        persona=reader.read("persona", _name, "", required=True),
        description=reader.read("description", text(DESCRIPTION_MAX), ""),
        order=reader.read("order", parse_order, None),
    )


parse_order = integer(0, ORDER_MAX)
T = TypeVar("T")


def _unique(reader: Reader, name: str, items: tuple[T, ...]) -> tuple[T, ...]:
    for index, item in enumerate(items):
        if item in items[:index]:
            reader.note(f"{name}[{index}]", f"'{item}' is there twice", "remove one")
    return items


def _command_set(reader: Reader) -> CommandSet:
    name = reader.read("name", _name, "", required=True)
    if not reader.raw("commands"):
        reader.note("commands", "missing", "a set has one entry at least")
    commands = reader.each("commands", _of_set, WHITELIST_MAX)
    texts = [pattern.text for pattern in commands]
    for index, text_ in enumerate(texts):
        if text_ in texts[:index]:
            reader.note(f"commands[{index}]", f"{text_!r} is there twice", "remove one")
    return CommandSet(name, Whitelist(commands), reader.read("description", text(DESCRIPTION_MAX), ""))


def _of_set(value: object) -> Pattern:
    if isinstance(value, str) and value.lstrip().startswith("!"):
        raise Bad(f"{value!r}: a command set has no carve-outs", "write it into the personas that use the set")
    if isinstance(value, str) and value.lstrip().startswith("@"):
        raise Bad(f"{value!r}: a command set cannot use another one", "name both in the persona's command_whitelist")
    return parse_pattern(value)


def _of_policy(value: object) -> Pattern:
    if isinstance(value, str) and value.lstrip("! ").startswith("@"):
        raise Bad(f"{value!r}: command sets are for the command_whitelist of personas", "write its programs here")
    return parse_pattern(value)


def _of_whitelist(value: object) -> Pattern | str:
    """A pattern, or ``@NAME``."""
    source = value.strip() if isinstance(value, str) else ""
    if source.startswith("!") and source.removeprefix("!").lstrip().startswith("@"):
        raise Bad(f"{value!r}: a command set cannot be carved out", "carve out the programs, each by itself")
    if not source.startswith("@"):
        return parse_pattern(value)
    if not _USER.match(source[1:]):
        raise Bad(f"{value!r} names no command set", "'@' and the set's name, nothing after it")
    return source


def _with_sets(reader: Reader, *, accepted: bool) -> tuple[Whitelist, Expansion | None]:
    if accepted:
        return Whitelist(reader.each("command_whitelist", parse_pattern, WHITELIST_MAX)), None
    before = len(reader.findings)
    items = reader.each("command_whitelist", _of_whitelist, WHITELIST_MAX)
    own = Whitelist(tuple(item for item in items if not isinstance(item, str)))
    written = tuple(item if isinstance(item, str) else item.text for item in items)
    if len(reader.findings) > before:
        return own, None
    if len(own.patterns) == len(items):
        _note_pointless(reader, "command_whitelist", own.patterns)
        return own, None
    for index, item in enumerate(written):
        if item in written[:index]:
            reader.note(f"command_whitelist[{index}]", f"{item!r} is there twice", "remove one")
    return own, Expansion(written)


def _commands(reader: Reader, *, accepted: bool) -> Whitelist:
    before = len(reader.findings)
    patterns = reader.each("commands", parse_pattern if accepted else _of_policy, WHITELIST_MAX)
    if not accepted and len(reader.findings) == before:
        _note_pointless(reader, "commands", patterns)
    return Whitelist(patterns)


def _note_pointless(reader: Reader, name: str, patterns: tuple[Pattern, ...]) -> None:
    for index, message, fix in check_whitelist(patterns):
        reader.note(f"{name}[{index}]", message, fix)


def _name(value: Any) -> str:
    if not isinstance(value, str):
        fix = "one name, not several" if isinstance(value, (list, dict)) else "put it in quotes"
        raise Bad(f"expected a name, not {shown(value)}", fix)
    if not _USER.fullmatch(value):
        meant = re.sub(r"[^A-Za-z0-9._-]+", "-", value.strip()[:64]).strip("-")
        fix = f"did you mean '{meant}'?" if _USER.fullmatch(meant) and meant != value else ""
        fix = "one name, not several" if "," in value else fix
        raise Bad(f"{shown(value)} is not a valid name: a letter, then letters, digits, '.', '_', '-'; at most 64", fix)
    return value


def _subject(value: Any) -> str:
    if not isinstance(value, str):
        fix = "the name, not the number" if type(value) is int else "one name, in quotes"
        raise Bad(f"expected the name of a user or group, not {shown(value)}", fix)
    if not _SUBJECT.fullmatch(value):
        raise Bad(f"{shown(value)} is not a valid user or group name", _subject_meant(value))
    return value


def _subject_meant(value: str) -> str:
    if value[:1] in ("@", "%", "+") and _SUBJECT.fullmatch(value[1:]):
        return f"a group is listed under 'groups', plainly: {value[1:]}"
    if "," in value or " " in value:
        return "one name an entry: [alice, bob]"
    if "*" in value or "?" in value:
        return "no wildcards: list the names or a group, or '*' alone for everyone"
    return "a letter or '_', then letters, digits, '_', '.', '-'; or '*' for everyone"


def _vm(value: Any) -> str:
    if not isinstance(value, str):
        raise Bad(f"expected the name of a VM, not {shown(value)}", "put it in quotes")
    if not _GLOB.fullmatch(value):
        raise Bad(f"{shown(value)} is not a valid VM name: letters, digits, '.', '_', '-'", "'*' and '?' are wildcards")
    return value


def check_set(documents: Iterable[Document], known: Iterable[str] = ()) -> list[tuple[Document, Finding]]:
    """What is wrong between documents: names twice, policies whose persona is not there, nor a ``known`` one."""
    documents = list(documents)
    found: list[tuple[Document, Finding]] = []
    seen: set[tuple[type[Document], str]] = set()
    personas = {document.name for document in documents if isinstance(document, Persona)} | set(known)
    listed = ", ".join(sorted(personas)[:_NAMED_MAX]) + (", ..." if len(personas) > _NAMED_MAX else "")
    for document in documents:
        kind = type(document)
        if (kind, document.name) in seen:
            found.append((document, Finding("name", f"{kind.__name__} {document.name!r} is there twice")))
        seen.add((kind, document.name))
        if isinstance(document, Policy) and document.persona not in personas:
            close = close_to(document.persona, personas) if len(found) < _NAMED_MAX else ""  # a look at each of them
            fix = f"did you mean '{close}'?" if close else f"known: {listed}" if personas else "no persona is defined"
            found.append((document, Finding("persona", f"there is no persona {document.persona!r}", fix)))
    return found
