"""A grant counts once what its persona needs is there: checked, and where the operator allows it, installed.

Everything here runs in the loop's thread; checking and installing are threads that call back.  After an installation
the broker is asked anew: a grant from before may not be one any more.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from persona.decisions import Decision, Denied, Granted, Lease, PersonaRef, Request
from persona.dependencies import Dependency, Service
from persona.problems import Reason
from persona_guest.dependencies.check import DependencyCheck
from persona_guest.dependencies.dpkg import DpkgError, Stamp
from persona_guest.dependencies.installer.client import Installation
from persona_guest.dependencies.rules import Lacking, named, not_allowed, remedy
from persona_guest.loop import Loop, Timer
from persona_guest.settings import Dependencies as Allowed

log = logging.getLogger("persona.dependencies")

_SERVICES_S = 10.0  # nobody tells when a service stops
_FAILED_S = 30.0  # a loop of denied commands must not become a loop of installations
_DENIED_S = 2.0
_CHECK_MAX_S = 5.0  # of a check: behind it are a disk and the system bus, and either may hang
_KEPT_MAX = 256

Wanted = tuple[Dependency, ...]
Done = Callable[[Decision], None]
Lacks = Callable[[tuple[Lacking, ...] | str], None]


@dataclass(frozen=True, slots=True)
class Installed:
    """What a persona needs was not there and is now.  That took its time: the broker is to be asked again."""


@dataclass(slots=True)
class _Waiter:
    request: Request
    granted: Granted
    done: Callable[[Decision | Installed], None]
    timer: Timer | None = None


class DependencyChecker:
    """Asks a ``DependencyCheck`` in a thread of its own: behind it are a disk and the system bus."""

    def __init__(self, dependencies: DependencyCheck, deliver: Callable[[Callable[[], None]], None]) -> None:
        self._dependencies = dependencies
        self._deliver = deliver
        self._asked: queue.SimpleQueue[tuple[Wanted, Lacks] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="dependencies", daemon=True).start()

    def check(self, wanted: Wanted, done: Lacks) -> None:
        """Queues one check; ``done`` is called in the loop's thread with what is lacking, or an error."""
        self._asked.put((wanted, done))

    def close(self) -> None:
        """Ends the thread after what was asked."""
        self._asked.put(None)

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            self._one(*asked)

    def _one(self, wanted: Wanted, done: Lacks) -> None:
        found: tuple[Lacking, ...] | str
        try:
            found = self._dependencies.lacking(wanted)
        except DpkgError as error:
            found = str(error)
        except Exception as error:  # apt's own, or no descriptor left: this check fails, and the next one may not
            found = f"{type(error).__name__}: {error}"
        self._deliver(lambda: done(found))


class Dependencies:
    """Keeps what was found for a while, and one installation for all who wait for the same.

    ``of`` knows a persona's dependencies, ``stamp`` when dpkg's state changed; ``say`` tells whoever waits; ``changed``
    is called where grants that counted may count no more.
    """

    def __init__(
        self,
        loop: Loop,
        allowed: Allowed,
        of: Callable[[PersonaRef], Wanted],
        checker: DependencyChecker,
        installation: Installation,
        stamp: Callable[[], Stamp],
        say: Callable[[Request, str], None],
        changed: Callable[[], None],
        *,
        install: bool,
    ) -> None:
        self._loop = loop
        self._allowed = allowed
        self._of = of
        self._checker = checker
        self._installation = installation
        self._stamp = stamp
        self._say = say
        self._changed = changed
        self._install = install
        self._seen = stamp()
        self._known: dict[Wanted, tuple[tuple[Lacking, ...] | str, float]] = {}
        self._checking: dict[Wanted, list[Lacks]] = {}
        self._installing: dict[Wanted, list[_Waiter]] = {}
        self._failed: dict[Wanted, tuple[str, float]] = {}

    def refresh(self) -> None:
        """Call every second: after a change of dpkg's state nothing that was known counts, leases included."""
        now = self._stamp()
        if now != self._seen:
            self._seen = now
            self._failed.clear()
            if self._known:
                self._known.clear()
                self._changed()

    def backed(self, decision: Decision, done: Done, lacks: str = "still needs") -> None:
        """Calls ``done`` with the decision, or with a denial that names what its persona needs; installs nothing.

        ``lacks`` is how the denial puts it.
        """

        def lacking(granted: Granted, _wanted: Wanted, found: tuple[Lacking, ...]) -> None:
            done(_denied(granted, f"persona {granted.persona.name} {lacks} {named(found)}"))

        self._check(decision, done, lacking)

    def installed(self, decision: Decision, request: Request, done: Callable[[Decision | Installed], None]) -> None:
        """As ``backed``, but installs what may be installed: ``request`` waits for it, and its user is told so."""

        def lacking(granted: Granted, wanted: Wanted, found: tuple[Lacking, ...]) -> None:
            self._missing(wanted, found, _Waiter(request, granted, done))

        self._check(decision, done, lacking)

    def _check(
        self, decision: Decision, done: Done, lacking: Callable[[Granted, Wanted, tuple[Lacking, ...]], None]
    ) -> None:
        """``done`` where that is all, ``lacking`` where something is that this machine may install or start."""
        if not isinstance(decision, Granted):
            done(decision)
            return
        wanted = self._of(decision.persona)

        def checked(found: tuple[Lacking, ...] | str) -> None:
            if not found:
                done(decision)
            elif isinstance(found, str):
                done(_denied(decision, f"what persona {decision.persona.name} needs cannot be told: {found}"))
            elif not self._install or not_allowed(found, self._allowed.install, self._allowed.start):
                help_ = f"persona {decision.persona.name} needs {named(found)}; ask an operator for {remedy(found)}"
                done(_denied(decision, help_ + ", or to allow it in guest.toml (dependencies)"))
            else:
                lacking(decision, wanted, found)

        self._find_lacking(wanted, checked)

    # --- checking ---------------------------------------------------------------------------------

    def _find_lacking(self, wanted: Wanted, done: Lacks) -> None:
        if not wanted:
            done(())
            return
        self.refresh()
        known = self._known.get(wanted)
        if known is not None and known[1] > time.monotonic():
            done(known[0])
        else:
            if wanted not in self._checking:
                self._checking[wanted] = []
                self._checker.check(wanted, lambda found: self._checked(wanted, found))
            self._await(self._checking[wanted], done)

    def _await(self, waiting: list[Lacks], done: Lacks) -> None:
        """``done`` is among those who wait for a check, for so long; the check itself goes on."""

        def late() -> None:
            if done in waiting:
                waiting.remove(done)
                done(f"looking took longer than {_CHECK_MAX_S:g} s")

        waiting.append(done)
        self._loop.call_later(_CHECK_MAX_S, late)

    def _checked(self, wanted: Wanted, found: tuple[Lacking, ...] | str) -> None:
        if len(self._known) >= _KEPT_MAX:
            self._known.clear()
        lasts = (
            _SERVICES_S if isinstance(found, str) or any(isinstance(item, Service) for item in wanted) else float("inf")
        )
        self._known[wanted] = (found, time.monotonic() + lasts)
        waiting = self._checking.pop(wanted, [])
        while waiting:  # emptied, so that none is told once more that it is late
            waiting.pop(0)(found)

    # --- installing -------------------------------------------------------------------------------

    def _missing(self, wanted: Wanted, lacking: tuple[Lacking, ...], waiter: _Waiter) -> None:
        failed = self._failed.get(wanted)
        if failed is not None and failed[1] > time.monotonic():
            waiter.done(_failure(waiter.granted, lacking, failed[0]))
            return
        name = waiter.granted.persona.name
        waiter.timer = self._loop.call_later(self._allowed.deadline_s, lambda: self._late(wanted, waiter))
        self._say(waiter.request, f"persona: {name} needs {named(lacking)}: being installed")
        if wanted in self._installing:
            self._installing[wanted].append(waiter)
            return
        self._installing[wanted] = [waiter]
        log.info("%s needs %s", name, named(lacking))

        def say(line: str) -> None:
            by_session = {waiting.request.session: waiting.request for waiting in self._installing.get(wanted, ())}
            for request in by_session.values():
                self._say(request, f"persona: {line}")

        self._installation.want(wanted, say, lambda why: self._installed(wanted, lacking, why))

    def _late(self, wanted: Wanted, waiter: _Waiter) -> None:
        waiting = self._installing.get(wanted, [])
        if waiter in waiting:
            waiting.remove(waiter)  # the list stays: whoever comes now waits for the same installation
            waiter.done(
                _denied(waiter.granted, "what its persona needs is still being installed; try again in a while")
            )

    def _installed(self, wanted: Wanted, lacking: tuple[Lacking, ...], why: str) -> None:
        self._known.clear()
        if why:
            if len(self._failed) >= _KEPT_MAX:
                self._failed.clear()
            self._failed[wanted] = (why, time.monotonic() + _FAILED_S)
            self._seen = self._stamp()  # what was put back is no news
        for waiter in self._installing.pop(wanted, ()):
            if waiter.timer is not None:
                waiter.timer.cancel()
            if why:
                waiter.done(_failure(waiter.granted, lacking, why))
            else:
                waiter.done(Installed())


def _failure(granted: Granted, lacking: tuple[Lacking, ...], why: str) -> Denied:
    needs = f"persona {granted.persona.name} needs {named(lacking)}, which failed: {why}"
    return _denied(granted, f"{needs}; an operator can try {remedy(lacking)}")


def _denied(granted: Granted, help_: str) -> Denied:
    lease = Lease(min(_DENIED_S, granted.lease.seconds), granted.lease.width)
    return Denied(
        Reason.DEPENDENCY_MISSING,
        policy=granted.policy,
        persona=granted.persona.name,
        help=help_,
        lease=lease,
        generation=granted.generation,
        persona_version=granted.persona.version,
        policy_version=granted.policy_version,
        policy_origin=granted.policy_origin,
    )
