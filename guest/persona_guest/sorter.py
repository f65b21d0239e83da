"""Running processes of one session go where they belong now, and what no persona allows is frozen or ends.

What a session's persona allows moves under it; with the rest happens what the old one's ``on_revoke``
says.
"""

import contextlib
import errno
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from persona.decisions import PersonaRef
from persona.documents import Persona
from persona.problems import PersonaError
from persona_guest.core.following import NOBODY, Held, choose
from persona_guest.core.places import MANAGED, Place, manager_of
from persona_guest.enforce.home import Home
from persona_guest.enforcer import Enforcer
from persona_guest.gate.guard import Guard
from persona_guest.gate.identity import Identifier, Image
from persona_guest.gate.pending import Gated
from persona_guest.gate.running import UNKNOWN, Running, look
from persona_guest.kernel.task import Task
from persona_guest.loop import Loop, Timer
from persona_guest.settings import Settings

log = logging.getLogger("persona.enforce")

GRACE_S = 5.0  # between the message and SIGTERM, and the end
_AGAIN_S = 1.0
_PASSES = 8  # what is moved may have children meanwhile
_RUNNING = 3  # of the passes, so many before what is looked at is stopped for it
_STOPPED_S = 0.25  # that takes a millisecond; what waits for the gate's own answer starts nothing and cannot be
_CGROUPS_MAX = 2048  # of a service manager, which has a hundred, and so many processes
_PIDS_MAX = 65536
_ENDED = (errno.ESRCH, errno.EINVAL, errno.ENOENT)  # of pidfd_open(2): it is nobody now, or a thread
_NAMED_MAX = 64  # of what is frozen or killed at once, so many are recorded one by one

Shells = tuple[Image, ...]
Pairs = Sequence[tuple[Held, Persona]]
Told = Callable[[Home, str], None]
Noted = Callable[[Home, Persona, str, Running], None]


@dataclass(frozen=True, slots=True)
class _Notice:
    """To what lives in a cgroup under ``persona``: at ``due`` (monotonic seconds) all of it ends."""

    persona: str
    due: float
    timer: Timer


class Sorter:
    """``tell`` tells a session's user, ``note`` records what becomes of one process."""

    def __init__(
        self,
        settings: Settings,
        loop: Loop,
        enforcer: Enforcer,
        identifier: Identifier,
        guard: Guard,
        tell: Told,
        note: Noted,
    ) -> None:
        self._settings = settings
        self._loop = loop
        self._enforcer = enforcer
        self._identifier = identifier
        self._guard = guard
        self._tell = tell
        self._note = note
        self._ending: dict[str, _Notice] = {}  # by cgroup; what comes into it later postpones nothing

    def follow(self, home: Home, gated: Gated, holding: tuple[Held, ...], revoked: bool) -> bool:
        """Brings all that runs in a session to where it belongs; false where it could not be done yet."""
        home.base = holding[0].ref if holding else NOBODY
        home.holding = None  # until all of it is done: from the middle, the way back is one to follow too
        outer = self._guard.enter(gated.session)  # what its processes call themselves is in their own memory
        try:
            pairs = [(held, self._enforcer.document(held.ref)) for held in holding]
            shells = () if revoked else gated.shells
            sorted_ = [self._sort(home, key, pairs, shells) for key in list(home.places) if key != MANAGED]
            whole = all(sorted_)
            if not home.places and manager_of(home.found, home.uid) is not None:
                self._enforcer.enter(home, home.base, home.found)
            if MANAGED in home.places:
                self._manage(home, pairs, shells)
            if whole:
                home.holding = holding
        except (PersonaError, OSError) as error:
            log.error("session %s does not follow: %s", home.session, error)
            return False
        except Exception:  # whatever a user's processes are: the agent answers the others, and tries all of this again
            log.exception("session %s does not follow", home.session)
            return False
        finally:
            self._guard.leave(outer)
        return whole

    def _sort(self, home: Home, key: str, pairs: Pairs, shells: Shells) -> bool:
        """Every process of a place goes to where it would be started now, or stays, or is withdrawn.

        What forks and ends faster than it can be looked at is frozen for it.  False where something is left even so.
        """
        place, tree = home.places[key], self._enforcer.tree
        old = self._enforcer.document(place.persona)
        done: set[int] = set()  # what needs no further look: what was born of it is listed by itself
        withdrawn: dict[int, Running] = {}
        stays = returns = whole = False
        frozen = place.withdrawn and old.on_revoke == "freeze" and tree.freezes(place.cgroup)
        try:
            for number in range(_PASSES):
                listed = [pid for pid in tree.processes(place.cgroup) if pid not in done]
                if not listed:
                    whole = True
                    break
                if number == _RUNNING:
                    tree.freeze(place.cgroup, _STOPPED_S)
                    continue
                found = dict(self._look(listed))
                done.update(pid for pid in listed if pid not in found)
                for pid, running in found.items():
                    ref = self._target(running, home, old, pairs, shells)
                    if ref is None:
                        target = self._enforcer.enter(home, place.persona, withdrawn=True)
                        if not withdrawn and not tree.populated(target.cgroup):
                            self._void(target.cgroup)
                        withdrawn[pid] = running
                    else:
                        target = self._enforcer.enter(home, ref)
                    if target.cgroup == place.cgroup:
                        done.add(pid)
                        stays = True
                    else:
                        with contextlib.suppress(ProcessLookupError):
                            tree.move(target.cgroup, pid)
                        returns |= place.withdrawn
        finally:  # the next try finds what was moved where it is withdrawn already
            try:
                if not frozen:  # nor by an agent that ended before it could thaw it
                    tree.thaw(place.cgroup)
            finally:
                if withdrawn:
                    self._withdraw(home, place, old, withdrawn)
        if not stays and not tree.populated(place.cgroup):
            self._enforcer.leave(home, key)
        if returns and old.on_revoke == "freeze":
            self._tell(home, f"persona: {old.name} applies again; what was frozen goes on")
        return whole

    @staticmethod
    def _target(running: Running, home: Home, old: Persona, pairs: Pairs, shells: Shells) -> PersonaRef | None:
        ref = choose(running.trusted, pairs)
        if ref is None and (running.image in shells or (old.on_revoke == "finish" and home.base != NOBODY)):
            return home.base  # the login shell is admission's, until the session itself is revoked
        return ref

    def _withdraw(self, home: Home, place: Place, old: Persona, rest: dict[int, Running]) -> None:
        """``place`` is where it was: perhaps withdrawn already, by an agent that ended before it ended this."""
        cgroup = self._enforcer.enter(home, place.persona, withdrawn=True).cgroup
        if old.on_revoke == "kill":
            if not place.withdrawn or cgroup not in self._ending:
                self._end(home, old, cgroup, rest)
        elif old.on_revoke == "freeze":
            if place.withdrawn and self._enforcer.tree.freezes(cgroup):
                return
            self._enforcer.tree.freeze(cgroup)
            self._tell(home, f"persona: {old.name} no longer applies: {_names(rest)} frozen until it does again")
            for running in list(rest.values())[:_NAMED_MAX]:
                self._note(home, old, "frozen", running)

    def _manage(self, home: Home, pairs: Pairs, shells: Shells) -> None:
        """The service manager keeps its place under whatever is the base now.

        Its parts cannot be frozen one by one (its user could thaw them): ``freeze`` lets them finish.
        """
        place = home.places[MANAGED]
        if place.persona == home.base:
            return
        old = self._enforcer.document(place.persona)
        notice = self._ending.get(place.cgroup)
        if notice is not None and notice.persona == home.base.name:
            self._void(place.cgroup)
        rest: dict[int, Running] = {}
        whole = True
        if old.on_revoke == "kill":  # looked at before the base is another: what fails here is tried again
            pids, whole = self._below(place.cgroup)
            rest = {
                pid: running
                for pid, running in self._look(pids)
                if self._target(running, home, old, pairs, shells) is None and not running.plumbing(self._settings)
            }
        started = dict(_started(rest))
        try:
            self._enforcer.enter(home, home.base, place.cgroup)
        finally:  # a base that cannot be kept on disk is the base all the same
            if home.places[MANAGED].persona == home.base:
                if not whole:
                    self._end(home, old, place.cgroup, rest)
                elif rest:
                    self._end_each(home, old, rest, started)

    def _below(self, cgroup: str) -> tuple[list[int], bool]:
        """The processes of a service manager, and whether these are all: its user makes as many cgroups as he likes."""
        tree, waiting = self._enforcer.tree, [cgroup]
        found: list[int] = []
        whole = True
        for _ in range(_CGROUPS_MAX):
            if not waiting or len(found) >= _PIDS_MAX:
                break
            here = waiting.pop()
            try:
                found += tree.processes(here)
                waiting += [f"{here}/{name}" for name in tree.children(here)]
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:  # and as deep as no path leads
                    raise
                whole = False
        return found, whole and not waiting

    # --- processes --------------------------------------------------------------------------------

    def _look(self, pids: Iterable[int]) -> Iterator[tuple[int, Running]]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                yield pid, look(pid, self._identifier)

    def _end(self, home: Home, old: Persona, cgroup: str, rest: dict[int, Running]) -> None:
        """Asks them to end, and ends all of their cgroup when the grace of those that were asked first is over."""
        now = time.monotonic()
        notice = self._ending.get(cgroup)
        if notice is None:
            timer = self._loop.call_later(GRACE_S, lambda: self._over(home, cgroup))
            notice = self._ending[cgroup] = _Notice(old.name, now + GRACE_S, timer)
        self._ask(home, old, rest, notice.due - now)

    def _void(self, cgroup: str) -> None:
        """Whoever was asked to end there has ended, or come back."""
        notice = self._ending.pop(cgroup, None)
        if notice is not None:
            notice.timer.cancel()

    def _over(self, home: Home, cgroup: str) -> None:
        try:
            with contextlib.suppress(FileNotFoundError):  # all that was there has come back, or ended
                self._enforcer.tree.write(cgroup, "cgroup.kill", "1")
        except OSError as error:
            log.error("%s does not end yet: %s", cgroup, error)
            timer = self._loop.call_later(_AGAIN_S, lambda: self._over(home, cgroup))
            self._ending[cgroup] = replace(self._ending[cgroup], timer=timer)
            return
        del self._ending[cgroup]
        self._loop.call_later(0.5, lambda: self._gone(home, cgroup))

    def _end_each(self, home: Home, old: Persona, rest: dict[int, Running], started: dict[int, int]) -> None:
        """The same for some of a cgroup; no descriptor is held for that long, there may be too many."""
        self._loop.call_later(GRACE_S, lambda: self._over_each(started))
        self._ask(home, old, rest, GRACE_S)

    def _over_each(self, started: dict[int, int]) -> None:
        left: dict[int, int] = {}
        for pid, at in started.items():
            try:
                _signal(pid, signal.SIGKILL, at)
            except OSError as error:
                if error.errno not in _ENDED:
                    log.error("process %d does not end yet: %s", pid, error)
                    left[pid] = at
        if left:
            self._loop.call_later(_AGAIN_S, lambda: self._over_each(left))

    def _ask(self, home: Home, old: Persona, rest: dict[int, Running], seconds: float) -> None:
        self._tell(home, f"persona: {old.name} no longer applies: {_names(rest)} ends in {seconds:.0f} s")
        for pid in rest:
            with contextlib.suppress(OSError):  # it ended meanwhile
                _signal(pid, signal.SIGTERM)
        for running in list(rest.values())[:_NAMED_MAX] or [UNKNOWN]:
            self._note(home, old, "killed", running)

    def _gone(self, home: Home, cgroup: str) -> None:
        try:
            for key, place in list(home.places.items()):
                if place.cgroup == cgroup and not self._enforcer.tree.populated(cgroup):
                    self._enforcer.leave(home, key)
        except (PersonaError, OSError) as error:  # it is empty, and left when what it is for changes next
            log.error("%s cannot be left yet: %s", cgroup, error)


def _started(pids: Iterable[int]) -> Iterator[tuple[int, int]]:
    """When each began, of those that are there: with the pid, that process and no later one.  Raises ``OSError``."""
    for pid in pids:
        at = Task(pid).started()
        if at:
            yield pid, at
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 0)
                raise OSError(errno.EAGAIN, f"process {pid} cannot be looked at")


def _signal(pid: int, number: int, started: int | None = None) -> None:
    """To the process that ``started`` then, and no later one of that pid.  Raises ``OSError``."""
    pidfd = os.pidfd_open(pid)
    try:
        if started is None or (pid, started) in _started([pid]):
            signal.pidfd_send_signal(pidfd, number)
    finally:
        os.close(pidfd)


def _names(rest: dict[int, Running]) -> str:
    names = sorted({running.name for running in rest.values()})
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") or "all of the service manager"
