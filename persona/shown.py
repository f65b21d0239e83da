"""How text that somebody else chose is shown to people: on one line, in characters that print, and unambiguously.

Names of files, arguments and names of users may hold anything.  Here they become words as a shell would read
them: ``-l`` stays, ``a b`` becomes ``'a b'``, and what does not print is escaped, as in ``$'a\\n'``.
"""

import re
from collections.abc import Iterable

_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
_ESCAPES = {"\n": r"\n", "\t": r"\t", "\r": r"\r"}
_LONGEST = 10  # characters that one takes at most


def word(text: str, limit: int = 4096) -> str:
    """``text`` as one word of a shell's command line.

    Two different texts never have the same word, unless one of them is longer than ``limit`` characters: then
    it is cut, and a ``…`` follows the word.
    """
    if len(text) > limit:
        return word(text[:limit], limit) + "…"
    if _PLAIN.fullmatch(text):
        return text
    if not text.isprintable():
        return "$'" + "".join(map(_in_dollar_quotes, text)) + "'"
    if "'" in text:
        return "$'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return f"'{text}'"


def words(argv: Iterable[str], limit: int = 400) -> str:
    """A command line, at most some ``limit`` characters of it; ``…`` follows where there is more."""
    shown: list[str] = []
    room = limit
    for argument in argv:
        one = word(argument)
        if len(one) > room:
            cut = word(argument, room // _LONGEST).removesuffix("…") if room >= _LONGEST else ""
            return " ".join([*shown, cut + "…"])
        shown.append(one)
        room -= len(one) + 1
    return " ".join(shown)


def line(text: str) -> str:
    """A text that may be a sentence, with only that escaped which does not print."""
    return text if text.isprintable() else "".join(char if char.isprintable() else _escaped(char) for char in text)


def _in_dollar_quotes(char: str) -> str:
    if char in "\\'":
        return "\\" + char
    return char if char.isprintable() else _escaped(char)


def _escaped(char: str) -> str:
    """As in ``$'…'`` of bash: bytes that are not UTF-8 (lone surrogates of Python's) by two digits."""
    number = ord(char)
    if char in _ESCAPES:
        return _ESCAPES[char]
    if number < 0x80:
        return f"\\x{number:02x}"
    if 0xDC80 <= number <= 0xDCFF:
        return f"\\x{number - 0xDC00:02x}"
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"


def amount(size: float) -> str:
    """Bytes for people: ``512 MiB``, ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
