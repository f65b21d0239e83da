"""A file that changes for as long as a start of the agent makes progress, for the standby and the PAM module.

Both keep those that ask waiting while it does: a start takes half a minute on a slow machine, and what it would have
allowed must not be refused meanwhile.  A start that hangs, or dies, changes nothing any more, and is found by that.
The agent starts only once the kernel layer is loaded, so that tells of itself in the same way.
"""

import contextlib
import fcntl
import os
import threading
import time
from pathlib import Path

NAME = "starting"  # in runtime_dir's directory
SIZE = 32  # of the file: number of the process, number of the change, spaces, a newline
LOADER = "kernel"  # instead of a process's number: the kernel layer is being loaded
_POLL_S = 0.25
_MOVED_S = 0.001  # CPU time of a thread that does something, be it wait for a disk again and again


class ProgressWriter:
    """Tells that the thread which makes it is at work, until ``ready``.

    A thread of its own looks every quarter of a second whether that one did anything.  ``who`` is the number of the
    process, or ``LOADER``.
    """

    def __init__(self, state: Path, who: str) -> None:
        self._path = state / NAME
        self._who = who
        self._count = 0
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._over = threading.Event()
        self._tell()
        self._thread = threading.Thread(target=self._watch, name="start", daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread to be had: then its beginning is all that is told
            self._thread.start()

    def ready(self) -> None:
        """Ends it and removes the file."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(5)  # or it would write the file anew
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _watch(self) -> None:
        before = time.clock_gettime(self._clock)
        while not self._over.wait(_POLL_S):
            now = time.clock_gettime(self._clock)
            if now - before >= _MOVED_S:
                before = now
                self._tell()

    def _tell(self) -> None:
        self._count += 1
        text = f"{self._who} {self._count}".ljust(SIZE - 1).encode() + b"\n"
        with contextlib.suppress(OSError):  # then they have the patience that they have without
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.pwrite(fd, text, 0)  # as long as what it replaces: it is read whole, and needs no room
            finally:
                os.close(fd)


class Start:
    """One start, of the one agent that may run on what is in ``state``; to be made by the thread that starts it."""

    def __init__(self, state: Path) -> None:
        """Raises ``OSError``, also where an agent runs with this directory already."""
        self._lock = _alone(state)
        self._progress_shown = ProgressWriter(state, str(os.getpid()))

    def ready(self) -> None:
        """Ends the start: the agent answers from now on."""
        self._progress_shown.ready()

    def close(self) -> None:
        """Ends the start and releases the lock, so that another agent may start."""
        self.ready()
        os.close(self._lock)


class Progress:
    """Reads that file in another process and tells whether the agent's start makes progress.

    It follows the first start that it sees change; one that begins again has failed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._text = b""
        self._starter: bytes | None = None

    @property
    def is_starting(self) -> bool:
        """Whether there is a start that is not over, or one that was killed."""
        return self._read() != b""

    def begin(self) -> None:
        """Forgets what was seen: an agent that was ready is gone."""
        self._text = self._read()  # of one that was killed in its start: that does not change any more
        self._starter = None

    def has_moved(self) -> bool:
        """Whether the start made progress since the last call.

        False for every start after the first: one that began again had failed.  The load of the kernel layer
        comes before a start and is none.
        """
        text = self._read()
        if text in (b"", self._text):
            return False
        self._text = text
        process = text.split(b" ")[0]
        if process == LOADER.encode():
            return True
        if self._starter is None:
            self._starter = process
        return process == self._starter

    def _read(self) -> bytes:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return b""
        try:
            return os.read(fd, SIZE)
        except OSError:
            return b""
        finally:
            os.close(fd)


def _alone(state: Path) -> int:
    """Locks the directory for as long as the descriptor is open; no file, which would need room.

    Raises ``OSError``, also where an agent has it.
    """
    lock = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise OSError(f"an agent runs already with {state.parent}; 'persona status' asks it") from None
        raise
    return lock
