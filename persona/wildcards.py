"""Words with wildcards: one meaning for whitelists, VM names and the lists of guest.toml (``docs/patterns.md``).

In a word without ``/``, ``*`` (also ``**``) is any text, ``?`` any character, ``[...]`` one character of a set.  A
word with ``/`` is a path word: there ``*``, ``?`` and ``[...]`` never cross a ``/``, ``**`` does, and a text with a
``..`` component matches no wildcard.  Matching takes time that grows with the length of the text times that of the
word, whatever both are: no backtracking.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

Test = Callable[[str], bool]


class Wild(Enum):
    """A wildcard that is not a set."""

    ONE = "?"
    STAR = "*"
    DEEP = "**"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Among:
    """``[...]``: one character that is in ``members`` or in a range, or, where ``negated``, one that is not."""

    members: frozenset[str]
    ranges: tuple[tuple[str, str], ...]
    negated: bool

    def __str__(self) -> str:
        ranges = [f"{_member(low)}-{_member(high)}" for low, high in self.ranges]
        return f"[{'!' if self.negated else ''}{''.join(ranges + sorted(map(_member, self.members)))}]"

    def has(self, char: str) -> bool:
        """Whether the character fits."""
        found = char in self.members or any(low <= char <= high for low, high in self.ranges)
        return found is not self.negated


Token = str | Wild | Among  # a string stands for itself


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a pattern; ``text`` is without quotes and backslashes, ``tokens`` say which characters are wild."""

    text: str
    tokens: tuple[Token, ...]

    def __str__(self) -> str:
        """As one writes it, with a backslash before what would mean something else."""
        return "".join(map(_quoted, self.tokens)) or "''"

    @property
    def is_literal(self) -> bool:
        """Whether it has no wildcard."""
        return all(isinstance(token, str) for token in self.tokens)

    @property
    def is_any(self) -> bool:
        """Whether it is ``*``: any one argument."""
        return self.tokens == (Wild.STAR,)

    @property
    def is_many(self) -> bool:
        """Whether it is ``**``: any number of arguments."""
        return self.tokens == (Wild.DEEP,)

    @property
    def is_path(self) -> bool:
        """Whether it contains a ``/``."""
        return any(isinstance(token, str) and "/" in token for token in self.tokens)

    @property
    def prefix(self) -> str:
        """What every text that matches begins with."""
        return self.tokens[0] if self.tokens and isinstance(self.tokens[0], str) else ""


def _quoted(token: Token) -> str:
    return re.sub(r"""([\s*?\[\\'"])""", r"\\\1", token) if isinstance(token, str) else str(token)


def _member(char: str) -> str:
    return f"\\{char}" if char in "]!^-" else _quoted(char)


_Chars = list[tuple[str, bool]]  # each character, and whether it was quoted


def split(source: str) -> tuple[Word, ...]:
    """The words of a line, as ``shlex.split`` and a shell would: nothing is expanded, quoted wildcards are literal.

    Raises ``ValueError`` for a quote or a backslash with nothing behind it.
    """
    words: list[_Chars] = []
    word: _Chars | None = None
    quote = ""
    chars = iter(source)
    for char in chars:
        if quote:
            if char == quote:
                quote = ""
            elif char == "\\" and quote == '"':
                following = next(chars, "")
                if not following:
                    raise ValueError("no closing quotation")
                kept = following if following in '"\\' else char + following
                (word := [] if word is None else word).extend((each, True) for each in kept)
            else:
                (word := [] if word is None else word).append((char, True))
        elif char in "'\"":
            quote = char
            word = [] if word is None else word
        elif char == "\\":
            following = next(chars, "")
            if not following:
                raise ValueError("no escaped character")
            (word := [] if word is None else word).append((following, True))
        elif char in " \t\r\n":
            if word is not None:
                words.append(word)
            word = None
        else:
            (word := [] if word is None else word).append((char, False))
    if quote:
        raise ValueError("no closing quotation")
    if word is not None:
        words.append(word)
    return tuple(_word(each) for each in words)


def whole(text: str) -> Word:
    """A text as one word: spaces and quotes stand for themselves, a backslash makes the next character literal."""
    chars: _Chars = []
    escaped = False
    for char in text:
        if char == "\\" and not escaped:
            escaped = True
            continue
        chars.append((char, escaped))
        escaped = False
    return _word([*chars, ("\\", True)] if escaped else chars)


def _word(chars: _Chars) -> Word:
    tokens: list[Token] = []
    at = 0
    while at < len(chars):
        char, quoted = chars[at]
        found: Token = char
        end = at + 1
        if not quoted and char == "*":
            while end < len(chars) and chars[end] == ("*", False):
                end += 1
            found = Wild.STAR if end == at + 1 else Wild.DEEP
        elif not quoted and char == "?":
            found = Wild.ONE
        elif not quoted and char == "[":
            among = _among(chars, at)
            if among is not None:
                found, end = among
        last = tokens[-1] if tokens else None
        if isinstance(found, str) and isinstance(last, str):
            tokens[-1] = last + found
        else:
            tokens.append(found)
        at = end
    return Word("".join(char for char, _ in chars), tuple(tokens))


def _among(chars: _Chars, at: int) -> tuple[Among, int] | None:
    """The set that begins at ``at``, and what comes behind it; ``None`` where ``[`` stands for itself."""
    begin = at + 1
    negated = begin < len(chars) and chars[begin] in (("!", False), ("^", False))
    begin += negated
    end = begin + 1  # a ']' that comes first is a member
    while end < len(chars) and chars[end] != ("]", False):
        end += 1
    inside = chars[begin:end]
    if end >= len(chars) or any(char == "/" for char, _ in inside):
        return None
    members: set[str] = set()
    ranges: list[tuple[str, str]] = []
    index = 0
    while index < len(inside):
        if index + 2 < len(inside) and inside[index + 1] == ("-", False):
            ranges.append((inside[index][0], inside[index + 2][0]))
            index += 3
        else:
            members.add(inside[index][0])
            index += 1
    return Among(frozenset(members), tuple(ranges), negated), end + 1


# --- matching ---------------------------------------------------------------------------------------

# A '..' that leads a directory up: between slashes, or what separates one path from the next or from its option.
_BEFORE = r"(?:\A|\A-[A-Za-z0-9]|[-/=:,;@+\"'(\[{<>|&\s])"
_BEHIND = r"(?:\Z|[/=:,;\"')\]}<>|&\s])"
_UP = re.compile(rf"{_BEFORE}\.\.{_BEHIND}")
_SLASHES = re.compile(r"/(?:\.?/)+")
_HERE = re.compile(r"(\A|[=:])(?:\./+)+")


def climbs(text: str) -> bool:
    """Whether a text has a ``..`` component, so that where it leads cannot be told from its beginning."""
    return ".." in text and _UP.search(text) is not None


def allows(word: Word) -> Test:
    """The test of a word that allows: true only for texts that certainly fit."""
    if word.is_literal:
        return word.text.__eq__
    if not word.is_path:
        return _text_test(word)
    test = _Automaton(word, strict=True).accepts
    return lambda text: test(text) and not climbs(text)


def refuses(word: Word) -> Test:
    """The test of a word that carves out: true for all texts that may fit.

    Of a path word these are also texts that lead to the same (``//``, ``/./``, a slash at the end), and each text
    with a ``..`` component, since where it leads depends on directories and links that nobody here can see.  An
    option in front (all up to ``=`` or ``:``) must be the same.
    """
    if not word.is_path:
        return word.text.__eq__ if word.is_literal else _text_test(word)
    if word.is_literal:
        text, plain = word.text, _plain(word.text)
        return lambda given: given == text or _plain(given) == plain or _may_lead(word, given)
    test = _Automaton(word, strict=False).accepts
    return lambda given: test(given) or test(plain := _plain(given)) or test(plain + "/") or _may_lead(word, given)


def _may_lead(word: Word, given: str) -> bool:
    head = word.prefix.partition("/")[0]
    return climbs(given) and given.startswith(head[: max(head.rfind("="), head.rfind(":")) + 1])


def _plain(text: str) -> str:
    """The same path without what changes nothing: ``/./``, ``//``, ``./`` in front, and ``/`` or ``/.`` at the end."""
    text = _HERE.sub(r"\1", _SLASHES.sub("/", text))
    return text.removesuffix("/.").removesuffix("/") or text


def _text_test(word: Word) -> Test:
    tokens = word.tokens
    if sum(token in (Wild.STAR, Wild.DEEP) for token in tokens) == 1 and all(
        isinstance(token, str) or token in (Wild.STAR, Wild.DEEP) for token in tokens
    ):
        begin, end = word.prefix, tokens[-1] if isinstance(tokens[-1], str) else ""
        least = len(begin) + len(end)
        return lambda text: len(text) >= least and text.startswith(begin) and text.endswith(end)
    return _Automaton(word, strict=False).accepts


class _Automaton:
    """All ways through a word at once, as the bits of one number: bit N is set where the first N steps are done.

    A step takes one character, or is a run (``*``, ``**``), which takes any number.  In a path word some steps take
    none: an entry, before a component with wildcards, and a fork, before ``**/``, which may also be left out.
    ``strict``: what a component with wildcards matches is not empty and not ``.``, which would be its directory.
    """

    __slots__ = (
        "_among", "_begin", "_chars", "_done", "_empty", "_end", "_entries", "_far", "_forks", "_last", "_near",
        "_ones", "_path", "_sets",
    )  # fmt: skip

    def __init__(self, word: Word, *, strict: bool) -> None:
        self._path = word.is_path
        self._begin = word.prefix
        end = word.tokens[-1] if isinstance(word.tokens[-1], str) else ""
        self._end = end.removeprefix("/")  # '**/x' is for 'x', too
        self._chars: dict[str, int] = {}  # the steps that take this character
        self._ones = 0  # those that take any (in a path word, but '/')
        self._among: dict[Among, int] = {}  # those that take one of a set, by the set
        self._sets: dict[str, int] = {}  # of those, the steps that take this character, as far as it was asked for
        self._near = self._far = 0  # runs: up to the next '/', and any
        self._entries = self._last = self._forks = 0
        number = 0
        components = _components(word) if self._path else [_flat(word)]
        for index, component in enumerate(components):
            if index:
                number = self._add(number, "/")
            here = 1 << number
            if self._path and component == [Wild.DEEP]:
                if index < len(components) - 1:
                    self._forks |= here
                else:
                    self._last |= here
                number += 1
            elif self._path and any(not isinstance(step, str) for step in component):
                self._entries |= here
                number += 1
            for step in component:
                number = self._add(number, step)
        self._done = 1 << number
        self._empty = self._near | self._far | self._entries | self._last | self._forks  # done without a character
        if not strict:
            self._entries = self._last = 0  # nothing is looked at before them

    def _add(self, number: int, step: Token) -> int:
        bit = 1 << number
        if isinstance(step, str):
            self._chars[step] = self._chars.get(step, 0) | bit
        elif isinstance(step, Among):
            self._among[step] = self._among.get(step, 0) | bit
        elif step is Wild.ONE:
            self._ones |= bit
        elif step is Wild.STAR and self._path:
            self._near |= bit
        else:
            self._far |= bit
        return number + 1

    def accepts(self, text: str) -> bool:
        """Whether the whole text fits."""
        if not text.startswith(self._begin) or not text.endswith(self._end):
            return False
        nothing = _nothing_from(text) if self._last else 0
        states = self._passed(1, text, 0, nothing)
        for at, char in enumerate(text, 1):
            inside = char != "/" or not self._path
            takes = self._chars.get(char, 0)
            runs = self._far
            if inside:
                takes |= self._ones
                runs |= self._near
                if self._among:
                    in_sets = self._sets.get(char)
                    takes |= self._in_sets(char) if in_sets is None else in_sets
            states = states & runs | (states & takes) << 1
            if not states:
                return False
            states = self._passed(states, text, at, nothing)
        return states & self._done != 0

    def _in_sets(self, char: str) -> int:
        """The steps that take this character because it is in their set."""
        found = 0
        for among, bits in self._among.items():
            if among.has(char):
                found |= bits
        if len(self._sets) >= _SETS_MAX:
            self._sets.clear()
        self._sets[char] = found
        return found

    def _passed(self, states: int, text: str, at: int, nothing: int) -> int:
        """With what is reached from here without a character; ``nothing``: from there on the text names nothing."""
        closed = 0
        if self._entries | self._last and (at == 0 or text[at - 1] == "/"):
            if _NO_NAME.match(text, at):
                closed = self._entries
            if at >= nothing:
                closed |= self._last
        states &= ~closed
        new = states
        while passing := new & self._empty:
            new = (passing << 1 | (passing & self._forks) << 3) & ~states & ~closed
            states |= new
        return states


_SETS_MAX = 512  # characters
_NO_NAME = re.compile(r"\.?(?:/|\Z)")


def _nothing_from(text: str) -> int:
    """Where the last components begin that are empty or ``.``; one behind the text where there are none."""
    begin, end = len(text) + 1, len(text)
    while end >= 0:
        slash = text.rfind("/", 0, end)
        if text[slash + 1 : end] not in ("", "."):
            break
        begin, end = slash + 1, slash
    return begin


def _flat(word: Word) -> list[Token]:
    return [step for token in word.tokens for step in (token if isinstance(token, str) else (token,))]


def _components(word: Word) -> list[list[Token]]:
    found: list[list[Token]] = [[]]
    for step in _flat(word):
        if step == "/":
            found.append([])
        else:
            found[-1].append(step)
    return found


@lru_cache(maxsize=8192)
def _named(pattern: str) -> Test:
    return allows(whole(pattern))


def matches(name: str, pattern: str) -> bool:
    """Whether a name or path fits a pattern that is one word (``whole``): of VMs, and of guest.toml's lists."""
    return _named(pattern)(name)
