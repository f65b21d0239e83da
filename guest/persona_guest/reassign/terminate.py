"""What no persona allows any more is asked to end, and ended when its grace is over.

All of a cgroup at once, where it is one of ours: nothing that is born there outruns that.  One by one, where
what may stay lives beside it.
"""

import contextlib
import errno
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from persona.documents import Persona
from persona.problems import PersonaError
from persona_guest.core.reassignment import NO_PERSONA
from persona_guest.enforce.enforcer import Enforcer
from persona_guest.kernel.task import Task
from persona_guest.loop import Loop, Timer
from persona_guest.program.process import UNKNOWN, Running
from persona_guest.session.placement import Placement
from persona_guest.session.registry import Registry

log = logging.getLogger("persona.enforce")

GRACE_S = 5.0  # between the message and SIGTERM, and the end
AGAIN_S = 1.0
NAMED_MAX = 64  # of what is frozen or killed at once, so many are recorded one by one
_ENDED = (errno.ESRCH, errno.EINVAL, errno.ENOENT)  # of pidfd_open(2): it is nobody now, or a thread

TellUser = Callable[[Placement, str], None]
RecordProcess = Callable[[Placement, Persona, str, Running], None]


@dataclass(frozen=True, slots=True)
class _CgroupDeadline:
    """To what lives in a cgroup under ``persona``: at ``due`` (monotonic seconds) all of it ends."""

    cgroup: str
    persona: str
    due: float
    timer: Timer


@dataclass(eq=False, slots=True)
class _ProcessDeadline:
    """The same to some of what lives there, by when they ``started``."""

    cgroup: str
    persona: str
    due: float
    started: dict[int, int]


class Termination:
    """Keeps who was asked to end and until when.

    ``tell`` tells a session's user, ``note`` records what becomes of one process.
    """

    def __init__(self, loop: Loop, registry: Registry, enforcer: Enforcer, tell: TellUser, note: RecordProcess) -> None:
        self._loop = loop
        self._registry = registry
        self._enforcer = enforcer
        self._tell = tell
        self._note = note
        self._notices: dict[str, _CgroupDeadline] = {}  # by cgroup; what comes into it later postpones nothing
        self._some: list[_ProcessDeadline] = []

    def under_way(self, cgroup: str) -> bool:
        """Whether all of a cgroup was asked to end, and its grace lasts."""
        return cgroup in self._notices

    def asked(self, cgroup: str) -> dict[int, int]:
        """Those of a cgroup that were asked to end one by one, and whose grace lasts: pid and when each started."""
        return {pid: at for some in self._some if some.cgroup == cgroup for pid, at in some.started.items()}

    def all_of(self, placement: Placement, old: Persona, cgroup: str, rest: dict[int, Running]) -> None:
        """Asks ``rest`` to end, and kills their whole cgroup when the grace of those that were asked first is over."""
        now = time.monotonic()
        notice = self._notices.get(cgroup)
        if notice is None:
            timer = self._loop.call_later(GRACE_S, lambda: self._over(placement, cgroup))
            notice = self._notices[cgroup] = _CgroupDeadline(cgroup, old.name, now + GRACE_S, timer)
        self._ask(placement, old, rest, notice.due - now)

    def void(self, cgroup: str) -> None:
        """Forgets that all of a cgroup was asked to end: they have ended, or come back."""
        notice = self._notices.pop(cgroup, None)
        if notice is not None:
            notice.timer.cancel()

    def each(
        self, placement: Placement, old: Persona, cgroup: str, rest: dict[int, Running], started: dict[int, int]
    ) -> None:
        """Asks some of a cgroup to end, and kills those alone.

        ``started`` says when each began, which tells them from later processes: descriptors for all might be too many.
        """
        some = _ProcessDeadline(cgroup, old.name, time.monotonic() + GRACE_S, started)
        self._some.append(some)
        self._loop.call_later(GRACE_S, lambda: self._over_each(some))
        self._ask(placement, old, rest, GRACE_S)

    def returned(self, cgroup: str, persona: str) -> None:
        """Lets those of a cgroup stay that were asked to end since it was last under ``persona``, which it is again."""
        notice = self._notices.get(cgroup)
        asked = [one for one in (*self._some, notice) if one is not None and one.cgroup == cgroup]
        since = min((one.due for one in asked if one.persona == persona), default=math.inf)
        self._some = [one for one in self._some if one.cgroup != cgroup or one.due < since]
        if notice is not None and notice.due >= since:
            self.void(cgroup)

    def _over(self, placement: Placement, cgroup: str) -> None:
        try:
            with contextlib.suppress(FileNotFoundError):  # all that was there has come back, or ended
                self._enforcer.tree.write(cgroup, "cgroup.kill", "1")
        except OSError as error:
            log.error("%s does not end yet: %s", cgroup, error)
            timer = self._loop.call_later(AGAIN_S, lambda: self._over(placement, cgroup))
            self._notices[cgroup] = replace(self._notices[cgroup], timer=timer)
            return
        del self._notices[cgroup]
        self._loop.call_later(0.5, lambda: self._gone(placement, cgroup))

    def _over_each(self, some: _ProcessDeadline) -> None:
        if some not in self._some:
            return
        left: dict[int, int] = {}
        for pid, at in some.started.items():
            try:
                _signal(pid, signal.SIGKILL, at)
            except OSError as error:
                if error.errno not in _ENDED:
                    log.error("process %d does not end yet: %s", pid, error)
                    left[pid] = at
        some.started = left
        if left:
            self._loop.call_later(AGAIN_S, lambda: self._over_each(some))
        else:
            self._some.remove(some)

    def _ask(self, placement: Placement, old: Persona, rest: dict[int, Running], seconds: float) -> None:
        names = names_of(rest) or "all of the service manager"
        why = "no persona applies" if old.name == NO_PERSONA.name else f"{old.name} no longer applies"
        self._tell(placement, f"persona: {why}: {names} is asked to end, and killed after {seconds:.0f} s")
        for pid in rest:
            with contextlib.suppress(OSError):  # it ended meanwhile
                _signal(pid, signal.SIGTERM)
        for running in list(rest.values())[:NAMED_MAX] or [UNKNOWN]:
            self._note(placement, old, "killed", running)

    def _gone(self, placement: Placement, cgroup: str) -> None:
        if self._registry.placement(placement.session_id) is not placement:
            return  # the session has ended meanwhile: what is saved of it now would stay
        try:
            for key, place in list(placement.places.items()):
                if place.cgroup == cgroup and not self._enforcer.tree.populated(cgroup):
                    self._enforcer.leave(placement, key)
        except (PersonaError, OSError) as error:  # it is empty, and left when what it is for changes next
            log.error("%s cannot be left yet: %s", cgroup, error)


def started(pids: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Pid and start time of those that are still there; both together are never a later process.

    Raises ``OSError``.
    """
    for pid in pids:
        at = Task(pid).started()
        if at:
            yield pid, at
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 0)
                raise OSError(errno.EAGAIN, f"process {pid} cannot be looked at")


def names_of(rest: dict[int, Running]) -> str:
    """The names of some processes for a message, at most five."""
    names = sorted({running.name for running in rest.values()})
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _signal(pid: int, number: int, at: int | None = None) -> None:
    """To the process that started ``at`` that time, and no later one of that pid.  Raises ``OSError``."""
    pidfd = os.pidfd_open(pid)
    try:
        if at is None or (pid, at) in started([pid]):
            signal.pidfd_send_signal(pidfd, number)
    finally:
        os.close(pidfd)
