"""Patterns for programs in a user's home, as a persona's ``home_programs`` has them: ``.vscode-server/**/node``.

A pattern is a path below the home, with the wildcards that path words have elsewhere (``persona/wildcards.py``), but
for sets.  ``**`` is a component of its own here.
"""

from dataclasses import dataclass

from persona.parsing import Bad
from persona.wildcards import matches

HOME_PATTERN_MAX = 1024  # characters
_RESERVED = frozenset("[]{}\\'\"!~$")  # what people may take for a wildcard, a quote, a carve-out or a variable


@dataclass(frozen=True, slots=True)
class HomePattern:
    """One pattern."""

    text: str

    def __str__(self) -> str:
        return self.text

    def matches(self, path: str) -> bool:
        """Whether a path below the home (``.vscode-server/bin/x/node``) fits."""
        return matches("/" + path, "/" + self.text)


def is_below(path: str) -> bool:
    """Whether it is a plain path below a directory: relative, without ``.``, ``..`` or empty components."""
    return bool(path) and not any(part in ("", ".", "..") for part in path.split("/"))


def parse_home_program(value: object) -> HomePattern:
    """Reads one pattern.  Raises ``Bad`` for one that is malformed or could never match."""
    if not isinstance(value, str) or not value:
        raise Bad(f"expected a path below the user's home, not {value!r}", 'like ".vscode-server/**/node"')
    if len(value) > HOME_PATTERN_MAX or not value.isprintable() or value != value.strip():
        raise Bad(f"{value[:80]!r}: expected at most {HOME_PATTERN_MAX} printable characters, no space around them")
    if value.startswith(("/", "~", "$")):
        raise Bad(f"{value!r}: the path begins below the home", "leave out '/', '~/' or '$HOME/' at the beginning")
    if not is_below(value):
        raise Bad(f"{value!r}: a path with '.', '..' or an empty part never matches", "write it plainly")
    reserved = sorted(_RESERVED.intersection(value))
    if reserved:
        raise Bad(f"{value!r}: {reserved[0]} has no meaning here", "the wildcards are '*', '?' and '**'")
    if any("**" in part and part != "**" for part in value.split("/")):
        raise Bad(f"{value!r}: '**' is a directory of its own", "write 'a/**/b', or '*' within one name")
    return HomePattern(value)
