"""The check of what really started: a continued exec makes the kernel read path and argv again.

A second thread may have changed them in between.  So a moment after each exec the task is looked at;
what runs something other than was allowed is killed and recorded.  What ended before it was looked
at is counted: this check has the last word only until a kernel that can (BPF LSM) has it.
"""

import contextlib
import signal
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from persona_guest.gate.identity import Image
from persona_guest.kernel.task import Process
from persona_guest.loop import Loop

_FIRST_LOOK_S = 0.003
_LOOKS = (0.01, 0.1, 1.0)  # for an exec that has not happened yet: a slow disk, a loaded machine
_QUEUE_MAX = 512  # descriptors held


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
    due: float
    process: Process
    expected: Expectation
    wrong: Callable[[str], None]
    tries: int = 0


class Verifier:
    """Owns the processes that it is given and closes them."""

    def __init__(self, loop: Loop, clock: Callable[[], float]) -> None:
        self._loop = loop
        self._clock = clock
        self._queue: deque[_Look] = deque()
        self._scheduled = False
        self.counts = Counts()

    def expect(self, process: Process, expected: Expectation, wrong: Callable[[str], None]) -> None:
        """Looks at ``process`` soon; ``wrong`` is called, after the kill, with what was found instead."""
        if len(self._queue) >= _QUEUE_MAX:
            self._look(self._queue.popleft(), final=True)
        self._queue.append(_Look(self._clock() + _FIRST_LOOK_S, process, expected, wrong))
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled and self._queue:
            self._scheduled = True
            self._loop.call_later(max(0.0, self._queue[0].due - self._clock()), self._sweep)

    def _sweep(self) -> None:
        self._scheduled = False
        now = self._clock()
        while self._queue and self._queue[0].due <= now:
            look = self._queue.popleft()
            if self._look(look, final=look.tries >= len(_LOOKS)):
                continue
            wait = _LOOKS[look.tries]
            look.tries += 1
            look.due = now + wait
            self._loop.call_later(wait, _bind(self._again, look))
        self._schedule()

    def _again(self, look: _Look) -> None:
        look.due = 0.0
        self._queue.appendleft(look)
        self._sweep()

    def _look(self, look: _Look, *, final: bool) -> bool:
        """True when this look was the last: right, wrong or gone."""
        found = _compare(look.process, look.expected)
        if found is None and not final:
            return False
        if found == "":
            self.counts.right += 1
        elif found is None or found == "gone":
            self.counts.gone += 1
        else:
            with contextlib.suppress(ProcessLookupError):
                look.process.signal(signal.SIGKILL)
            self.counts.wrong += 1
            look.wrong(found)
        look.process.close()
        return True


def _compare(process: Process, expected: Expectation) -> str | None:
    """Empty = right, "gone", ``None`` = the exec has not happened (yet), else what is wrong."""
    try:
        running = process.running()
        if running != expected.after:
            if running == expected.before:
                return None
            return f"another program (device {running[0]}, inode {running[1]})"
        if expected.argv is not None:
            seen = process.task.command_line(len(expected.argv) + 1)
            if seen == expected.argv_before:
                return None
            if seen and seen != expected.argv:
                return "other arguments"
    except OSError:
        return "gone"
    return ""


def _bind(call: Callable[[_Look], None], look: _Look) -> Callable[[], None]:
    return lambda: call(look)
