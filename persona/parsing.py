"""Tiny total functions that read a mapping field by field and collect everything that is wrong with it.

A document with three mistakes gets three findings, not one a try.  Nothing here knows what a persona
is; `documents` does.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from persona.problems import Fault, PersonaError

T = TypeVar("T")
SHOWN_MAX = 80  # characters of a wrong value that a message repeats
_UNKNOWN_MAX = 20  # unknown fields of one mapping that are named


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


@dataclass(frozen=True, slots=True)
class Unread:
    """What stands in a field's place where the file's format would have changed what its writer meant.

    Whoever reads the field says so, and never takes it for a value.
    """

    message: str
    fix: str = ""


# What people write in place of a field: (path, value) to the advice, or "" where there is none.
Advice = Callable[[str, Any], str]


def no_advice(_path: str, _value: Any) -> str:
    """For documents of which nobody has said what people guess."""
    return ""


def shown(value: object) -> str:
    """A wrong value for a message: at most ``SHOWN_MAX`` characters on one line; lists and mappings by name only."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping of fields"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"  # Python refuses to write out one of more than 4300
    text = repr(value if not isinstance(value, str) else value[:SHOWN_MAX])
    return text if len(text) <= SHOWN_MAX + 2 else text[: SHOWN_MAX - 1] + "..."


def close_to(word: str, known: Iterable[str]) -> str:
    """The one of ``known`` that somebody who wrote ``word`` most likely meant, or ``""``."""
    from difflib import get_close_matches  # only for an error: the login shell need not load it

    by_plain = {_plain(name): name for name in known}
    found = get_close_matches(_plain(word[:SHOWN_MAX]), by_plain, 1, 0.7)
    return by_plain[found[0]] if found else ""


def _plain(word: str) -> str:
    return word.lower().replace("-", "_").replace(" ", "_")


class Reader:
    """Reads one mapping; wrong values are noted in ``findings`` and replaced by the default."""

    def __init__(
        self,
        value: object,
        known: Iterable[str],
        findings: list[Finding],
        path: str = "",
        advice: Advice = no_advice,
    ) -> None:
        self.findings = findings
        self._path = path
        self._fields: Mapping[str, Any] = {}
        self._advice = advice
        self._refused = True  # as a whole: then no field is missing
        if isinstance(value, Unread):
            self.note("", value.message, value.fix)
            return
        if not isinstance(value, Mapping):
            fix = advice(path, value) or f"one of {', '.join(sorted(known))}, each with its value"
            self.note("", f"expected a mapping of fields, not {shown(value)}", fix)
            return
        self._fields, self._refused = value, False
        names = sorted(known)
        unknown = [key for key in value if key not in names]
        for key in unknown[:_UNKNOWN_MAX]:
            name = str(key)[:SHOWN_MAX]
            close = close_to(name, names)
            fix = advice(self.at(name), value[key]) or (f"did you mean '{close}'?" if close else "")
            self.note(name, "unknown field", fix or f"known here: {', '.join(names)}")
        if len(unknown) > _UNKNOWN_MAX:
            self.note("", f"{len(unknown) - _UNKNOWN_MAX} more unknown fields", f"known here: {', '.join(names)}")

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
            if required and not self._refused:
                self.note(name, "missing")
            return default
        if isinstance(value, Unread):
            self.note(name, value.message, value.fix)
            return default
        try:
            return parse(value)
        except Bad as error:
            self.note(name, error.message, error.fix or self._advice(self.at(name), value))
            return default

    def each(self, name: str, parse: Callable[[Any], T], limit: int = 256) -> tuple[T, ...]:
        """Every item of a list field, parsed; items that are wrong are noted one by one."""
        value = self._fields.get(name)
        if value is None:
            return ()
        if isinstance(value, Unread):
            self.note(name, value.message, value.fix)
            return ()
        if not isinstance(value, list):
            fix = self._advice(self.at(name), value) or _as_list(value)
            self.note(name, f"expected a list, not {shown(value)}", fix)
            return ()
        if len(value) > limit:
            self.note(name, f"{len(value)} items, at most {limit} are allowed")
            return ()
        items: list[T] = []
        for index, item in enumerate(value):
            if isinstance(item, Unread):
                self.note(f"{name}[{index}]", item.message, item.fix)
                continue
            try:
                items.append(parse(item))
            except Bad as error:
                self.note(f"{name}[{index}]", error.message, error.fix)
        return tuple(items)

    def below(self, name: str, known: Iterable[str]) -> "Reader":
        """A reader of a field that is itself a mapping; absent = empty."""
        value = self._fields.get(name)
        return Reader({} if value is None else value, known, self.findings, self.at(name), self._advice)


def _as_list(value: Any) -> str:
    """How to write a list of what stands there."""
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= SHOWN_MAX:
        return "[FIRST, SECOND], or one a line with '- ' before it"
    items = [item.strip() for item in value.split(",") if item.strip()]
    return f"write [{', '.join(map(repr, items))}]"


def text(limit: int) -> Callable[[Any], str]:
    """A printable string of at most ``limit`` characters."""

    def parse(value: Any) -> str:
        if not isinstance(value, str):
            raise Bad(f"expected text, not {shown(value)}", "put it in quotes")
        if len(value) > limit or not value.isprintable():
            fix = "one line; for a text over several write '>-' after the colon" if "\n" in value else ""
            raise Bad(f"expected at most {limit} printable characters", fix)
        return value

    return parse


def integer(low: int, high: int) -> Callable[[Any], int]:
    """A whole number within bounds."""

    def parse(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise Bad(f"expected a whole number from {low} to {high}, not {shown(value)}", _unquoted(value))
        return value

    return parse


def number(low: float, high: float) -> Callable[[Any], float]:
    """A number within bounds."""

    def parse(value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise Bad(f"expected a number from {low:g} to {high:g}, not {shown(value)}", _unquoted(value))
        return float(value)

    return parse


def one_of(*choices: str) -> Callable[[Any], str]:
    """One of a few words."""

    def parse(value: Any) -> str:
        if value not in choices:
            close = close_to(value, choices) if isinstance(value, str) else ""
            fix = f"did you mean '{close}'?" if close else ""
            raise Bad(f"expected one of {', '.join(choices)}, not {shown(value)}", fix)
        return str(value)

    return parse


def _unquoted(value: Any) -> str:
    """How to write the number that a text holds, or ``""`` where it holds none."""
    bare = value.strip().removesuffix("%").rstrip() if isinstance(value, str) else ""
    plain = bare.isascii() and bare.replace(".", "", 1).isdigit() and len(bare) < 20
    return f"without quotes and '%': {bare.lstrip('0') or '0'}" if plain else ""
