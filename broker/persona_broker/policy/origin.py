"""Where a document is written: the file, as it is called within what was applied, and the line that it begins in."""

from dataclasses import dataclass

from persona.shown import line as printable

FILE_MAX = 200  # characters: it travels with each denial


@dataclass(frozen=True, slots=True)
class Origin:
    """``10-analysts.yaml:3``; ``file`` is empty where nobody knows."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else ""


NOWHERE = Origin("", 0)


def origin(name: str, number: int) -> Origin:
    """Of a file's name, which may be anything, only what prints; of a long one the end, which tells files apart."""
    shown = printable(name)
    return Origin(shown if len(shown) <= FILE_MAX else "…" + shown[1 - FILE_MAX :], number)


def named(name: str, where: str) -> str:
    """A document's name with its origin behind it, where that is known."""
    return f"{name} ({where})" if where else name
