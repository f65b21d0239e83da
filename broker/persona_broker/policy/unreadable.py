"""Stored documents that this broker cannot read, and what is still known of them.

A document was read when it was applied.  Later it may be refused: tzdata dropped its time zone, a newer
or older broker has other fields or stricter patterns, the file was damaged.  Such a document grants
nothing and takes nothing else down with it (docs/decisions/0014-documents-that-cannot-be-read.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from persona.canonical import digest as digest_of_document
from persona.canonical import digest_of
from persona.conditions import When, read_when
from persona.documents import Document, Expansion, Persona, Policy, parse_document, parse_order
from persona.parsing import Bad, Finding, Reader, text
from persona.patterns import PATTERN_MAX, WHITELIST_MAX, Whitelist, parse_pattern
from persona.problems import PersonaError
from persona.schema import POLICY, fields

PROBLEM_MAX = 400  # characters: a user reads it, and it travels with each denial
_EVERY_PROGRAM = Whitelist((parse_pattern("**"),))


@dataclass(frozen=True, slots=True)
class Unreadable:
    """One stored document that cannot be read.

    ``kind``, ``name`` and ``version`` are those of its row.  ``policy`` is what could be read of a policy:
    whom it is for, and so whose requests it has a say about; ``None`` where not even that is known, and
    for personas.  ``conditions_unknown``: its ``when`` is what cannot be read.  ``order_known``: whether
    ``order``, or that it has none, could be read.
    """

    kind: str
    name: str
    version: int
    problem: str
    policy: Policy | None = None
    conditions_unknown: bool = False
    order: int | None = None  # of a policy
    order_known: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {self.name} (version {self.version}) cannot be read: {self.problem}"


def read_stored(
    kind: str,
    name: str,
    version: int,
    load: Callable[[], Any],
    load_expansion: Callable[[], Any] | None = None,
    digest: str | None = None,
) -> Document | Unreadable:
    """The document of a row, whose JSON ``load`` returns, or what is wrong with it.  Raises nothing.

    ``load_expansion`` returns the JSON of the ``Expansion`` of a persona that uses command sets.  ``digest`` is that
    of what was applied; it is not compared where it is ``None``.
    """
    value: object = None
    try:
        value = load()
        expansion = load_expansion() if load_expansion is not None else None
        document = parse_document(value, accepted=True)
        if isinstance(document, Persona) and expansion is not None:
            document = _with_expansion(document, expansion)
        problem = f"it says {type(document).__name__} {document.name!r} of itself"
        if (type(document).__name__, document.name) == (kind, name):
            # by its text, as whichever version wrote it, and by its meaning, where the same is written otherwise
            if digest is None or stored_digest(value, expansion) == digest or digest_of_document(document) == digest:
                return document
            problem = "its text is not the one that was applied: that has another digest"
    except PersonaError as error:
        problem = error.message
    except Exception as error:  # whatever a stored text sets off, also in the parser, stays with that document
        problem = f"not a document: {type(error).__name__}: {error}"
    problem = "".join(char if char.isprintable() else "?" for char in problem)
    problem = problem if len(problem) <= PROBLEM_MAX else problem[: PROBLEM_MAX - 1] + "…"
    policy, unknown = _rest(name, value) if kind == "Policy" else (None, False)
    return Unreadable(kind, name, version, problem, policy, unknown, *_order(value))


def stored_digest(value: Any, expansion: Any) -> str:
    """That of a stored text, however a version reads it.  Raises ``TypeError``, ``LookupError`` for another value."""
    return digest_of({**value}, None if expansion is None else (expansion["written"], expansion["origins"]))


def expansion_mapping(document: Document) -> dict[str, Any] | None:
    """What ``load_expansion`` gives back."""
    if not isinstance(document, Persona) or document.expansion is None:
        return None
    return {"written": list(document.expansion.written), "origins": list(document.expansion.origins)}


def _with_expansion(persona: Persona, value: Any) -> Persona:
    """Raises ``ValueError``, ``TypeError``, ``LookupError``: of it not even a part is believed."""
    written, origins = (tuple(map(_text, value[field])) for field in ("written", "origins"))
    patterns = persona.command_whitelist.patterns
    own = {pattern.text for pattern, origin in zip(patterns, origins, strict=False) if not origin}
    complete = own == {entry for entry in written if not entry.startswith("@")}
    if len(origins) != len(patterns) or not complete:
        raise ValueError("what it has from which command set does not fit it")
    if not {f"@{origin}" for origin in origins if origin} <= set(written):
        raise ValueError("it has something from a command set that it does not use")
    return replace(persona, expansion=Expansion(written, origins))


_text = text(PATTERN_MAX)


def _order(value: object) -> tuple[int | None, bool]:
    if not isinstance(value, Mapping):
        return None, False
    found = value.get("order")
    try:
        return (None if found is None else parse_order(found)), True
    except Bad:
        return None, False


def _rest(name: str, value: object) -> tuple[Policy | None, bool]:
    """What can be read of a policy, widest where something cannot, and whether its ``when`` cannot."""
    if not isinstance(value, Mapping):
        return None, False
    subjects = value.get("subjects")
    users, groups = (_texts(subjects.get(who)) if isinstance(subjects, Mapping) else () for who in ("users", "groups"))
    if not users and not groups:
        return None, False
    findings: list[Finding] = []
    try:
        load_fields, health_fields = fields(POLICY, "when", "host_load", "cpu"), fields(POLICY, "when", "vm_health")
        reader = Reader(value, value, findings).below("when", fields(POLICY, "when"))
        when = read_when(reader, load_fields, health_fields)
    except Exception:  # as above: nothing of a stored text gets further
        when, findings = When(), [Finding("when", "cannot be read")]
    vms, persona = value.get("vms"), value.get("persona")
    readable = isinstance(vms, list) and all(isinstance(vm, str) for vm in vms)
    policy = Policy(
        name=name,
        users=users,
        groups=groups,
        commands=_commands(value.get("commands")),
        vms=tuple(vms) if readable and isinstance(vms, list) else ("*",),
        when=When() if findings else when,
        persona=persona if isinstance(persona, str) else "",
    )
    return policy, bool(findings)


def _texts(value: object) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def _commands(value: object) -> Whitelist:
    if not isinstance(value, list) or len(value) > WHITELIST_MAX:
        return _EVERY_PROGRAM
    try:
        return Whitelist(tuple(map(parse_pattern, value)))
    except Bad:
        return _EVERY_PROGRAM
