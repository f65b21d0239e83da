"""Tiny total functions that read a mapping field by field and collect everything that is wrong with it.

A document with three mistakes gets three findings, not one a try.  Nothing here knows what a persona
is; `documents` does.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from persona.problems import Fault, PersonaError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: where (``resource_limits.memory``), what, and how to mend it."""

    path: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        tail = f" ({self.fix})" if self.fix else ""
        return f"{self.path or 'document'}: {self.message}{tail}"


class DocumentError(PersonaError):
    """A document that is refused, with all its findings."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__(Fault.BAD_DOCUMENT, "; ".join(map(str, self.findings)))


class Bad(ValueError):
    """One value cannot be read; the reader that knows its path turns this into a finding."""

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix


class Reader:
    """Reads one mapping; wrong values are noted in ``findings`` and replaced by the default."""

    def __init__(self, value: object, known: Iterable[str], findings: list[Finding], path: str = "") -> None:
        self.findings = findings
        self._path = path
        self._fields: Mapping[str, Any] = {}
        if not isinstance(value, Mapping):
            self.note("", "expected a mapping of fields")
            return
        self._fields = value
        names = sorted(known)
        for key in value:
            if key not in names:
                self.note(str(key), "unknown field", f"known here: {', '.join(names)}")

    def at(self, name: str) -> str:
        """The full path of a field."""
        return ".".join(part for part in (self._path, name) if part)

    def note(self, name: str, message: str, fix: str = "") -> None:
        """Adds a finding about a field."""
        self.findings.append(Finding(self.at(name), message, fix))

    def raw(self, name: str) -> Any:
        """The field's value, or ``None``."""
        return self._fields.get(name)

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._fields.get(name) is not None

    def read(self, name: str, parse: Callable[[Any], T], default: T, *, required: bool = False) -> T:
        """``parse(value)``; a ``Bad`` that it raises becomes a finding and the default is returned."""
        value = self._fields.get(name)
        if value is None:
            if required:
                self.note(name, "missing")
            return default
        try:
            return parse(value)
        except Bad as error:
            self.note(name, error.message, error.fix)
            return default

    def each(self, name: str, parse: Callable[[Any], T], limit: int = 256) -> tuple[T, ...]:
        """Every item of a list field, parsed; items that are wrong are noted one by one."""
        value = self._fields.get(name)
        if value is None:
            return ()
        if not isinstance(value, list):
            self.note(name, "expected a list")
            return ()
        if len(value) > limit:
            self.note(name, f"{len(value)} items, at most {limit} are allowed")
            return ()
        items: list[T] = []
        for index, item in enumerate(value):
            try:
                items.append(parse(item))
            except Bad as error:
                self.note(f"{name}[{index}]", error.message, error.fix)
        return tuple(items)

    def below(self, name: str, known: Iterable[str]) -> "Reader":
        """A reader of a field that is itself a mapping; absent = empty."""
        value = self._fields.get(name)
        return Reader({} if value is None else value, known, self.findings, self.at(name))


def text(limit: int) -> Callable[[Any], str]:
    """A printable string of at most ``limit`` characters."""

    def parse(value: Any) -> str:
        if not isinstance(value, str):
            raise Bad(f"expected a string, not {type(value).__name__}", "put it in quotes")
        if len(value) > limit or not value.isprintable():
            raise Bad(f"expected at most {limit} printable characters")
        return value

    return parse


def integer(low: int, high: int) -> Callable[[Any], int]:
    """A whole number within bounds."""

    def parse(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise Bad(f"expected a whole number from {low} to {high}, not {value!r}")
        return value

    return parse


def number(low: float, high: float) -> Callable[[Any], float]:
    """A number within bounds."""

    def parse(value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise Bad(f"expected a number from {low:g} to {high:g}, not {value!r}")
        return float(value)

    return parse


def one_of(*choices: str) -> Callable[[Any], str]:
    """One of a few words."""

    def parse(value: Any) -> str:
        if value not in choices:
            raise Bad(f"expected one of {', '.join(choices)}, not {value!r}")
        return str(value)

    return parse
