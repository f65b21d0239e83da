"""Which programs are a session user's own, in their own home: what a persona's ``home_programs`` may name.

All is looked at by descriptor, in the agent's own mounts.  This decides nothing: the broker does, by the path.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from typing import NamedTuple

from persona.home_programs import is_below
from persona_guest.kernel.task import Task, open_inside
from persona_guest.program.identity import Identified
from persona_guest.program.shebang import Format

_CAPABILITIES = "security.capability"
_REFUSED_BITS = stat.S_ISUID | stat.S_ISGID | stat.S_IWOTH


class Owner(NamedTuple):
    """The user of a session; ``home_of`` says where a uid has its home, empty where that is not known."""

    uid: int
    home_of: Callable[[int], str]


def as_own(fd: int, found: Identified, task: Task, owner: Owner) -> Identified:
    """What is ``found`` behind the O_PATH descriptor ``fd``; where it is a program in its owner's home, known as that.

    It is one only if: the file is the owner's, and so are all user ids of the task that starts it; it is an ELF
    program and no loader of others; it has no setuid or setgid bit and no capabilities, and not everybody may write
    it; and from the home directory, which must be the owner's too, its path leads to this very file without a link,
    a mount or ``..``.  What cannot be told is none.
    """
    if found.trusted or found.format is not Format.ELF or found.program.loader:
        return found
    with contextlib.suppress(OSError, ValueError):  # ValueError: a home with a NUL in it
        status = os.fstat(fd)
        if status.st_uid != owner.uid or status.st_mode & _REFUSED_BITS or _has_capabilities(fd):
            return found
        home = os.path.realpath(owner.home_of(owner.uid) or "/")
        path = os.readlink(f"/proc/self/fd/{fd}")
        below = path.removeprefix(home + "/")
        if home == "/" or below == path or not is_below(below):
            return found
        if set(task.credentials().uids) == {owner.uid} and _leads_to(home, below, owner, status):
            return found.in_home(below, path)
    return found


def _leads_to(home: str, below: str, owner: Owner, wanted: os.stat_result) -> bool:
    """Whether the file lies there, and ``home`` is the owner's.  Raises ``OSError`` for a link or a mount between."""
    directory = os.open(home, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(directory).st_uid != owner.uid:
            return False
        there = open_inside(directory, os.fsencode(below))
    finally:
        os.close(directory)
    try:
        status = os.fstat(there)
    finally:
        os.close(there)
    return (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino)


def _has_capabilities(fd: int) -> bool:
    """Whether capabilities(7) are set on the file.  Raises ``OSError`` where that cannot be told."""
    try:
        os.getxattr(f"/proc/self/fd/{fd}", _CAPABILITIES)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return False
        raise
    return True
