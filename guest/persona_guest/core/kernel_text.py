"""Reads text that the kernel writes, in /proc, /sys and cgroup files: bytes, never Unicode text.

Python's ``str`` splits at white space of every script (``\\x85``, the no-break space, ``\\u2028``) and takes the
digits of every script for numbers; even ``bytes.splitlines`` splits at ``\\r``.  The kernel escapes only what its own
format needs, so a file's or a process's name may hold all of these.  So: lines end at ``\\n``, fields are divided by
a space, numbers are made of 0 to 9.  A caller decodes a name, by ``os.fsdecode``, only where it hands on a path.
"""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

_ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")
_DIGITS = re.compile(rb"[0-9]{1,20}")  # 2**64 - 1 has twenty


class Mount(NamedTuple):
    """One mount of proc_pid_mountinfo(5).  ``device`` is MAJOR:MINOR; ``writable`` is the file system's own word."""

    ident: int
    device: bytes
    point: bytes
    kind: bytes
    source: bytes
    writable: bool


def lines(text: bytes | str) -> list[bytes]:
    """The lines of a file, without their ``\\n``."""
    return os.fsencode(text).removesuffix(b"\n").split(b"\n")


def decimal(word: bytes | str) -> int | None:
    """A whole number as the kernel writes it; ``None`` where the word is anything else."""
    word = os.fsencode(word)
    return int(word) if _DIGITS.fullmatch(word) else None


def mounts(mountinfo: bytes | str) -> Iterator[Mount]:
    """Every mount of a mountinfo file, in its order; a line that is not of its form is left out."""
    for line in lines(mountinfo):
        fields = line.split(b" ")
        try:
            # after six fields optional ones, as many as there are, and a dash that ends them
            kind, source, options = fields[fields.index(b"-", 6) + 1 :][:3]
        except ValueError:
            continue
        ident = decimal(fields[0])
        if ident is None:
            continue
        # the first option is the kernel's own; those after it are the file system's, and may be a user's words
        writable = options.split(b",")[0] == b"rw"
        yield Mount(ident, fields[2], _unescape(fields[4]), _unescape(kind), _unescape(source), writable)


def _unescape(field: bytes) -> bytes:
    """The field as it was: the kernel writes a space, a tab, a newline and a backslash as octal numbers."""
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field)
