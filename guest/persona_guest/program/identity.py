"""Which program a file is: by inode as the agent's own mount namespace knows it, never by a caller's path.

A bind mount in a user's namespace, a symlink, a hard link, a rename or a relative path change
nothing: what counts is the inode, and the names under which the agent's secure path leads to it.
This module never asks the caller anything and never follows a path that the caller chose.
"""

import contextlib
import dataclasses
import itertools
import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from persona.called_names import by_name, called_name, listed
from persona.decisions import Denied, Program
from persona.problems import Reason
from persona.shown import word
from persona.wildcards import matches
from persona_guest.core.file_id import Image
from persona_guest.kernel.fd_inode import kernel_image
from persona_guest.kernel.task import Task, View
from persona_guest.program.elf import NO_ELF, parse
from persona_guest.program.shebang import HEAD_SIZE, Format, Shebang, parse_head
from persona_guest.settings import Gate

_CACHE_MAX = 8192
_PATH_MAX = 4096  # characters that a record has room for
_SHOWN_MAX = 200  # characters of a path, in a line for a terminal
_LINKS_MAX = 40  # MAXSYMLINKS
FIXED_PATH_MAX = 254  # bytes: the kernel layer compares no longer one
_SCAN_S = 60.0  # a change of the secure path that moved no time stamp is seen after this
_ALIASES_MAX = 64
# Debian's switchboard of generic names: a change here moves a name without touching the directory.
_ALTERNATIVES = "/etc/alternatives"


@dataclass(frozen=True, slots=True)
class Identified:
    """A program file: what it is, whether others could change it, and how the kernel starts it.

    ``visible`` is false for a file that the agent's namespace cannot reach by the path that it
    seems to have (a memfd, an unlinked file, a mount of the user's own).  ``kernel`` is the same file
    as (device, inode) of the kernel's own structures, which the kernel layer compares.  ``version`` is a
    number that no other file and no other state of this file has had while the agent runs: an inode
    number is given to another file once its own is gone.  ``elf_interpreter`` is the path of the dynamic
    loader that an ELF program names, ``None`` where it names none.  ``multicall``: it is several programs, and
    the name by which it is called says which (``persona/called_names.py``).
    """

    image: Image
    kernel: tuple[int, int]
    program: Program
    visible: bool
    trusted: bool
    multicall: bool
    format: Shebang | Format
    version: int = 0
    elf_interpreter: bytes | None = None
    programs: dict[str, Program] = dataclasses.field(default_factory=dict, compare=False, repr=False)  # by name

    @property
    def vouchable(self) -> bool:
        """Whether a persona can allow it: root alone can change it, or it is its user's own in their home."""
        return self.trusted or bool(self.program.home)

    def in_home(self, home: str, path: str) -> "Identified":
        """The same as a program in its user's home: known by its path alone, whatever it is called."""
        program = Program(path, (), (path,), self.program.loader, home)
        return dataclasses.replace(self, program=program, multicall=False)

    @property
    def path(self) -> str:
        """Which file it is, for records: its path; text without a '/' at its beginning where it has none.

        A path that only its user's own mounts have, or that was unlinked, names another file to everybody else.
        """
        if self.visible:
            return self.program.path
        return f"not a file of this machine: {self.program.path}"[:_PATH_MAX]

    def name(self, called: str) -> str:
        """What people call it, as one printable word: a name that leads to it on the secure path, else its path.

        ``called`` is what its caller named it; that counts only where it is one of its names.
        """
        names = self.program.names
        if not names or not self.visible:
            return word(self.path, _SHOWN_MAX)
        candidates = (called, os.path.basename(self.program.path), names[0])
        return word(next(name for name in candidates if name in names))

    def as_called(self, called: bytes) -> Program:
        """The program that a name selects of a file that is several; otherwise just the program.

        ``called`` is what the program takes its name from: ``argv[0]``, of a script the path.
        """
        if not self.multicall:
            return self.program
        found = self.programs.get(called_name(os.fsdecode(called)))
        return found or Program(self.program.path, loader=self.program.loader)

    def misnamed(self, called: bytes) -> Denied | None:
        """Why a file that is several programs is refused under a name that it does not have, or ``None``.

        What it would do then is its own matter: systemctl takes ``x-reboot`` for reboot, and vim ``viewer`` for view.
        """
        name = called_name(os.fsdecode(called))
        if not self.multicall or name in self.programs:
            return None
        shown = repr(name) if len(name) <= _SHOWN_MAX else f"{name[:_SHOWN_MAX]!r}..."
        why = f"{shown} is not a name of {self.program.path}, which does another thing under each of its names"
        return Denied(Reason.PROGRAM_NOT_TRUSTED, help=f"{why}: start it as {listed(self.programs)}")


def _programs(program: Program) -> dict[str, Program]:
    """What a file is under each name that it has."""
    named = {os.path.basename(path): None for path in (*program.paths, *program.names)}
    return {
        name: Program(
            program.path,
            tuple(other for other in program.names if other == name),
            tuple(path for path in program.paths if os.path.basename(path) == name),
            program.loader,
        )
        for name in named
    }


# What a file shows of itself: mtime and ctime (ns), mode, uid.  With the inode number, one state of one file.
_Stamp = tuple[int, int, int, int]


class _Owned(NamedTuple):
    device: int
    inode: int
    mode: int
    uid: int


_Directory = _Owned | None  # None: it is not there


class Identifier:
    """Knows the programs of the secure path by inode, and learns others as they come.

    ``views``: the mounts and roots in which a path leads where root says: the machine's, and the agent's own.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._cache: dict[tuple[int, int], tuple[_Stamp, Identified]] = {}
        self._untrusted: dict[tuple[int, int], tuple[_Stamp, Identified]] = {}  # which users make as many as they like
        self._known_before: dict[tuple[int, int], tuple[_Stamp, Identified]] = {}  # until the last scan
        self._aliases: dict[Image, list[str]] = {}
        self._seen: tuple[tuple[str, int], ...] = ()
        self._parents: dict[str, _Directory] = {}  # of the programs in the cache: their trust rests on these
        self._at: dict[bytes, Image | None] = {}  # where paths lead, since the last refresh
        self._versions = itertools.count(1)
        self.views = frozenset(_views())
        self.rescan()

    def refresh(self, now: float) -> None:
        """Looks whether the secure path or a program's directory changed; call about once a second.

        ``now`` is monotonic seconds.
        """
        self._at.clear()
        if (
            self._state() != self._seen
            or now - self._scanned_at > _SCAN_S
            or any(_directory(name) != seen for name, seen in self._parents.items())
        ):
            self.rescan()

    def rescan(self) -> None:
        """Reads the secure path anew: which names and paths lead to which file.

        Raises ``OSError``; then what was known before holds.
        """
        seen, self._scanned_at = self._state(), time.monotonic()
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
        self._seen, self._aliases = seen, aliases
        self._forget()

    def identify(self, fd: int) -> Identified:
        """The program behind an O_PATH descriptor.  Raises ``OSError`` where it cannot be looked at."""
        status = os.fstat(fd)
        image, stamp = (status.st_dev, status.st_ino), _stamp(status)  # plain tuples: this runs at every exec
        known = self._cache.get(image) or self._untrusted.get(image)
        if known is not None and known[0] == stamp and (known[1].program.names or _leads_to(known[1])):
            return known[1]
        return self._identify_anew(fd, status, Image(*image), known)

    def _identify_anew(
        self, fd: int, status: os.stat_result, image: Image, known: tuple[_Stamp, Identified] | None
    ) -> Identified:
        if len(self._cache) >= _CACHE_MAX:  # before its own directories are noted
            self._forget()
        if len(self._untrusted) >= _CACHE_MAX:
            self._untrusted.clear()
        stamp = _stamp(status)
        found = self._learn(fd, status, image)
        before = known or self._known_before.pop(image, None)
        if before is not None and before == (stamp, dataclasses.replace(found, version=before[1].version)):
            found = before[1]
        (self._cache if found.trusted else self._untrusted)[image] = (stamp, found)
        return found

    def _forget(self) -> None:
        """Learns everything anew; a program that is what it was keeps its version, and so its leases."""
        self._known_before, self._cache = self._cache, {}
        self._untrusted.clear()
        self._parents.clear()
        self._at.clear()

    def where(self, image: Image) -> str:
        """Which file that is, for records: its path where root alone can change what lies there, else its number.

        Other paths are not looked at again: they may be of a file system whose owner answers when they like.
        """
        known = self._cache.get(image)
        path = None
        if self._aliases.get(image):
            path = os.path.realpath(self._aliases[image][0])
        elif known is not None and not self._is_vouched_for(known[1].program.path):
            path = known[1].program.path
        if path is not None and image_of(path) == image:
            return path
        return f"device {os.major(image.device)}:{os.minor(image.device)}, inode {image.inode}"

    def is_at(self, path: bytes, image: Image) -> bool:
        """Whether ``path`` leads to this file for the agent too, whatever a task sees there in mounts of its own.

        What led there is remembered until the next ``refresh``.
        """
        known = self._at.get(path)
        if known != image:
            known = image_of(os.fsdecode(path)) if path.startswith(b"/") else None
            if len(self._at) >= _CACHE_MAX:
                self._at.clear()
            self._at[path] = known
        return known == image

    def is_fixed(self, path: bytes) -> bool:
        """Whether root alone can change where an absolute path leads, or the operator vouches for the file there."""
        if len(path) > FIXED_PATH_MAX:
            return False
        text = os.fsdecode(path)
        return _only_root_changes(text) or (os.path.realpath(text) == text and self._is_vouched_for(text))

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
        head = _head(fd)
        kind = parse_head(head)
        elf = parse(head, lambda at, size: _read(fd, at, size)) if kind is Format.ELF else NO_ELF
        multicall = self._is_several(names, os.path.basename(path))
        if not multicall:  # one that is may have hundreds, of which argv[0] selects one
            names, aliases = names[:_ALIASES_MAX], aliases[:_ALIASES_MAX]
        paths = tuple(dict.fromkeys([path, *aliases])) if visible else ()
        program = Program(path, names, paths, loader=elf.is_loader)
        return Identified(
            image=image,
            kernel=kernel_image(fd, status),
            program=program,
            visible=visible,
            trusted=visible and self._trusted(path, status),
            multicall=multicall,
            format=kind,
            version=next(self._versions),
            elf_interpreter=elf.interpreter,
            programs=_programs(program) if multicall else {},
        )

    def _is_several(self, names: tuple[str, ...], file: str) -> bool:
        if file in self._gate.multicall or any(name in self._gate.multicall for name in names):
            return True
        same = self._gate.same_by_any_name
        return not (file in same or any(name in same for name in names)) and by_name(names, file)

    def _trusted(self, path: str, status: os.stat_result) -> bool:
        if self._is_vouched_for(path):
            return True
        if status.st_uid != 0 or status.st_mode & 0o022:
            return False
        for parent in map(str, reversed(Path(path).parents)):
            seen = _directory(parent)
            if not _is_roots(seen):
                return False  # what lies below may be a file system of its owner's, which answers when they like
            self._parents[parent] = seen
        return True

    def _is_vouched_for(self, path: str) -> bool:
        return any(matches(path, pattern) for pattern in self._gate.trusted_writable)

    def _state(self) -> tuple[tuple[str, int], ...]:
        state = []
        for directory in (*self._gate.secure_path, _ALTERNATIVES):
            try:
                state.append((directory, os.stat(directory).st_mtime_ns))
            except OSError:
                state.append((directory, 0))
        return tuple(state)


def _views() -> Iterator[View]:
    for pid in (1, os.getpid()):
        with contextlib.suppress(OSError):  # the machine's first process is not an ordinary user's to look at
            yield Task(pid).view()


def image_of(path: str) -> Image | None:
    """The identity of the file that ``path`` leads to; ``None`` where that is nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return Image(status.st_dev, status.st_ino)


def images_of(paths: Iterable[str]) -> tuple[Image, ...]:
    """What the paths lead to, as far as there is anything."""
    return tuple(image for image in map(image_of, paths) if image is not None)


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_mtime_ns, status.st_ctime_ns, status.st_mode, status.st_uid


def _leads_to(known: Identified) -> bool:
    """Whether a program that is not on the secure path still is where it was: a rename leaves no stamp."""
    return not known.visible or image_of(known.program.path) == known.image


def _only_root_writes(directory: str) -> bool:
    return _is_roots(_directory(directory))


def _is_roots(directory: _Directory) -> bool:
    return directory is not None and directory.uid == 0 and not directory.mode & 0o022


def _directory(path: str) -> _Directory:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return _Owned(status.st_dev, status.st_ino, status.st_mode, status.st_uid)


def _only_root_changes(path: str) -> bool:
    """Whether every directory and symbolic link on the way to a file is root's alone.

    Walked from the root: what lies below a directory that others cannot write was put there by root.
    """
    if not path.startswith("/"):
        return False
    steps, here, links = path.split("/")[::-1], "/", 0
    if not _only_root_writes(here):
        return False
    while steps:
        name = steps.pop()
        if name in ("", "."):
            continue
        if name == "..":
            here = os.path.dirname(here)
            continue
        following = os.path.join(here, name)
        if following == "/proc":  # its links mean another file to each task
            return False
        try:
            status = os.lstat(following)
            if stat.S_ISLNK(status.st_mode):
                target = os.readlink(following)
                links += 1
                if status.st_uid != 0 or links > _LINKS_MAX:
                    return False
                steps += target.split("/")[::-1]
                here = "/" if target.startswith("/") else here
                continue
        except OSError:
            return False
        if status.st_uid != 0 or status.st_mode & 0o022:
            return False
        here = following
    return True


def _head(fd: int) -> bytes:
    return _read(fd, 0, HEAD_SIZE)


def _read(fd: int, at: int, size: int) -> bytes:
    """A part of the file, read through its O_PATH descriptor so that no path is walked twice."""
    copy = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.pread(copy, size, at)
    finally:
        os.close(copy)
