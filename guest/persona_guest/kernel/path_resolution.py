"""Walks a relative path step by step as the kernel would for another task: path_resolution(7), openat(2).

``openat2`` can confine a walk to a root, or begin it at a directory below that root, not both; and the
*path* of a task's directory may by now lead elsewhere (a mount of the user's own over it).  So each
step is taken from a descriptor.  Slow, and only for what ``openat2`` cannot do.
"""

import ctypes
import errno
import os
import stat

from persona_guest.kernel.libc import LIBC, failure

_LINKS_MAX = 40  # MAXSYMLINKS
_PROC_SUPER_MAGIC = 0x9FA0
_O_PATH = os.O_PATH | os.O_CLOEXEC


def walk(start: int, root: int, path: bytes) -> int:
    """An O_PATH descriptor of what ``path`` means from the directory ``start`` to a task whose root is ``root``.

    Raises ``OSError`` with the kernel's errno; ELOOP also for links of procfs, which mean the caller's.
    """
    here = os.dup(start)
    steps = path.split(b"/")[::-1]
    links = 0
    try:
        while steps:
            name = steps.pop()
            if name in (b"", b".") or (name == b".." and place(here) == place(root)):
                continue
            following = os.open(name, _O_PATH | os.O_NOFOLLOW, dir_fd=here)
            if stat.S_ISLNK(os.fstat(following).st_mode):
                links += 1
                target = _target(following, links)
                steps += target.split(b"/")[::-1]
                following = os.dup(root if target.startswith(b"/") else here)
            os.close(here)
            here = following
    except OSError:
        os.close(here)
        raise
    return here


def _target(link: int, count: int) -> bytes:
    """What the symbolic link behind ``link`` says; closes it."""
    try:
        if count > _LINKS_MAX or _file_system(link) == _PROC_SUPER_MAGIC:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        return os.readlink(b"", dir_fd=link)
    finally:
        os.close(link)


def place(fd: int) -> tuple[int, int, bytes]:
    """Device, inode and mount: the same directory mounted a second time is another place."""
    status = os.fstat(fd)
    with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
        mount = next(line for line in info if line.startswith(b"mnt_id:"))
    return status.st_dev, status.st_ino, mount


def _file_system(fd: int) -> int:
    """fstatfs(2): the magic number, which is its first word."""
    buffer = (ctypes.c_long * 32)()
    if LIBC.fstatfs(fd, buffer) != 0:
        raise failure()
    return int(buffer[0])
