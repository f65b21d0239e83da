"""Notices that the agent hangs in somebody's memory, and ends who makes it hang.

A waiting task's arguments may lie in a page that a file system of the user's own (FUSE) has still to
deliver, its program on an overlay of such a file system, its standard error too: then looking at them
waits for a process that the gate itself may be holding, and with it every other session waits.  So
everything that is done for an exec stands between ``enter`` and ``leave``.  It must never take a busy
machine for an attack: what ordinary swapping delays ends within the limit, and where it cannot be told
from a slow disk it has five times as long.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from persona_guest.core.kernel_text import decimal
from persona_guest.core.messages import printable
from persona_guest.kernel.task import Task, living
from persona_guest.session.model import Session

log = logging.getLogger("persona.gate")

INTERRUPT = signal.SIGURG  # what else would come of it is nothing: signal(7)
LIMIT_S = 1.0  # thousands of times what it takes
_DOUBT = 5  # times as long, where it could as well be a disk that this machine waits for
_POLL_S = 0.25
_EXCLUDED_S, _EXCLUDED_MAX_S = 10.0, 640.0  # who did it once, and twice as long each time that they do it again
_FORGOTTEN_S = 3600.0
_PASSES = 32
_CGROUPS = "/sys/fs/cgroup"
_FUSE = b"request_wait_answer"  # where a task sleeps that asked a FUSE server: nothing of this machine's is there


Entered = tuple[float, Session]  # since when (monotonic seconds), for whom


class HangWatchdog:
    """Watches, in a thread of its own, what the thread that made this does between ``enter`` and ``leave``.

    Past the limit every process of the session's user is killed: their file system goes with it, and the read fails.
    Where that does not help for as long again, ``give_up`` is called: a new agent denies what this one hangs in without
    reading it.
    """

    def __init__(
        self,
        give_up: Callable[[], None],
        limit_s: float = LIMIT_S,
        cgroups: Callable[[int], list[str]] = lambda uid: [],
    ) -> None:
        """``cgroups`` tells the directories of a user's own, beside their slice; another thread asks it."""
        self._give_up = give_up
        self._cgroups = cgroups
        self._limit_s = limit_s
        self._thread, self._ident = threading.get_native_id(), threading.get_ident()
        self._entered: Entered | None = None
        self._excluded: dict[int, tuple[float, float]] = {}  # by uid: since when, and for how long
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="hang-watchdog", daemon=True).start()

    def enter(self, session: Session) -> Entered | None:
        """Watches from now on: a task of ``session`` may make us wait.

        Returns what ``leave`` needs, for one watch may stand within another.
        """
        outer = self._entered
        self._entered = (time.monotonic(), session)
        return outer

    def leave(self, outer: Entered | None) -> None:
        """Ends the watch that ``enter`` began: the task has not made us wait."""
        self._entered = outer

    def rest(self) -> Entered | None:
        """Stops watching until ``resume``, which gets what this returns: what comes now waits for the kernel only.

        That may take as long as a module takes to load.  Nobody notices a wait until then: no file, memory or terminal
        of a user's may be looked at.
        """
        outer, self._entered = self._entered, None
        return outer

    def resume(self, outer: Entered | None) -> None:
        """Goes on with the watch that ``rest`` stopped; its time begins anew."""
        self._entered = outer and (time.monotonic(), outer[1])

    @contextlib.contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """``enter`` and ``leave`` around a block, whatever it comes to; for all but the path of every exec."""
        outer = self.enter(session)
        try:
            yield
        finally:
            self.leave(outer)

    def excluded_s(self, uid: int) -> float:
        """Seconds for which a user who made the agent wait should not come in again; 0 = at once."""
        since, seconds = self._excluded.get(uid, (0.0, 0.0))
        return max(0.0, since + seconds - time.monotonic())

    def _exclude(self, uid: int) -> None:
        now = time.monotonic()
        self._excluded = {who: one for who, one in self._excluded.items() if now - one[0] < _FORGOTTEN_S}
        before = self._excluded[uid][1] * 2 if uid in self._excluded else _EXCLUDED_S
        self._excluded[uid] = now, min(before, _EXCLUDED_MAX_S)

    def close(self) -> None:
        """Ends the watching thread."""
        self._over.set()

    def _watch(self) -> None:
        answered: Entered | None = None
        until = 0.0
        while not self._over.wait(_POLL_S):
            entered, now = self._entered, time.monotonic()
            if entered is None or now - entered[0] < self._limit_s:
                continue
            since, session = entered
            if answered is not entered:
                if now - since < _DOUBT * self._limit_s and not self._asks_a_user():
                    continue
                if session.uid != 0:
                    log.critical(
                        "%s makes the gate wait: all their processes are killed", printable(session.subject.user)
                    )
                    self._exclude(session.uid)
                    kill_all_of(session.uid, self._cgroups(session.uid))
                self._interrupt()
                answered, until = entered, now + self._limit_s
            elif now > until:
                log.critical("the gate hangs in an exec of %s", printable(session.subject.user))
                self._give_up()
                return

    def _interrupt(self) -> None:
        """Ends a wait for a notification that somebody else has taken: no end of a process does, but a signal."""
        if signal.getsignal(INTERRUPT) not in (signal.SIG_DFL, signal.SIG_IGN, None):
            signal.pthread_kill(self._ident, INTERRUPT)

    def _asks_a_user(self) -> bool:
        """Whether the watched thread sleeps in a question to a file system that is some process's."""
        try:
            with open(f"/proc/self/task/{self._thread}/wchan", "rb") as file:
                return file.read() == _FUSE
        except OSError:
            return False


def kill_all_of(uid: int, cgroups: Iterable[str] = ()) -> None:
    """SIGKILL for what lives in these cgroups and for all with ``uid`` among their user ids, until nobody is left."""
    for directory in (f"{_CGROUPS}/user.slice/user-{uid}.slice", *cgroups):
        with contextlib.suppress(OSError):  # all at once, however they fork: Linux 5.14
            Path(directory, "cgroup.kill").write_text("1")
    for _ in range(_PASSES):  # who has not been placed yet is found one by one
        if not _kill_seen(uid):
            return


def _kill_seen(uid: int) -> bool:
    seen = False
    for pid in filter(None, map(decimal, os.listdir("/proc"))):
        with contextlib.suppress(OSError, KeyError):  # gone meanwhile
            pidfd = os.pidfd_open(pid)
            try:
                if uid in Task(pid).credentials().uids:
                    living(pid)
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    seen = True
            finally:
                os.close(pidfd)
    return seen
