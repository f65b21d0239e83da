"""What a file's text says before anybody asks whether it is a persona or a policy."""

import re
from dataclasses import dataclass, field

from persona.parsing import SHOWN_MAX, Finding, Unread

DEPTH_MAX = 20
VALUES_MAX = 100_000  # fields, values and documents of one file
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,18})", re.ASCII)  # as many bytes as the most memory that may be asked
_FLOAT = re.compile(r"-?(?:0|[1-9][0-9]{0,17})\.[0-9]{1,30}", re.ASCII)


@dataclass(slots=True)
class Raw:
    """One document: plain values, and ``Unread`` where a value is not what its writer meant.

    ``lines`` has the line of each value by its path (``resource_limits.memory``).  ``findings`` is what is
    wrong with the names of fields, as one that is there twice, each with its line.
    """

    value: object = None
    lines: dict[str, int] = field(default_factory=dict)
    findings: list[tuple[int, Finding]] = field(default_factory=list)

    def note(self, path: str, line: int, message: str, fix: str) -> None:
        """Adds a finding."""
        self.findings.append((line, Finding(path, message, fix)))


class TextError(Exception):
    """The text cannot be read from this line on; ``documents`` are those before it."""

    def __init__(self, line: int, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.line = line
        self.finding = Finding("", message, fix)
        self.documents: tuple[Raw, ...] = ()


def number_of(text: str) -> int | float | Unread | None:
    """A number that is written as people do, or ``None``; one that is far too long is ``Unread``."""
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if re.fullmatch(r"-?[1-9][0-9]{19,}|-?[1-9][0-9]{18,}\.[0-9]+|-?[0-9]{1,18}\.[0-9]{31,}", text, re.ASCII):
        return Unread("a number of too many digits")
    return None


def child(path: str, key: str) -> str:
    """The path of a field below another; a key that is no field's name is cut and made printable."""
    plain = "".join(char if char.isprintable() else "?" for char in key[:SHOWN_MAX])
    return f"{path}.{plain}" if path else plain
