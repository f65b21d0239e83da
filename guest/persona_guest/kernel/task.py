"""A waiting task as /proc shows it, and files as that task would find them: proc(5), openat2(2), pidfd_open(2).

A thread id may be reused once its thread is gone.  While the task waits for the gate it cannot be
(the caller asks the listener afterwards whether it still waited); later ``Process`` holds on to it.
"""

import contextlib
import ctypes
import errno
import os
import signal
import struct
from collections.abc import Iterator
from typing import NamedTuple

from persona_guest.core.kernel_text import lines
from persona_guest.kernel.libc import LIBC, failure
from persona_guest.kernel.path_resolution import place, walk

_PF_EXITING = 0x4  # linux/sched.h, in the flags of /proc/PID/stat: the program is gone from /proc already
_GONE = (FileNotFoundError, ProcessLookupError)  # what /proc says of a task that has ended
_STATUS_MAX = 1 << 20  # of /proc/PID/status, which names up to 65536 groups before its last lines
_AT_BASE, _AUXV_TYPES = 7, 128  # linux/auxvec.h
_SYS_OPENAT2 = 437  # the same on every architecture since it was added
_SYS_PIDFD_GETFD = 438
_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_RESOLVE_IN_ROOT = 0x10
_RACES = 8  # openat2(2): EAGAIN while a rename or mount anywhere races with '..'; retry, but not for ever
_O_PATH = os.O_PATH | os.O_CLOEXEC
_O_PATH_DIRECTORY = _O_PATH | os.O_DIRECTORY

_syscall = LIBC.syscall


def _how(resolve: int) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(struct.pack("=QQQ", _O_PATH, 0, resolve), 24)


_IN_ROOT = _how(_RESOLVE_IN_ROOT)
_PLAIN = _how(_RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS)
_INSIDE = _how(_RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_XDEV)


def _openat2(directory: int, path: bytes, how: ctypes.Array[ctypes.c_char]) -> int:
    for _ in range(_RACES):
        fd: int = _syscall(_SYS_OPENAT2, directory, path, how, 24)
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        if number != errno.EAGAIN:
            break
    if number == errno.EXDEV and how is _IN_ROOT:
        number = errno.ELOOP  # a magic link out of the root; execve knows no EXDEV
    raise OSError(number, os.strerror(number), path)


def open_inside(directory: int, path: bytes) -> int:
    """An O_PATH descriptor of what lies below a directory.  Raises ``OSError``, also for a link or mount on the way."""
    return _openat2(directory, path, _INSIDE)


class Credentials(NamedTuple):
    """Real, effective, saved and file system user ids of a task, its parent's pid and its thread group."""

    uids: tuple[int, int, int, int]
    ppid: int
    tgid: int


class View(NamedTuple):
    """Which files a task sees: its mount namespace, and the directory that is its root (device, inode, mount).

    ``users`` is its user namespace: in one of its own a task may chroot(2), and so may any other that shares its
    root (CLONE_FS), also after an exec.  Tasks that share a root are always of one user namespace.
    """

    mounts: int
    users: int
    root: tuple[int, int, bytes]


class Task:
    """One thread, by its id; nothing is held of it but its root, from ``open_program`` to ``let_go``."""

    __slots__ = ("_proc", "_root", "tid")

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self._proc = f"/proc/{tid}/"
        self._root = -1

    def let_go(self) -> None:
        """Closes what ``open_program`` holds of the task; call it once the programs that belong together are open."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def open_program(self, path: bytes) -> int:
        """An O_PATH descriptor of what ``path`` means to this task: its root, its mounts, its cwd.

        Raises ``OSError`` with the errno that execve would give; ELOOP also for magic links that
        cannot be resolved on the task's behalf, which fails the exec and is meant to.  Call ``let_go`` after it.
        """
        own = _own_link(path)
        if own is not None:
            return os.open(self._proc + own, _O_PATH)
        if path.startswith(b"/"):
            if self._root < 0:
                self._root = os.open(self._proc + "root", _O_PATH_DIRECTORY)
            return _openat2(self._root, path, _IN_ROOT)
        return self._open_below("cwd", path)

    def open_program_at(self, dirfd: int, path: bytes) -> int:
        """The same for execveat(2): ``path`` relative to the task's descriptor ``dirfd``; empty = that file."""
        if not path:
            return os.open(f"{self._proc}fd/{dirfd}", _O_PATH)
        return self._open_below(f"fd/{dirfd}", path)

    def _open_below(self, link: str, path: bytes) -> int:
        if not path:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        directory = os.open(self._proc + link, _O_PATH_DIRECTORY)
        try:
            return _openat2(directory, path, _PLAIN)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EXDEV):
                raise
            # a symlink or '..' on the way may lead out of the directory, and as far as the task's root
            root = os.open(self._proc + "root", _O_PATH_DIRECTORY)
            try:
                return walk(directory, root, path)
            finally:
                os.close(root)
        finally:
            os.close(directory)

    def running(self) -> tuple[int, int]:
        """(device, inode) of the program that the task runs now.  Raises ``OSError`` when it is gone."""
        status = os.stat(self._proc + "exe")
        return status.st_dev, status.st_ino

    def view(self) -> View:
        """What files the task's paths lead to.  Raises ``OSError`` when it is gone."""
        root = os.open(self._proc + "root", _O_PATH_DIRECTORY)
        try:
            return View(os.stat(self._proc + "ns/mnt").st_ino, os.stat(self._proc + "ns/user").st_ino, place(root))
        finally:
            os.close(root)

    def elf_interpreter(self) -> tuple[int, int] | None:
        """The dynamic loader that the kernel mapped at the task's last exec: (device, inode) as the kernel has them.

        ``None`` for a static program.  Raises ``BlockingIOError`` while that exec is not done, any other
        ``OSError`` when the task is gone, or nothing is mapped there any more.
        """
        base = _base(self._read("auxv", 4096))
        if base is None:
            raise BlockingIOError(errno.EAGAIN, "the program is not set up, or not any more")
        if base == 0:
            return None
        with open(self._proc + "maps", "rb") as maps:
            for line in maps:
                span, _, _, device, inode, *_ = line.split(b" ", 5)
                first, _, end = span.partition(b"-")
                if int(first, 16) <= base < int(end, 16):
                    major, _, minor = device.partition(b":")
                    return int(major, 16) << 20 | int(minor, 16), int(inode)
        raise ProcessLookupError(errno.ESRCH, "nothing is mapped where the loader was")

    def command_line(self, limit: int) -> bytes:
        """The task's argv as it stands in memory, each argument ended by NUL; at most ``limit`` bytes."""
        return self._read("cmdline", limit)

    def credentials(self) -> Credentials:
        """Uids, parent and thread group, of one consistent reading."""
        found: dict[bytes, bytes] = {}
        for line in lines(self._read("status", 4096)):
            key, _, value = line.partition(b":")
            found[key] = value
        real, effective, saved, file_system = (int(word) for word in found[b"Uid"].split())
        return Credentials((real, effective, saved, file_system), int(found[b"PPid"]), int(found[b"Tgid"]))

    def started(self) -> int:
        """When it began, in clock ticks since the machine did: with the id, the same task and no later one.

        0 where it is gone, which no task of a user's has.
        """
        try:
            return int(self._read("stat", 4096).rpartition(b")")[2].split()[19])
        except (OSError, ValueError, IndexError):
            return 0

    def is_filtered(self) -> bool:
        """Whether any seccomp filter is on it.  Raises ``OSError``."""
        return b"\nSeccomp:\t2\n" in self._read("status", _STATUS_MAX)

    def has_ended(self) -> bool:
        """Whether it is on its way out, or a zombie: it runs no code of its user's again.  Raises ``OSError``."""
        fields = self._read("stat", 4096).rpartition(b")")[2].split()
        return fields[0] in (b"Z", b"X") or bool(int(fields[6]) & _PF_EXITING)

    def audit_session(self) -> int | None:
        """The audit session id, unique to a login and inherited; ``None`` where there is none."""
        try:
            value = int(self._read("sessionid", 32))
        except (OSError, ValueError):
            return None
        return None if value == 0xFFFFFFFF else value

    def working_directory(self) -> str:
        """Where the task is, as a path for people; empty where it cannot be told."""
        try:
            return os.readlink(self._proc + "cwd")
        except OSError:
            return ""

    def _read(self, name: str, limit: int) -> bytes:
        fd = os.open(self._proc + name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, limit)
        finally:
            os.close(fd)


def _base(auxv: bytes) -> int | None:
    """AT_BASE of getauxval(3): where the loader is mapped, 0 without one; ``None`` where the vector is not filled.

    A 32-bit task's vector has half words.
    """
    for pair in (struct.Struct("=QQ"), struct.Struct("=II")):
        whole = auxv[: len(auxv) // pair.size * pair.size]
        entries: dict[int, int] = dict(pair.iter_unpack(whole))
        if all(key < _AUXV_TYPES for key in entries):
            return entries.get(_AT_BASE)
    return None


def with_ancestors(pid: int, limit: int) -> Iterator[tuple[int, Credentials]]:
    """A process, its parent, and so on up to below init: each with its credentials, ``limit`` of them at most.

    Ends before the first that is gone, so that nothing is said of who has its number by now.
    """
    for _ in range(limit):
        try:
            credentials = Task(pid).credentials()
        except OSError:
            return
        yield pid, credentials
        pid = credentials.ppid
        if pid <= 1:
            return


def living(pid: int) -> Task:
    """A thread of the process that still runs: its leader, or any other where that ended before them.

    /proc shows nothing of a leader that has ended.  Raises ``ProcessLookupError`` where all have, any other
    ``OSError`` where it cannot be told.
    """
    leader = Task(pid)
    try:
        if not leader.has_ended():
            return leader
        for name in os.listdir(f"/proc/{pid}/task"):
            thread = Task(int(name))
            with contextlib.suppress(*_GONE):
                if not thread.has_ended():
                    return thread
    except _GONE:
        pass
    raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))


def _own_link(path: bytes) -> str | None:
    """The name below /proc/TID of a path through /proc/self and the like, which means the *caller's* own."""
    if not path.startswith((b"/proc/", b"/dev/fd/")):
        return None
    for prefix, below in ((b"/proc/self/", ""), (b"/proc/thread-self/", ""), (b"/dev/fd/", "fd/")):
        if path.startswith(prefix):
            name = path[len(prefix) :]
            if below == "" and name == b"exe":
                return "exe"
            if below == "" and name.startswith(b"fd/"):
                name, below = name[3:], "fd/"
            if below == "fd/" and name.isdigit():
                return f"fd/{int(name)}"
            raise OSError(errno.ELOOP, "a path through /proc that is neither exe nor fd/N", path)
    return None


class Process:
    """A process held by a pidfd, so that its pid cannot come to mean another; ``close`` it after use."""

    __slots__ = ("_pidfd", "task")

    def __init__(self, task: Task) -> None:
        """Of a thread that is no leader, the process is taken: after its exec that thread leads it.

        Raises ``OSError`` where it is gone.
        """
        try:
            self._pidfd = os.pidfd_open(task.tid)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT):  # Linux 6.9 says ENOENT
                raise
            task = Task(task.credentials().tgid)
            self._pidfd = os.pidfd_open(task.tid)
        self.task = task

    def signal(self, number: int) -> None:
        """pidfd_send_signal(2).  Raises ``ProcessLookupError`` when it is gone."""
        signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Closes the pidfd."""
        os.close(self._pidfd)


def duplicate_descriptor(pid: int, fd: int) -> int:
    """pidfd_getfd(2): our own copy of another process's descriptor, so that it cannot be swapped.

    Raises ``OSError``; EINVAL where ``pid`` is not a thread group leader.
    """
    pidfd = os.pidfd_open(pid)
    try:
        copy: int = _syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    if copy < 0:
        raise failure()
    return copy
