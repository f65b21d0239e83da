"""Which program a file is: by inode as the agent's own mount namespace knows it, never by a caller's path.

A bind mount in a user's namespace, a symlink, a hard link, a rename or a relative path change
nothing: what counts is the inode, and the names under which the agent's secure path leads to it.
This module never asks the caller anything and never follows a path that the caller chose.
"""

import os
import stat
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from persona.decisions import Program
from persona_guest.core.script import HEAD_SIZE, Format, Shebang, parse_head
from persona_guest.kernel.inode import kernel_image
from persona_guest.settings import Gate

_CACHE_MAX = 8192
_ALIASES_MAX = 64
# Debian's switchboard of generic names: a change here moves a name without touching the directory.
_ALTERNATIVES = "/etc/alternatives"


class Image(NamedTuple):
    """The identity of a file while it exists."""

    device: int
    inode: int

    @property
    def is_unique(self) -> bool:
        """Whether super block and inode number, which the kernel layer compares, say the same.

        On btrfs they do not: each subvolume, a user's own too, numbers its inodes from the beginning.
        """
        return os.major(self.device) != 0


@dataclass(frozen=True, slots=True)
class Identified:
    """A program file: what it is, whether others could change it, and how the kernel starts it.

    ``visible`` is false for a file that the agent's namespace cannot reach by the path that it
    seems to have (a memfd, an unlinked file, a mount of the user's own).  ``kernel`` is the same file
    as (device, inode) of the kernel's own structures, which the kernel layer compares.
    """

    image: Image
    kernel: tuple[int, int]
    program: Program
    visible: bool
    trusted: bool
    multicall: bool
    format: Shebang | Format

    def as_called(self, argv0: bytes) -> Program:
        """The program that ``argv[0]`` selects of a multi-call file; otherwise just the program.

        A multi-call file called by a name that it does not have matches no name and no path.
        """
        if not self.multicall:
            return self.program
        wanted = os.path.basename(os.fsdecode(argv0)).removeprefix("-")
        names = tuple(name for name in self.program.names if name == wanted)
        paths = tuple(path for path in self.program.paths if os.path.basename(path) == wanted)
        return Program(self.program.path, names, paths)


class _Stamp(NamedTuple):
    mtime_ns: int
    ctime_ns: int
    mode: int
    uid: int


class Identifier:
    """Knows the programs of the secure path by inode, and learns others as they come."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._cache: dict[Image, tuple[_Stamp, Identified]] = {}
        self._aliases: dict[Image, list[str]] = {}
        self._seen: tuple[tuple[str, int], ...] = ()
        self.rescan()

    def refresh(self, now: float) -> None:
        """Looks whether the secure path changed; call about once a second (``now`` is monotonic)."""
        if self._state() != self._seen or now - self._scanned_at > 60:
            self.rescan()

    def rescan(self) -> None:
        """Reads the secure path anew: which names and paths lead to which file."""
        self._seen, self._scanned_at = self._state(), time.monotonic()
        aliases: dict[Image, list[str]] = {}
        for directory in self._gate.secure_path:
            if not _only_root_writes(directory):
                continue
            for entry in sorted(os.listdir(directory)):
                path = f"{directory}/{entry}"
                try:
                    status = os.stat(path)
                except OSError:
                    continue  # a dangling link names no program
                if stat.S_ISREG(status.st_mode) and status.st_mode & 0o111:
                    found = aliases.setdefault(Image(status.st_dev, status.st_ino), [])
                    if len(found) < 4096:
                        found.append(path)
        self._aliases = aliases
        self._cache.clear()

    def identify(self, fd: int) -> Identified:
        """The program behind an O_PATH descriptor.  Raises ``OSError`` where it cannot be looked at."""
        status = os.fstat(fd)
        image = Image(status.st_dev, status.st_ino)
        stamp = _Stamp(status.st_mtime_ns, status.st_ctime_ns, status.st_mode, status.st_uid)
        known = self._cache.get(image)
        if known is not None and known[0] == stamp and (known[1].program.names or _leads_to(known[1], image)):
            return known[1]
        found = self._learn(fd, status, image)
        if len(self._cache) >= _CACHE_MAX:
            self._cache.clear()
        self._cache[image] = (stamp, found)
        return found

    def _learn(self, fd: int, status: os.stat_result, image: Image) -> Identified:
        if not stat.S_ISREG(status.st_mode):
            raise PermissionError(13, "not a regular file")  # execve(2): EACCES
        shown = os.readlink(f"/proc/self/fd/{fd}")
        aliases = self._aliases.get(image, [])
        if aliases:
            path = os.path.realpath(aliases[0])
            visible = True
        else:
            path = shown
            visible = os.path.isabs(path) and image_of(path) == image and os.path.realpath(path) == path
        names = tuple(dict.fromkeys(os.path.basename(alias) for alias in aliases))
        multicall = os.path.basename(path) in self._gate.multicall or any(
            name in self._gate.multicall for name in names
        )
        if not multicall:  # a multi-call file may have hundreds, of which argv[0] selects one
            names, aliases = names[:_ALIASES_MAX], aliases[:_ALIASES_MAX]
        paths = tuple(dict.fromkeys([path, *aliases])) if visible else ()
        return Identified(
            image=image,
            kernel=kernel_image(fd, status),
            program=Program(path, names, paths),
            visible=visible,
            trusted=visible and self._trusted(path, status),
            multicall=multicall,
            format=parse_head(_head(fd)),
        )

    def _trusted(self, path: str, status: os.stat_result) -> bool:
        if any(fnmatchcase(path, pattern) for pattern in self._gate.trusted_writable):
            return True
        if status.st_uid != 0 or status.st_mode & 0o022:
            return False
        return all(_only_root_writes(str(parent)) for parent in Path(path).parents)

    def _state(self) -> tuple[tuple[str, int], ...]:
        state = []
        for directory in (*self._gate.secure_path, _ALTERNATIVES):
            try:
                state.append((directory, os.stat(directory).st_mtime_ns))
            except OSError:
                state.append((directory, 0))
        return tuple(state)


def image_of(path: str) -> Image | None:
    """The identity of the file that ``path`` leads to; ``None`` where that is nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return Image(status.st_dev, status.st_ino)


def _leads_to(known: Identified, image: Image) -> bool:
    """Whether a program that is not on the secure path still is where it was: a rename leaves no stamp."""
    return not known.visible or image_of(known.program.path) == image


def _only_root_writes(directory: str) -> bool:
    try:
        status = os.stat(directory)
    except OSError:
        return False
    return status.st_uid == 0 and not status.st_mode & 0o022


def _head(fd: int) -> bytes:
    """The file's first bytes, read through its descriptor so that no path is walked twice."""
    copy = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.read(copy, HEAD_SIZE)
    finally:
        os.close(copy)
