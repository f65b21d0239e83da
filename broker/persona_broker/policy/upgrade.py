"""Which entries of documents mean another thing to this version than to 0.1, by how they are written.

A rule about the text, and no copy of the old matcher: it names every entry whose meaning may differ, and no other
(``tests/broker/test_upgrade.py`` compares the two).  Pure.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from persona.called_names import listed, siblings
from persona.documents import parse_document
from persona.parsing import Bad, DocumentError
from persona.patterns import parse_pattern
from persona.wildcards import Among, Word, split

_FIELDS = {"Persona": "command_whitelist", "Policy": "commands"}
_ANYTHING = "its wildcards match any text, '/' and '..' too"


@dataclass(frozen=True, slots=True)
class Difference:
    """One field of a document: what it meant to 0.1, and what it means now.  ``pattern``: empty for other fields."""

    field: str
    pattern: str
    old: str
    new: str

    def __str__(self) -> str:
        entry = f" '{self.pattern}':" if self.pattern else ""
        return f"{self.field}:{entry} so far, {self.old}; from now on, {self.new}"


@dataclass(frozen=True, slots=True)
class Found:
    """What changes in a document: entries that mean another thing, and ``names`` of files with several."""

    differences: tuple[Difference, ...]
    names: tuple[Difference, ...]


def compare(kind: str, body: object) -> Found:
    """Returns the patterns of a document whose meaning changes; none for a value that is not a document."""
    field = _FIELDS.get(kind)
    entries = body.get(field) if field is not None and isinstance(body, Mapping) else None
    texts: list[Any] = entries if isinstance(entries, list) else []
    differences, names = [], []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            continue
        where = f"{field}[{index}]"
        differences += [Difference(where, text, old, new) for old, new in itertools.islice(_changes(text), 1)]
        names += [Difference(where, text, old, new) for old, new in _names(text)]
    return Found(tuple(differences), tuple(names))


def refused(kind: str, body: object) -> tuple[Difference, ...]:
    """Fields beside the patterns that 0.1 stored and this version does not read: an interface in a network rule."""
    if kind not in _FIELDS or not isinstance(body, Mapping):
        return ()
    try:
        parse_document(body, accepted=True)
    except DocumentError as error:
        return tuple(
            Difference(item.path, "", "it is read", f"it is refused ({item.message}), and the document grants nothing")
            for item in error.findings
            if not item.path.startswith(f"{_FIELDS[kind]}[")
        )
    return ()


def _words(text: str) -> tuple[Word, ...]:
    try:
        return split(text.strip().removeprefix("!"))
    except ValueError:  # 0.1 could not read it either
        return ()


def _changes(text: str) -> Iterator[tuple[str, str]]:
    words = _words(text)
    negative = text.strip().startswith("!")
    changes = (
        [*_of_program(words[0]), *(change for word in words[1:] for change in _of_argument(word, negative))]
        if words
        else []
    )
    try:
        parse_pattern(text)
    except Bad as error:
        if changes or any(".." in word.text for word in words):
            yield "it is read", f"it is refused ({error.message}), and the document grants nothing"
        return
    yield from changes


def _of_program(word: Word) -> Iterator[tuple[str, str]]:
    if any(isinstance(token, str) and ("*" in token or "?" in token) for token in word.tokens):
        yield "its quoted wildcard is a wildcard", f"'{word}' is the one program that is called so"
    elif any(isinstance(token, Among) for token in word.tokens):
        yield "its brackets are characters of the path", f"'{word}' has a set, which stands for one of its characters"


def _of_argument(word: Word, negative: bool) -> Iterator[tuple[str, str]]:
    if word.is_many and word.text != "**":  # three stars and more
        yield "it matches one argument", f"'{word.text}' is '**', any number of arguments"
    if word.is_any or word.is_many:
        return
    quoted = [token for token in word.tokens if isinstance(token, str)]
    if any("*" in token or "?" in token for token in quoted) or (
        any("[" in token for token in quoted) and "]" in word.text
    ):
        yield "its quoted wildcards are wildcards", f"in '{word}' they are ordinary characters"
    elif word.is_path and not word.is_literal:
        new = f"in '{word}' '*' stays within one directory, and '**' does not"
        also = "it also matches each argument with '..', and other ways to write the same path"
        yield _ANYTHING, f"{new}; as a carve-out {also}" if negative else f"{new} and '..' is never matched"
    elif word.is_path and negative:
        yield "it matches this text only", f"'{word}' also matches each argument with '..', '//' and '/./' as well"
    elif any(isinstance(token, Among) and "^" in word.text for token in word.tokens):
        yield "'^' is a character of its set", f"in '{word}' '^' at the beginning of a set means 'not one of these'"
    elif any(isinstance(token, Among) for token in word.tokens) and not _is_read_alike(word):
        yield "its quotes in a set change nothing", f"in '{word}' what is quoted in a set is one of its characters"


def _is_read_alike(word: Word) -> bool:
    """Whether a word means the same without its quotes, which 0.1 took away before it looked for sets."""
    try:
        return [again.tokens for again in split(word.text)] == [word.tokens]
    except ValueError:  # it has a quote among its characters
        return False


def _names(text: str) -> Iterator[tuple[str, str]]:
    words = _words(text)
    if not words or not words[0].is_literal:
        return
    name = words[0].text.rpartition("/")[2]
    others = siblings(name)
    if others:
        does = "refuses" if text.strip().startswith("!") else "allows"
        yield (
            f"it {does} {listed(others)}, too, where they are the same file",
            f"it {does} only what is called {name!r}",
        )
