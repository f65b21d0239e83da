"""Command sets in the whitelists of personas: what a persona is once each ``@NAME`` is what it stands for."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from persona.documents import CommandSet, Expansion, Persona
from persona.parsing import DocumentError, Finding
from persona.patterns import WHITELIST_MAX, Pattern, Whitelist, check_whitelist, parse_pattern


def used(persona: Persona) -> tuple[str, ...]:
    """The names of the sets that a persona uses, in order."""
    written = persona.expansion.written if persona.expansion else ()
    return tuple(entry[1:] for entry in written if entry.startswith("@"))


def expand(persona: Persona, sets: Mapping[str, CommandSet], untold: Collection[str] = ()) -> Persona:
    """The persona with the commands of its sets, also where it was expanded before; itself where nothing changes.

    Raises ``DocumentError``, with the places as written, for sets that are not there (but ``untold`` ones,
    which stand for nothing) and for a whitelist that would be too long.
    """
    if persona.expansion is None:
        return persona
    written = persona.expansion.written
    own = {pattern.text: pattern for pattern in persona.command_whitelist.patterns}
    taken = {entry for entry in written if not entry.startswith("@")}  # the author's own entry counts as theirs
    found: list[tuple[Pattern, str]] = []
    findings = []
    for index, entry in enumerate(written):
        if not entry.startswith("@"):
            found.append((own.get(entry) or parse_pattern(entry), ""))
            continue
        used_set = sets.get(entry[1:])
        if used_set is None:
            if entry[1:] not in untold:
                fix = f"known: {', '.join(sorted(sets))}" if sets else "no command set is defined"
                findings.append(Finding(f"command_whitelist[{index}]", f"there is no command set {entry[1:]!r}", fix))
            continue
        for pattern in used_set.commands.patterns:
            if pattern.text not in taken:
                taken.add(pattern.text)
                found.append((pattern, used_set.name))
    if len(found) > WHITELIST_MAX:
        message = f"{len(found)} entries with those of its sets, at most {WHITELIST_MAX} are allowed"
        findings.append(Finding("command_whitelist", message))
    if findings:
        raise DocumentError(findings)
    expansion = Expansion(written, tuple(origin for _, origin in found))
    expanded = replace(
        persona, command_whitelist=Whitelist(tuple(pattern for pattern, _ in found)), expansion=expansion
    )
    return persona if expanded == persona else expanded


def pointless(persona: Persona) -> list[Finding]:
    """Entries of the author's own without effect in an expanded persona.

    That a carve-out takes an entry of a set away is what carve-outs are for.
    """
    expansion = persona.expansion
    if expansion is None:
        return []
    patterns = persona.command_whitelist.patterns
    return [
        Finding(f"command_whitelist[{expansion.place(index, patterns[index].text)}]", message, fix)
        for index, message, fix in check_whitelist(patterns)
        if not expansion.origins[index]
    ]


def by_set(persona: Persona) -> dict[str, list[str]]:
    """The patterns that each set brought into the whitelist."""
    found: dict[str, list[str]] = {}
    origins = persona.expansion.origins if persona.expansion else ()
    for pattern, origin in zip(persona.command_whitelist.patterns, origins, strict=False):
        if origin:
            found.setdefault(origin, []).append(pattern.text)
    return found
