"""The check of what really started: a continued exec makes the kernel read path and argv again.

A second thread may have changed them in between.  So a moment after each exec the task is looked at;
what runs something other than was allowed is killed and recorded.  What ended before it was looked
at is counted: this check has the last word only until a kernel that can (BPF LSM) has it.
"""

import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from persona_guest.core.sessions import Session
from persona_guest.gate.guard import Guard
from persona_guest.gate.identity import Image
from persona_guest.kernel.task import Process, living
from persona_guest.loop import Loop

_FIRST_LOOK_S = 0.003
_LOOKS = (0.01, 0.1, 1.0)  # for an exec that has not happened yet: a slow disk, a loaded machine
_OPEN_MAX = 512  # descriptors held
_RIGHT, _GONE = "", "gone"


class Expectation(NamedTuple):
    """What a task was before, what it must be after, and its argv where the decision looked at it.

    ``argv_before`` tells a program that has not started itself anew yet from one that did with
    other arguments; both argvs in the form of /proc/PID/cmdline, each argument ended by NUL.
    """

    before: Image
    after: Image
    argv: bytes | None
    argv_before: bytes | None


@dataclass(slots=True)
class Counts:
    """How the looks ended."""

    right: int = 0
    wrong: int = 0
    gone: int = 0  # ended, or failed to exec, before it could be looked at


@dataclass(slots=True)
class _Look:
    process: Process
    expected: Expectation
    session: Session
    wrong: Callable[[str], None]
    due: float
    tries: int = 0


class Verifier:
    """Owns the processes that it is given and closes them; at most one look a process is open."""

    def __init__(self, loop: Loop, clock: Callable[[], float], guard: Guard) -> None:
        self._loop = loop
        self._clock = clock
        self._guard = guard
        self._open: dict[int, _Look] = {}  # by pid, oldest first
        self._scheduled = False
        self.counts = Counts()

    def expect(self, process: Process, expected: Expectation, session: Session, wrong: Callable[[str], None]) -> None:
        """Looks at ``process`` soon; ``wrong`` is called, after the kill, with what was found instead.

        A process that starts the next program already shows by ``expected.before`` what came of the
        last one: a shell that replaces itself twice within a moment is not caught for it.
        """
        pid = process.task.tid
        earlier = self._open.get(pid)
        if earlier is not None:
            self._close(pid, _superseded(earlier, expected.before))
        elif len(self._open) >= _OPEN_MAX:
            oldest, look = next(iter(self._open.items()))
            self._close(oldest, self._compare(look) or "")
        self._open[pid] = _Look(process, expected, session, wrong, self._clock() + _FIRST_LOOK_S)
        self._schedule(_FIRST_LOOK_S)

    def forget(self, pid: int) -> None:
        """What this process starts from now on is nobody's business: the gate was released."""
        if pid in self._open:
            self._close(pid, _GONE)

    def _schedule(self, seconds: float) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_later(seconds, self._sweep)

    def _sweep(self) -> None:
        self._scheduled = False
        now = self._clock()
        for pid, look in list(self._open.items()):
            if look.due > now:
                continue
            found = self._compare(look)
            if found is None and look.tries < len(_LOOKS):
                look.due = now + _LOOKS[look.tries]
                look.tries += 1
            else:
                self._close(pid, _GONE if found is None else found)
        if self._open:
            self._schedule(max(0.001, min(look.due for look in self._open.values()) - now))

    def _compare(self, look: _Look) -> str | None:
        outer = self._guard.enter(look.session)  # its command line is its own memory
        try:
            return _compare(look.process, look.expected)
        finally:
            self._guard.leave(outer)

    def _close(self, pid: int, found: str) -> None:
        look = self._open.pop(pid)
        if found == _RIGHT:
            self.counts.right += 1
        elif found == _GONE:
            self.counts.gone += 1
        else:
            with contextlib.suppress(ProcessLookupError):
                look.process.signal(signal.SIGKILL)
            self.counts.wrong += 1
            look.wrong(found)
        look.process.close()


def _superseded(look: _Look, running: Image) -> str:
    """What came of an exec whose process waits for its next one, running ``running``."""
    try:
        look.process.signal(0)
    except ProcessLookupError:
        return _GONE  # another process has its pid now
    if running == look.expected.after:
        return _RIGHT
    return _GONE if running == look.expected.before else _another(running)


def _compare(process: Process, expected: Expectation) -> str | None:
    """_RIGHT, _GONE, ``None`` = the exec has not happened (yet), else what is wrong."""
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
                return "other arguments"
    except OSError:
        return _GONE
    return _RIGHT


def _running(process: Process) -> tuple[int, int]:
    """By its leader, and where that has ended by a thread that goes on."""
    try:
        return process.task.running()
    except OSError:
        return living(process.task.tid).running()


def _another(running: Image) -> str:
    return f"another program (device {running.device}, inode {running.inode})"
