"""The check of what really started: a continued exec makes the kernel read path and argv again.

A second thread may have changed them in between.  So a moment after each exec the task is checked;
what runs something other than was allowed is killed and recorded.  What ended before it was looked
at is counted: this check has the last word only until a kernel that can (BPF LSM) has it.
"""

import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from persona_guest.core.file_id import Image
from persona_guest.gate.hang_watchdog import HangWatchdog
from persona_guest.kernel.task import Process, living
from persona_guest.loop import Loop
from persona_guest.session.model import Session

_FIRST_CHECK_S = 0.003
_RETRIES_S = (0.01, 0.1, 1.0)  # for an exec that has not happened yet: a slow disk, a loaded machine
_OPEN_MAX = 512  # descriptors held


class Wrong(NamedTuple):
    """What started in the place of what was allowed.

    ``image`` is the file that runs and ``argv`` its command line, each only where it is another one.
    """

    what: str
    image: Image | None = None
    argv: tuple[bytes, ...] | None = None


class _Seen(Enum):
    RIGHT = "right"
    GONE = "gone"


Found = Wrong | _Seen


class Expectation(NamedTuple):
    """What a task was before, what it must be after, and its argv where the decision looked at it.

    ``loader`` is the ELF interpreter that maps it, as the kernel numbers it, ``None`` for a static program.
    ``argv_before`` tells a program that has not started itself anew yet from one that did with
    other arguments; both argvs in the form of /proc/PID/cmdline, each argument ended by NUL.
    """

    before: Image
    after: Image
    argv: bytes | None
    argv_before: bytes | None
    loader: tuple[int, int] | None


@dataclass(slots=True)
class Counts:
    """How many checks ended in which way."""

    right: int = 0
    wrong: int = 0
    gone: int = 0  # ended, or failed to exec, before it could be looked at


@dataclass(slots=True)
class _Check:
    process: Process
    expected: Expectation
    session: Session
    wrong: Callable[[Wrong], None]
    due: float
    tries: int = 0


class Verifier:
    """Checks each process a moment after its exec, and closes what it was given; one open check a process."""

    def __init__(self, loop: Loop, clock: Callable[[], float], hang_watchdog: HangWatchdog) -> None:
        self._loop = loop
        self._clock = clock
        self._hang_watchdog = hang_watchdog
        self._open: dict[int, _Check] = {}  # by pid, oldest first
        self._scheduled = False
        self.counts = Counts()

    def expect(self, process: Process, expected: Expectation, session: Session, wrong: Callable[[Wrong], None]) -> None:
        """Looks at ``process`` soon; ``wrong`` is called, after the kill, with what was found instead.

        A process that starts the next program already shows by ``expected.before`` what came of the
        last one: a shell that replaces itself twice within a moment is not caught for it.
        """
        pid = process.task.tid
        earlier = self._open.get(pid)
        if earlier is not None:
            self._close(pid, _superseded(earlier, expected.before))
        elif len(self._open) >= _OPEN_MAX:
            oldest, check = next(iter(self._open.items()))
            self._close(oldest, self._compare(check) or _Seen.RIGHT)
        self._open[pid] = _Check(process, expected, session, wrong, self._clock() + _FIRST_CHECK_S)
        self._schedule(_FIRST_CHECK_S)

    def forget(self, pid: int) -> None:
        """Drops the open check of a process, for the gate was released."""
        if pid in self._open:
            self._close(pid, _Seen.GONE)

    def _schedule(self, seconds: float) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_later(seconds, self._sweep)

    def _sweep(self) -> None:
        self._scheduled = False
        now = self._clock()
        for pid, check in list(self._open.items()):
            if check.due > now:
                continue
            found = self._compare(check)
            if found is None and check.tries < len(_RETRIES_S):
                check.due = now + _RETRIES_S[check.tries]
                check.tries += 1
            else:
                self._close(pid, found or _Seen.GONE)
        if self._open:
            self._schedule(max(0.001, min(check.due for check in self._open.values()) - now))

    def _compare(self, check: _Check) -> Found | None:
        outer = self._hang_watchdog.enter(check.session)  # its command line is its own memory
        try:
            return _compare(check.process, check.expected)
        finally:
            self._hang_watchdog.leave(outer)

    def _close(self, pid: int, found: Found) -> None:
        check = self._open.pop(pid)
        if found is _Seen.RIGHT:
            self.counts.right += 1
        elif found is _Seen.GONE:
            self.counts.gone += 1
        else:
            with contextlib.suppress(ProcessLookupError):
                check.process.signal(signal.SIGKILL)
            self.counts.wrong += 1
            check.wrong(found)
        check.process.close()


def _superseded(check: _Check, running: Image) -> Found:
    """What came of an exec whose process waits for its next one, running ``running``."""
    try:
        check.process.signal(0)
    except ProcessLookupError:
        return _Seen.GONE  # another process has its pid now
    if running == check.expected.after:
        return _Seen.RIGHT
    return _Seen.GONE if running == check.expected.before else _another(running)


def _compare(process: Process, expected: Expectation) -> Found | None:
    """What is there; ``None`` = the exec has not happened (yet)."""
    try:
        running = Image(*_running(process))
        if running != expected.after:
            process.signal(0)  # still there: so it was this process that was looked at
            return None if running == expected.before else _another(running)
        if expected.argv is not None:
            seen = living(process.task.tid).command_line(len(expected.argv) + 1)
            if seen == expected.argv_before:
                return None
            if seen and seen != expected.argv:
                process.signal(0)
                return Wrong("other arguments", argv=tuple(seen.split(b"\0")[:-1]))
        loader = living(process.task.tid).elf_interpreter()
        if loader != expected.loader:
            process.signal(0)
            return Wrong(f"another loader (device and inode {loader})")
    except BlockingIOError:
        return None
    except OSError:
        return _Seen.GONE
    return _Seen.RIGHT


def _running(process: Process) -> tuple[int, int]:
    """By its leader, and where that has ended by a thread that goes on."""
    try:
        return process.task.running()
    except OSError:
        return living(process.task.tid).running()


def _another(running: Image) -> Wrong:
    return Wrong(f"another program (device {running.device}, inode {running.inode})", running)
