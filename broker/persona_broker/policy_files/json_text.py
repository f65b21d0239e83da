"""Reads JSON as RFC 8259 has it, with the line of each value: tabs are white space, a field is there once,
and there is no NaN, no comment and no comma after the last value.
"""

import re
from collections.abc import Iterator
from json import JSONDecodeError, JSONDecoder

from persona.parsing import Unread
from persona_broker.policy_files.raw import DEPTH_MAX, VALUES_MAX, Raw, TextError, child, number_of

_SPACE = re.compile(r"[ \t\n\r]*")
_WORD = re.compile(r"[A-Za-z0-9+.\-_]{1,400}", re.ASCII)
_STRINGS = JSONDecoder()  # where a string begins it reads that string, and nothing else
_WORDS = ("null", "true", "false")


def read_json(text: str) -> list[Raw]:
    """The document of a text, or those of its list.  Raises ``TextError``."""
    return _Reader(text).read()


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0  # index of what comes next
        self._counted = 0  # index up to which lines are counted
        self._line = 1
        self._values = 0

    def read(self) -> list[Raw]:
        documents = []
        if self._peek() == "[":
            for _ in self._items("]"):
                documents.append(self._document())
        elif self._peek():
            documents.append(self._document())
        if self._peek():
            raise self._error("more text after the end of the document", "several documents are a list: [{...}, {...}]")
        return documents

    def _document(self) -> Raw:
        raw = Raw()
        raw.value = self._value(raw, "", 0)
        return raw

    def _peek(self) -> str:
        """The next character that is not white space, or ``""``."""
        match = _SPACE.match(self._text, self._at)
        self._at = match.end() if match else self._at
        return self._text[self._at : self._at + 1]

    def _here(self) -> int:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def _error(self, message: str, fix: str = "") -> TextError:
        return TextError(self._here(), message, fix)

    def _items(self, end: str) -> Iterator[None]:
        """Steps into a list or an object; each turn stands before an item."""
        self._at += 1
        if self._peek() == end:
            self._at += 1
            return
        while True:
            yield
            found = self._peek()
            if found not in (",", end):
                raise self._expected(f"',' or '{end}'")
            self._at += 1
            if found == end:
                return
            if self._peek() in ("]", "}"):
                raise self._error("a comma after the last value", "remove it")

    def _expected(self, what: str) -> TextError:
        found = self._peek()
        fix = {"/": "JSON has no comments", "#": "JSON has no comments", "'": 'JSON has double quotes only: "'}.get(
            found
        )
        if found and not fix and _WORD.match(self._text, self._at):
            fix = 'names and texts are put in double quotes: "'
        return self._error(f"expected {what}, not {repr(found) if found else 'the end of the file'}", fix or "")

    def _value(self, raw: Raw, path: str, depth: int) -> object:
        first = self._peek()
        line = self._here()
        raw.lines.setdefault(path, line)
        self._values += 1
        if depth > DEPTH_MAX or self._values > VALUES_MAX:
            what = "too many values" if depth <= DEPTH_MAX else "nested too deeply"
            raise self._error(what, f"at most {VALUES_MAX} fields and values in a file, {DEPTH_MAX} levels")
        if first == "{":
            return self._object(raw, path, depth)
        if first == "[":
            items: list[object] = []
            for _ in self._items("]"):
                items.append(self._value(raw, f"{path}[{len(items)}]", depth + 1))
            return items
        if first == '"':
            return self._string()
        word = _WORD.match(self._text, self._at)
        if word is None:
            raise self._expected("a value")
        if word[0] in _WORDS:
            self._at = word.end()
            fix = "leave the field away for its default" if word[0] == "null" else "no field is true or false"
            return Unread(f"{word[0]} is not a value here", fix)
        number = _number(word[0])
        if number is None:
            raise self._error(f"{word[0][:60]} is not a value of JSON", "a text is put in double quotes")
        self._at = word.end()
        return number

    def _object(self, raw: Raw, path: str, depth: int) -> dict[str, object]:
        mapping: dict[str, object] = {}
        for _ in self._items("}"):
            if self._peek() != '"':
                raise self._expected("the name of a field in double quotes")
            line = self._here()
            key = self._string()
            where = child(path, key)
            if self._peek() != ":":
                raise self._expected("':'")
            self._at += 1
            again = key in mapping
            self._values += 1
            if again:
                raw.note(where, line, f"is there twice, first in line {raw.lines[where]}", "remove one")
            kept = Raw() if again else raw  # what is refused leaves no lines behind
            kept.lines[where] = line
            value = self._value(kept, where, depth + 1)
            mapping.setdefault(key, value)
        return mapping

    def _string(self) -> str:
        try:
            text, self._at = _STRINGS.raw_decode(self._text, self._at)
        except JSONDecodeError as error:
            self._at = min(error.pos, len(self._text))
            said = error.msg.removesuffix(" at").removesuffix(" starting")
            fix = 'it ends with a double quote: "' if "nterminated" in said else "a line break in a text is written \\n"
            raise self._error(said, "" if "escape" in said else fix) from None
        return str(text)


def _number(text: str) -> int | float | Unread | None:
    plain = number_of(text)
    if plain is not None:
        return plain
    if re.fullmatch(r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,30})?[eE][+-]?[0-9]{1,2}", text, re.ASCII):
        return float(text)
    return None
