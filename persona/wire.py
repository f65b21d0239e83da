"""Two versions at once: which version of the protocol each side speaks, and what an older side is told instead.

Guest and broker each name the newest version that they know, in the header ``Persona-Wire`` of every request and
every answer; both then use the lower of the two.  Who names none is 0.1.0, which refuses every field, reason and
pattern that it does not know.  From version 2 on a reader skips or keeps what it does not know
(docs/decisions/0017-two-versions-at-once.md), so what must be said here of something new is little:

* a field of a persona document: a line in ``PERSONA_FIELDS``;
* a reason: a line in ``REASONS_OF_0_1_0``;
* a field of a record or of a health report: a default value in its class, nothing here;
* a field of an event or of an answer: nothing here;
* a field of a request: the guest sends it only where ``wire`` is at least the version that has it.
"""

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from persona.problems import AnyReason, Fault, PersonaError, Reason

HEADER = "Persona-Wire"
FIRST = 1  # 0.1.0, which names no version
CURRENT = 2  # 0.2.0: groups in use, ELF loaders, programs in homes, open reasons and events, numbered records
RELEASES = {FIRST: "0.1.0", CURRENT: "0.2.0"}  # the first release that speaks each version

_CURRENT = str(CURRENT)
_NUMBER = re.compile(r"[1-9][0-9]{0,3}", re.ASCII)


class WireError(PersonaError):
    """A header that names no version of the protocol."""


def common(named: str | None) -> int:
    """The newest version that both sides know, by what the other side's header says; ``None`` = it says nothing.

    Raises ``WireError`` for a header that is no version.
    """
    if named == _CURRENT:  # nearly always, and once a decision
        return CURRENT
    if named is None:
        return FIRST
    if not _NUMBER.fullmatch(named):
        raise WireError(Fault.BAD_REQUEST, f"{HEADER}: expected a whole number from 1, not {named[:40]!r}")
    return min(int(named), CURRENT)


# --- reasons ----------------------------------------------------------------------------------------

# What 0.1.0 is told instead of a reason that it does not know; it would refuse the whole answer, or all records
# that come with it.  Later versions show a reason that they do not know as it is.
REASONS_OF_0_1_0: Mapping[Reason, Reason] = {
    Reason.INVALID_POLICY: Reason.INVALID_PERSONA,
    Reason.GUEST_QUARANTINED: Reason.SESSION_REVOKED,
    Reason.AUDIT_FULL: Reason.AGENT_OVERLOADED,
}
_OTHERWISE = Reason.NO_MATCHING_POLICY  # for a reason that this version does not know itself


def reason_for(reason: AnyReason, wire: int) -> str:
    """The code of a reason as the other side can read it."""
    if wire > FIRST:
        return str(reason)
    return str(REASONS_OF_0_1_0.get(reason, reason) if isinstance(reason, Reason) else _OTHERWISE)


# --- documents --------------------------------------------------------------------------------------


class Effect(StrEnum):
    """What a field of a persona does to what its users may do, by comparison with its absence."""

    WIDENS = "widens"  # an agent that does not know it may be left without it
    RESTRICTS = "restricts"  # an agent that does not know it cannot keep it: nothing is granted there


@dataclass(frozen=True, slots=True)
class NewField:
    """A field that agents before version ``since`` of the protocol do not know."""

    since: int
    effect: Effect


# By the field's path in the document, dotted: "resource_limits.gpu".
PERSONA_FIELDS: Mapping[str, NewField] = {
    "home_programs": NewField(2, Effect.WIDENS),
}


@dataclass(frozen=True, slots=True)
class Unsuited:
    """A persona that an agent cannot keep; ``problem`` says why and what helps."""

    problem: str


def persona_for(
    document: Mapping[str, Any], wire: int, fields: Mapping[str, NewField] | None = None
) -> Mapping[str, Any] | Unsuited:
    """A persona document as an agent of version ``wire`` can read it, never allowing more than the whole does.

    ``fields``: ``PERSONA_FIELDS``, where they are not named.
    """
    told: Mapping[str, Any] = document
    for path, field in (PERSONA_FIELDS if fields is None else fields).items():
        if field.since <= wire or not _has(told, path.split(".")):
            continue
        if field.effect is Effect.RESTRICTS:
            return Unsuited(f"this VM's agent does not know {path} and cannot keep it; {_upgrade(field.since)}")
        told = _without(told, path.split("."))
    if wire > FIRST:
        return told
    reduced = patterns_for(told["command_whitelist"], wire)
    if isinstance(reduced, Unsuited):
        return reduced
    return {**told, "command_whitelist": _consistent(reduced.texts)}


def _upgrade(wire: int) -> str:
    return f"upgrade persona-guest there to {RELEASES.get(wire, 'the newest')} or later"


def _has(document: Mapping[str, Any], path: list[str]) -> bool:
    value: Any = document
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            return False
        value = value[name]
    return True


def _without(document: Mapping[str, Any], path: list[str]) -> Mapping[str, Any]:
    name, *rest = path
    if rest:
        return {**document, name: _without(document[name], rest)}
    return {key: value for key, value in document.items() if key != name}


# --- patterns, as 0.1.0 reads them ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reduced:
    """Patterns that an agent can read.

    ``left_out`` are carve-outs for the programs of the patterns that it cannot: where the patterns are a policy's
    ``commands``, they belong to the policies after it, which would speak for those programs otherwise.
    """

    texts: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def patterns_for(texts: Iterable[str], wire: int) -> Reduced | Unsuited:
    """What an agent can read of patterns: one that it cannot read is left out, a carve-out takes its whole program.

    One that it reads, and more widely than this version, is told as it is.  Agents decide nothing by patterns: they
    show them, and find by them under which persona a running process goes on.
    """
    if wire > FIRST:
        return Reduced(tuple(texts))
    kept: list[str] = []
    left_out: list[str] = []
    for text in texts:
        if _first(text) is not None:
            kept.append(text)
            continue
        carve_out = _whole_program(text)
        if carve_out is None:
            return Unsuited(f"this VM's agent cannot read the pattern {text[:80]!r}; {_upgrade(CURRENT)}")
        (kept if text.startswith("!") else left_out).append(carve_out)
    return Reduced(tuple(kept), tuple(left_out))


def _whole_program(text: str) -> str | None:
    """The carve-out of whatever a pattern's program is started with; ``None`` where 0.1.0 cannot read that either."""
    try:
        word = shlex.split(text.removeprefix("!"))[0]
        carve_out = "!" + (word if shlex.split(word) == [word] else shlex.quote(word))
    except (ValueError, IndexError):
        return None
    return carve_out if _first(carve_out) is not None else None


@dataclass(frozen=True, slots=True)
class _First:
    """A pattern as 0.1.0 reads it; ``key`` is a bare name or a path without wildcards, else ``None``."""

    negative: bool
    key: str | None
    any_program: bool
    any_arguments: bool


_GLOB = re.compile(r"[*?\[]")
_USR_MERGED = re.compile(r"^/(bin|sbin|lib|lib32|lib64|libx32)(?=/)")


def _first(text: str) -> _First | None:
    """The pattern as 0.1.0 reads it; ``None`` where it refuses it."""
    if not text.isprintable() or len(text) > 4096:
        return None
    try:
        words = shlex.split(text.removeprefix("!"))
    except ValueError:
        return None
    if not words or not words[0] or len(words) > 128:
        return None
    program, *arguments = words
    if "**" in arguments[:-1] or (program == "**" and arguments):
        return None
    if program != "**" and not _is_program(program):
        return None
    key = None if _GLOB.search(program) else _USR_MERGED.sub(r"/usr/\1", program)
    return _First(text.startswith("!"), key, program == "**", arguments in ([], ["**"]))


def _is_program(word: str) -> bool:
    if not word.startswith("/"):
        return "/" not in word and not _GLOB.search(word)
    return "**" not in word and not any(part in ("", ".", "..") for part in word[1:].split("/"))


def _consistent(texts: tuple[str, ...]) -> list[str]:
    """The whitelist without what 0.1.0 calls pointless, for which it would refuse the whole document."""
    read = {text: first for text in texts if (first := _first(text)) is not None}  # nothing twice
    if any(first.negative and first.any_program for first in read.values()):
        return []
    wholly = {first.key for first in read.values() if first.negative and first.any_arguments and first.key}
    read = {text: first for text, first in read.items() if first.negative or first.key not in wholly}
    named = {first.key for first in read.values() if not first.negative}
    return [text for text, first in read.items() if not first.negative or not first.key or named & {None, first.key}]
