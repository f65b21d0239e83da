"""Which files a path of the command line stands for, and the text of one: bounded, and never waiting for anybody.

Of a folder count the files whose names end in ``.yaml``, ``.yml`` or ``.json`` and do not begin with a dot,
also in folders below it.  What an editor, a package manager or Kubernetes leaves beside them does not count.
"""

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = (".yaml", ".yml", ".json")
FILE_MAX = 4 * 1024 * 1024  # bytes
TOTAL_MAX = 16 * 1024 * 1024  # bytes of all files
FILES_MAX = 1000
_ENTRIES_MAX = 20_000  # names that are looked at
_DEPTH_MAX = 16  # folders below each other
# Endings of files that somebody may have meant: nearly one of ours.
_MEANT = re.compile(r"\.(?:ya?ml|json)(?:\.txt)?|\.(?:yamls|jsonc|json5|jsonl|ndjson)", re.IGNORECASE)
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)


@dataclass(slots=True)
class Found:
    """The files in their order; ``problems`` and ``skipped`` are paths and what is to say about them.

    ``names`` has the files of folders by what they are called within: no other is of the machine that they lie on.
    """

    files: list[Path] = field(default_factory=list)
    names: dict[Path, str] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def find_files(paths: Iterable[Path]) -> Found:
    """The files that paths stand for: a file is itself, whatever its name; a folder those inside that count."""
    found = Found()
    looked = 0
    for path in paths:
        try:
            is_folder = stat.S_ISDIR(os.stat(path).st_mode)
        except (OSError, ValueError):
            is_folder = False  # reading it says why
        if not is_folder:
            found.files.append(path)
            continue
        before = len(found.files) + len(found.problems)
        inside: list[Path] = []
        looked = _look_into(path, inside, found, looked, 0)
        found.files += sorted(inside)
        found.names |= {file: str(file.relative_to(path)) for file in inside}
        if len(found.files) + len(found.problems) == before:
            found.problems.append((str(path), f"no {', '.join(SUFFIXES)} file inside"))
    if len(found.files) > FILES_MAX:
        found.problems.append((str(found.files[FILES_MAX]), f"more than {FILES_MAX} files: none from here on is read"))
        del found.files[FILES_MAX:]
    return found


def _look_into(folder: Path, inside: list[Path], found: Found, looked: int, depth: int) -> int:
    """Adds the files of a folder that count; returns how many names have been looked at."""
    if depth > _DEPTH_MAX:
        found.problems.append((str(folder), f"more than {_DEPTH_MAX} folders below each other: not read"))
        return looked
    folders: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                looked += 1
                if looked > _ENTRIES_MAX:
                    what = f"more than {_ENTRIES_MAX} files and folders: the rest is not read"
                    found.problems.append((str(folder), what))
                    return looked
                _sort(entry, folder / entry.name, inside, folders, found)
    except OSError as error:
        found.problems.append((str(folder), error.strerror or str(error)))
    for below in sorted(folders):
        if looked <= _ENTRIES_MAX:
            looked = _look_into(below, inside, found, looked, depth + 1)
    return looked


def _sort(entry: "os.DirEntry[str]", path: Path, inside: list[Path], folders: list[Path], found: Found) -> None:
    """Puts one name where it belongs, or leaves it out."""
    counts = path.suffix in SUFFIXES
    if entry.name.startswith("."):
        # .#x.yaml is Emacs' lock, ._x.yaml macOS's attributes, ..data and ..2026_11_28... a ConfigMap's
        if counts and not entry.name.startswith((".#", "._", "..")):
            found.skipped.append((str(path), "its name begins with a dot"))
        return
    if entry.is_dir(follow_symlinks=False):
        folders.append(path)
    elif entry.is_symlink() and os.path.isdir(path):
        found.skipped.append((str(path), "a link to a folder; name it on the command line to have it read"))
    elif counts:
        inside.append(path)
    elif _MEANT.fullmatch(_ending(entry.name)):
        found.skipped.append((str(path), f"its name does not end in {', '.join(SUFFIXES)}"))


def _ending(name: str) -> str:
    """The last suffix, and the one before it where the last is .txt."""
    stem, suffix = os.path.splitext(name)
    return os.path.splitext(stem)[1] + suffix if suffix.lower() == ".txt" else suffix


def read_text(file: Path, budget: int) -> str:
    """The text of a regular file of at most ``budget`` bytes.  Raises ``OSError``, or ``ValueError`` that says why."""
    _regular(os.stat(file).st_mode)  # before it is opened: opening a device may do something
    fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(fd, "rb", buffering=0) as opened:
        _regular(os.fstat(fd).st_mode)
        data = b""
        limit = min(FILE_MAX, budget)
        while len(data) <= limit and (part := opened.read(limit + 1 - len(data))):
            data += part
    if len(data) > FILE_MAX:
        raise ValueError(f"larger than {FILE_MAX} bytes")
    if len(data) > limit:
        raise ValueError(f"all files together are larger than {TOTAL_MAX} bytes")
    if data.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")) or b"\0" in data[:4]:
        raise ValueError("is not UTF-8 but UTF-16 or UTF-32: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotUtf8(data.count(b"\n", 0, error.start) + 1, data[error.start]) from None


class NotUtf8(ValueError):
    """A byte that is not UTF-8, and its line."""

    def __init__(self, line: int, byte: int) -> None:
        super().__init__(f"the byte 0x{byte:02x} is not UTF-8: save the file as UTF-8")
        self.line = line


def _regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = next((name for test, name in _KINDS if test(mode)), "something else")
        raise ValueError(f"is {what}, not a file: only files are read")
