"""Polls one host once a second, for ever: its own load, and, in a thread of their own, its domains.

Both may hang or die at any moment: samples then grow old, which is all that anybody needs to notice.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from persona_broker.host.core.readings import Domain, DomainReading, HostReading, domains_between, load_between
from persona_broker.host.core.sample import CAPACITY, DOMAINS_MAX, HostSample
from persona_broker.host.hypervisor import Hypervisor, HypervisorError

log = logging.getLogger("persona.host")

EVERY_S = 1.0
_BACKOFF_S = 0.5
_BACKOFF_MAX_S = 30.0
_END_S = 2.0
_APART_MAX_S = 10.0  # of two readings: an average over more says little of now


@dataclass(frozen=True, slots=True)
class Listed:
    """What a hypervisor said last: its domains, when (Unix seconds), and why nothing newer is known, if so.

    ``reading`` is what it told of the host, where it was asked for that.
    """

    domains: tuple[Domain, ...] = ()
    at: float | None = None
    problem: str = ""
    reading: HostReading | None = None


class DomainPoller:
    """The domains of one host, for one thread; ``listed`` may be read from any.

    It opens the connection, again and again with longer and longer pauses where that fails, and closes it.
    """

    def __init__(
        self,
        uri: str,
        connect: Callable[[str], Hypervisor],
        *,
        with_host: bool,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.listed = Listed()
        self._uri = uri
        self._connect = connect
        self._with_host = with_host
        self._clock = clock
        self._now = now
        self._hypervisor: Hypervisor | None = None
        self._connect_at = 0.0  # monotonic
        self._backoff_s = _BACKOFF_S
        self._readings: Sequence[DomainReading] = ()
        self._read_at = 0.0  # monotonic

    def poll(self) -> None:
        """One round; what fails leaves what was listed before, with the problem."""
        try:
            if self._hypervisor is None:
                if self._clock() < self._connect_at:
                    return
                self._hypervisor = self._connect(self._uri)
            readings = self._hypervisor.domains()
            at = self._clock()
            reading = self._hypervisor.host() if self._with_host else None
        except HypervisorError as error:
            self.hang_up()
            self._connect_at = self._clock() + self._backoff_s
            self._backoff_s = min(_BACKOFF_MAX_S, self._backoff_s * 2)
            self._say(Listed(self.listed.domains, self.listed.at, str(error), self.listed.reading))
            return
        domains = domains_between(self._readings, readings, at - self._read_at)[:DOMAINS_MAX]
        self._readings, self._read_at, self._backoff_s = readings, at, _BACKOFF_S
        self._say(Listed(domains, self._now(), "", reading))

    def hang_up(self) -> None:
        """Closes the connection, where there is one."""
        hypervisor, self._hypervisor = self._hypervisor, None
        if hypervisor is not None:
            hypervisor.close()

    def _say(self, listed: Listed) -> None:
        if listed.problem != self.listed.problem:
            log.warning("%s: %s", self._uri, listed.problem or "the hypervisor answers again")
        self.listed = listed


class HostPoller:
    """One host.  ``read_host`` is ``None`` for a host that only the hypervisor's API can tell of."""

    def __init__(
        self,
        host: str,
        uri: str,
        domains: DomainPoller,
        read_host: Callable[[], HostReading] | None,
        put: Callable[[HostSample], None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._host = host
        self._uri = uri
        self._domains = domains
        self._read_host = read_host
        self._put = put
        self._now = now
        self._before: HostReading | None = None

    def run(self, stop: threading.Event) -> None:
        """Until ``stop`` is set.  A hypervisor that hangs holds up only its own thread, which ends with the process."""
        listing = threading.Thread(target=self._list, args=(stop,), name=f"domains of {self._host}", daemon=True)
        listing.start()
        while not stop.is_set():
            self.poll()
            stop.wait(EVERY_S)
        listing.join(_END_S)

    def poll(self) -> None:
        """One round; puts a sample where the host's load is known."""
        listed = self._domains.listed
        reading = listed.reading if self._read_host is None else self._read_host()
        if reading is None or (self._before is not None and reading.at_s <= self._before.at_s):
            return  # nothing new is known
        before, self._before = self._before, reading
        if before is None or reading.at_s - before.at_s > _APART_MAX_S:
            return  # a load is of the time between two readings
        load = load_between(before, reading)
        memory = {} if reading.memory is None else dict(zip(CAPACITY, map(float, reading.memory), strict=True))
        sample = HostSample(self._host, self._uri, self._now(), load, listed.at, listed.domains, listed.problem, memory)
        try:
            self._put(sample)
        except OSError as error:
            log.error("the sample of %s is lost: %s", self._host, error)

    def _list(self, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                self._domains.poll()
                stop.wait(EVERY_S)
            self._domains.hang_up()
        except BaseException:
            log.critical("the thread that lists domains ended; so does its process", exc_info=True)
            os._exit(70)
