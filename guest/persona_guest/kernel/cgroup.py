"""cgroup v2 as files: cgroups(7), cgroup-v2.rst.  Paths are relative to the root and never the caller's.

Every method raises ``OSError``; ``FileNotFoundError`` also where the cgroup goes while it is looked at.
"""

import contextlib
import errno
import os
import time
from collections.abc import Iterator

from persona_guest.core.kernel_text import lines

_READ_MAX = 1 << 20  # cgroup.procs of a place whose pids are not limited
_NOTE = "user.persona"
_POLL_S = 0.001


class Hierarchy:
    """One mounted hierarchy; tests pass a directory of plain files."""

    def __init__(self, root: str) -> None:
        self.root = root

    def path(self, cgroup: str, file: str = "") -> str:
        """The absolute path of a cgroup's directory."""
        return "/".join(part for part in (self.root, cgroup, file) if part)

    def exists(self, cgroup: str) -> bool:
        """Whether there is such a cgroup."""
        return os.path.isdir(self.path(cgroup))

    def read(self, cgroup: str, file: str) -> str:
        """A whole file of a cgroup."""
        with self._going(cgroup):
            fd = os.open(self.path(cgroup, file), os.O_RDONLY | os.O_CLOEXEC)
            try:
                parts: list[bytes] = []
                while len(parts) < 256 and (part := os.read(fd, _READ_MAX)):
                    parts.append(part)
                return b"".join(parts).decode("ascii", "surrogateescape")  # what the kernel writes there is ASCII
            finally:
                os.close(fd)

    def write(self, cgroup: str, file: str, text: str) -> None:
        """Writes a file of a cgroup by one write(2), which is how the kernel takes a value."""
        with self._going(cgroup):
            fd = os.open(self.path(cgroup, file), os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def _going(self, cgroup: str) -> Iterator[None]:
        """Of a cgroup that is removed between open and read the kernel says ENODEV; so it does of a disk in io.max."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENODEV and not self.exists(cgroup):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path(cgroup)) from error
            raise

    def make(self, cgroup: str) -> None:
        """Makes a cgroup whose parent exists; does nothing where it is there."""
        with contextlib.suppress(FileExistsError), self._going(cgroup):
            os.mkdir(self.path(cgroup), 0o755)

    def remove(self, cgroup: str) -> None:
        """Removes an empty cgroup; does nothing where it is gone.  EBUSY where something lives there."""
        with contextlib.suppress(FileNotFoundError), self._going(cgroup):
            os.rmdir(self.path(cgroup))

    def children(self, cgroup: str) -> list[str]:
        """The names of the cgroups directly below; none where it is gone."""
        try:
            with self._going(cgroup), os.scandir(self.path(cgroup)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return []

    def processes(self, cgroup: str) -> list[int]:
        """The pids in this very cgroup; none where it is gone, or threaded: the domain above has them."""
        try:
            return [int(word) for word in self.read(cgroup, "cgroup.procs").split()]
        except FileNotFoundError:
            return []
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return []

    def populated(self, cgroup: str) -> bool:
        """Whether anything lives in it or below; of one that is gone, nothing does."""
        try:
            return "populated 1" in self.read(cgroup, "cgroup.events")
        except FileNotFoundError:
            return False

    def freezes(self, cgroup: str) -> bool:
        """Whether cgroup.freeze says that it is to be frozen; one that is gone is not."""
        try:
            return "1" in self.read(cgroup, "cgroup.freeze")
        except FileNotFoundError:
            return False

    def freeze(self, cgroup: str, within_s: float = 0.0) -> None:
        """Freezes a cgroup; returns when all that lives there has stopped, or after so many seconds.

        What waits in the kernel may not stop before that.
        """
        self.write(cgroup, "cgroup.freeze", "1")
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and "frozen 1" not in self.read(cgroup, "cgroup.events"):
            time.sleep(_POLL_S)

    def thaw(self, cgroup: str) -> None:
        """Thaws a cgroup; does nothing where it is not frozen, or gone."""
        with contextlib.suppress(FileNotFoundError):
            if self.freezes(cgroup):
                self.write(cgroup, "cgroup.freeze", "0")

    def move(self, cgroup: str, pid: int) -> None:
        """Moves the process that ``pid`` (of any of its threads) belongs to, with all its threads."""
        self.write(cgroup, "cgroup.procs", str(pid))

    def note(self, cgroup: str, text: str, name: str = _NOTE) -> None:
        """Keeps a text with a cgroup (user.* attributes: Linux 5.7); an empty one removes it."""
        if text:
            os.setxattr(self.path(cgroup), name, text.encode())
        else:
            with contextlib.suppress(OSError):  # there is none, or the cgroup is gone
                os.removexattr(self.path(cgroup), name)

    def noted(self, cgroup: str, name: str = _NOTE) -> str:
        """The text that ``note`` kept; empty where there is none.  A user can write it on a cgroup of their own."""
        try:
            return os.getxattr(self.path(cgroup), name).decode("utf-8", "replace")
        except OSError:
            return ""

    def empty(self, cgroup: str, into: str) -> None:
        """Moves all that lives in one cgroup to another, children that are born meanwhile too."""
        for _ in range(16):
            pids = self.processes(cgroup)
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                    self.move(into, pid)


def cgroup_of(pid: int) -> str:
    """The cgroup of a task, relative to the root; empty for the root itself.  Raises ``OSError``."""
    fd = os.open(f"/proc/{pid}/cgroup", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(fd, 8192)
    finally:
        os.close(fd)
    found = _cgroup_in(text)
    if found is not None:
        return found
    raise FileNotFoundError(2, "no cgroup v2 hierarchy")


def _cgroup_in(text: bytes) -> str | None:
    """The v2 cgroup that /proc/PID/cgroup names.  A cgroup's name may hold anything but a slash and a newline."""
    for line in lines(text):
        if line.startswith(b"0::/"):  # beside it, a hybrid system has lines of v1
            return os.fsdecode(line[4:])
    return None
