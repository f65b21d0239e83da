"""Reads YAML event by event, and refuses what YAML would quietly turn into something else.

An unquoted ``! git push **`` is a tag to YAML, which drops it: a carve-out becomes an allowance.  ``no`` is
false, ``0256`` is 174, ``12:30`` is 750, ``~`` is nothing, and a value that goes on in the next line is joined
to one.  Each of these is refused with its line, its field and how to write it.  So are merge keys, and anchors
and aliases of words, since a pattern may begin with ``*`` or ``&``; those of a whole list or mapping, which
programs write, mean one thing only.
"""

import re
from collections.abc import Callable, Iterator

import yaml

from persona.parsing import Unread
from persona_broker.policy_files.raw import DEPTH_MAX, VALUES_MAX, Raw, TextError, child, number_of

_SHOWN = 60  # characters of a value that a message repeats
_JOINED = ("description",)  # fields in which a value over several lines does no harm
_TAG = "tag:yaml.org,2002:"
_NOTHING = (None, None, "", None)
_NULLS = ("~", "null", "Null", "NULL")
# Line breaks that few editors show as such, so that an entry can stand in what looks like a comment; byte order
# marks; and what turns the direction of the text that is shown.
_HIDDEN = re.compile("[\x85\u2028\u2029\ufeff\u200e\u200f\u202a-\u202e\u2066-\u2069]|\r(?!\n)")
_CURLY = frozenset("\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u00ab\u00bb\u2039\u203a")
_NUMBER = "put it in quotes if it is text; a number is written in plain decimal digits, without zeros before it"
# What PyYAML says, by its words: how to say it here, where that is clearer, and how to mend it.
_MARKS = (
    ("scanning an alias", "*", "an alias of another value", 'like "**"'),
    ("scanning an anchor", "&", "an anchor", 'like "&x"'),
    ("tag", "!", "a tag", 'like "!git push **"'),
)
_FIXES = (
    ("'\\t' that cannot start", "YAML is indented with spaces, not with tabs; a file of JSON is named .json"),
    ("cannot start any token", "put the value in quotes"),
    ("mapping values are not allowed", "a value with ': ' in it is put in quotes; each field begins its own line"),
    ("unknown escape character", "use single quotes, in which a backslash is only a backslash"),
    ("scanning a quoted scalar", "the closing quote is missing"),
    ("scanning a double-quoted", "a backslash is written twice, or use single quotes"),
    ("could not find expected ':'", "a field is written 'name: value', with a space after the colon"),
    ("parsing a flow", "a bracket is not closed, or a value that begins with one is not in quotes"),
    ("but found '<scalar>'", "put the whole value in quotes, or indent the line like the one before it"),
    ("expected <block end>", "indent the line like those before it"),
    ("expected '<document start>'", "documents are parted by a line '---'; fields of one begin in the same column"),
)


def read_yaml(text: str) -> list[Raw]:
    """The documents of a text; empty ones are left out.  Raises ``TextError``, which has those before it."""
    if odd := _HIDDEN.search(text):
        name = "a carriage return alone" if odd[0] == "\r" else f"the character U+{ord(odd[0]):04X}"
        what = "which makes the text look other than it is read"
        raise TextError(_line_at(text, odd.start()), f"{name}, {what}", "remove it; lines end with a line feed")
    reader = _Reader(text)
    try:
        reader.read()
    except TextError as error:
        error.documents = tuple(reader.documents)
        raise
    return reader.documents


def _line_at(text: str, index: int) -> int:
    return text.count("\n", 0, index) + 1


def _refused(text: str, line: int, error: Exception) -> TextError:
    """What PyYAML has to say, and how to mend it."""
    if isinstance(error, yaml.reader.ReaderError):
        where = _line_at(text, int(error.position))
        return TextError(where, f"the character U+{int(error.character):04X} is not allowed in YAML", "remove it")
    if not isinstance(error, yaml.MarkedYAMLError):  # chr() of a number in an escape, for example
        return TextError(line, "cannot be read as YAML")
    mark, began = error.problem_mark, error.context_mark
    problem = error.problem or "cannot be read as YAML"
    said = f"{error.context or ''} {problem}"
    for words, sign, what, example in _MARKS:
        if words in said:
            problem = f"YAML reads what follows an unquoted '{sign}' as {what}"
            return TextError(mark.line + 1 if mark is not None else line, problem, f"put it in quotes, {example}")
    fix = next((fix for words, fix in _FIXES if words in said), "")
    if began is not None and mark is not None and began.line != mark.line:
        problem = f"{problem}, {error.context} that began in line {began.line + 1}"
    return TextError(mark.line + 1 if mark is not None else line, problem, fix)


class _Reader:
    """Reads one text; ``documents`` grows as it goes."""

    def __init__(self, text: str) -> None:
        self.documents: list[Raw] = []
        self._text = text
        self._count = 0
        self._line = 1
        self._anchors: dict[str, tuple[object, int, int]] = {}  # lists and mappings, how many values, how deep
        self._deepest = 0
        self._resolve: Callable[..., str] = yaml.resolver.Resolver().resolve
        self._events = self._guarded()

    def _guarded(self) -> Iterator[yaml.Event]:
        """PyYAML's events.  Whatever it raises is a ``TextError``: it has bugs, and a text must not find one."""
        try:
            for event in yaml.parse(self._text, Loader=yaml.SafeLoader):
                self._line = event.start_mark.line + 1 if event.start_mark else self._line
                yield event
        except Exception as error:  # of its bugs any kind may come
            raise _refused(self._text, self._line, error) from None

    def read(self) -> None:
        for event in self._events:
            if not isinstance(event, yaml.DocumentStartEvent):
                continue
            root = next(self._events)
            self._counted(root, 0)
            if isinstance(root, yaml.ScalarEvent) and (root.tag, root.anchor, root.value, root.style) == _NOTHING:
                continue  # between two '---', or after the last
            raw = Raw()
            self._anchors.clear()
            raw.value = self._value(root, raw, "", 0)
            self.documents.append(raw)

    def _value(self, event: yaml.Event, raw: Raw, path: str, depth: int) -> object:
        line = _span(event)[0]
        raw.lines.setdefault(path, line)
        self._counted(event, depth)
        before, outer, self._deepest = self._count, self._deepest, depth
        value: object
        if isinstance(event, yaml.MappingStartEvent):
            value = self._mapping(raw, path, depth)
        elif isinstance(event, yaml.SequenceStartEvent):
            items: list[object] = []
            while not isinstance(item := next(self._events), yaml.SequenceEndEvent):
                items.append(self._value(item, raw, f"{path}[{len(items)}]", depth + 1))
            value = items
        elif isinstance(event, yaml.ScalarEvent) and event.style is None and event.tag is None:
            value = self._plain(event, path)
        elif isinstance(event, yaml.AliasEvent) and event.anchor in self._anchors:
            value, size, height = self._anchors[event.anchor]
            self._counted(event, depth + height, size)
            self._deepest = max(outer, depth + height)
            return value
        else:
            value = getattr(event, "value", None)
        height, self._deepest = self._deepest - depth, max(outer, self._deepest)
        if isinstance(event, yaml.CollectionStartEvent) and event.anchor and event.tag is None:
            self._anchors[event.anchor] = value, self._count - before, height
            return value
        return self._marked(event) or value

    def _counted(self, event: yaml.Event, depth: int, count: int = 1) -> None:
        """Counts a value, a field or a document.  Raises ``TextError`` where there are too many."""
        self._count += count
        if depth > DEPTH_MAX or self._count > VALUES_MAX:
            what = "too many values" if depth <= DEPTH_MAX else "nested too deeply"
            raise TextError(
                _span(event)[0], what, f"at most {VALUES_MAX} fields and values in a file, {DEPTH_MAX} levels"
            )

    def _mapping(self, raw: Raw, path: str, depth: int) -> dict[str, object]:
        mapping: dict[str, object] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            line = _span(event)[0]
            self._counted(event, depth)
            key = event.value if isinstance(event, yaml.ScalarEvent) else ""
            where = child(path, key)
            odd = self._marked(event)
            if not isinstance(event, (yaml.ScalarEvent, yaml.AliasEvent)):
                self._value(event, Raw(), path, depth + 1)  # to its end
                odd = Unread("the name of a field must be a word", "put it in quotes, or write 'name: value'")
            again = odd is None and key in mapping
            if odd is not None:
                raw.note(where, line, odd.message, odd.fix)
            elif again:
                raw.note(where, line, f"is there twice, first in line {raw.lines[where]}", "remove one")
            kept = Raw() if odd is not None or again else raw  # what is refused leaves no lines behind
            kept.lines[where] = line
            value = self._value(next(self._events), kept, where, depth + 1)
            if kept is raw:
                mapping[key] = value
        return mapping

    def _marked(self, event: yaml.Event) -> Unread | None:
        """For what bears a tag, an anchor or an alias."""
        anchor = _short(str(getattr(event, "anchor", None) or ""))
        if isinstance(event, yaml.AliasEvent):
            said = f"YAML reads *{anchor} as an alias of another value"
        elif getattr(event, "tag", None) is not None:
            said = "YAML reads what follows an unquoted '!' as a tag, and drops it"
        elif anchor:
            said = f"YAML reads &{anchor} as an anchor, and drops it"
        else:
            return None
        if not isinstance(event, (yaml.AliasEvent, yaml.ScalarEvent)):
            return Unread(said, "remove it; where it is part of a value, put it in quotes")
        quoted = self._quoted(event)
        return Unread(said, f"put it in quotes: {quoted}" if quoted else "put it in quotes")

    def _plain(self, event: yaml.ScalarEvent, path: str) -> object:
        """The value of a word without quotes, which YAML 1.1 may take for something else."""
        text = str(event.value)
        first, last, _, _ = _span(event)
        if first != last and path not in _JOINED:
            fix = "in quotes where it is one; with '- ' before each, in one column, where it is a list"
            fix = fix if path else "a field is written 'kind: Persona', with a space after the colon"
            return Unread(f"YAML joins these lines to one value, {_short(text)!r}", fix)
        if text[:1] in _CURLY and path not in _JOINED:
            return Unread(f"{text[0]} is not a quote to YAML, but part of the text", "use \" or '")
        tag = self._resolve(yaml.ScalarNode, text, (True, False)).removeprefix(_TAG)
        if tag == "str":
            return text
        if tag in ("int", "float") and (number := number_of(text)) is not None:
            return number
        if text == "":
            if path.endswith("]"):
                return Unread("an entry with nothing in it", "remove it, or put what is meant in quotes")
            return Unread("has no value", "leave the field away for its default; an empty list is []")
        if text in _NULLS:
            fix = f"put it in quotes: {self._quoted(event)}, or leave the field away for its default"
            return Unread(f"YAML reads {text} as nothing", fix)
        if tag == "bool":
            meaning = "true" if text.lower() in ("yes", "true", "on") else "false"
            said = f"YAML reads {text} as {meaning}" if text != meaning else f"{text} is not text"
            return Unread(f"{said}, and no field is true or false", f"put it in quotes: {self._quoted(event)}")
        if tag in ("int", "float"):
            return Unread(f"YAML reads {_short(text)} as the number {_number(text, tag)}", _NUMBER)
        what = {"timestamp": "a date", "merge": "a merge of fields"}.get(tag, "something else than text")
        return Unread(f"YAML reads {_short(text)} as {what}", f"put it in quotes: {self._quoted(event)}")

    def _quoted(self, event: yaml.Event) -> str:
        """What stands in the file, in quotes."""
        _, _, begin, end = _span(event)
        written = self._text[begin:end].strip()
        if "\n" in written or len(written) > _SHOWN or not written.isprintable():
            return ""
        if '"' in written or "\\" in written:
            return "'" + written.replace("'", "''") + "'"
        return f'"{written}"'


def _span(event: yaml.Event) -> tuple[int, int, int, int]:
    """First and last line, counted from 1, and the indexes where it begins and ends."""
    start, end = event.start_mark, event.end_mark
    if start is None or end is None:  # of a text they are always there
        return 1, 1, 0, 0
    return start.line + 1, end.line + 1, start.index, end.index


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _number(text: str, tag: str) -> str:
    """The number that YAML 1.1 makes of a text."""
    node = yaml.ScalarNode(_TAG + tag, text[:_SHOWN])
    try:
        return str(yaml.SafeLoader("").construct_object(node))
    except ValueError:
        return "?"
