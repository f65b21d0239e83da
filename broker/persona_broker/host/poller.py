"""Polls one host once a second, for ever: its own load, and its domains through a hypervisor.

It may hang or die at any moment: samples then grow old, which is all that anybody needs to notice.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from persona_broker.host.core.readings import Domain, DomainReading, HostReading, domains_between, load_between
from persona_broker.host.core.sample import DOMAINS_MAX, HostSample
from persona_broker.host.hypervisor import Hypervisor, HypervisorError

log = logging.getLogger("persona.host")

EVERY_S = 1.0
_BACKOFF_S = 0.5
_BACKOFF_MAX_S = 30.0


class HostPoller:
    """One host, for one thread.  ``read_host`` is ``None`` for a host that only the hypervisor's API can tell of."""

    def __init__(
        self,
        host: str,
        uri: str,
        connect: Callable[[str], Hypervisor],
        read_host: Callable[[], HostReading] | None,
        put: Callable[[HostSample], None],
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._host = host
        self._uri = uri
        self._connect = connect
        self._read_host = read_host
        self._put = put
        self._clock = clock
        self._now = now
        self._hypervisor: Hypervisor | None = None
        self._connect_at = 0.0  # monotonic
        self._backoff_s = _BACKOFF_S
        self._before: HostReading | None = None
        self._readings: Sequence[DomainReading] = ()
        self._read_at = 0.0  # monotonic
        self._domains: tuple[Domain, ...] = ()
        self._domains_at: float | None = None
        self._problem = ""

    def run(self, stop: threading.Event) -> None:
        """Until ``stop`` is set."""
        try:
            while not stop.is_set():
                self.poll()
                stop.wait(EVERY_S)
        finally:
            self._hang_up()

    def poll(self) -> None:
        """One round; puts a sample where the host's load is known."""
        reading = self._poll_hypervisor()
        if self._read_host is not None:
            reading = self._read_host()
        if reading is None:
            return
        before, self._before = self._before, reading
        if before is None:
            return  # a load is of the time between two readings
        load = load_between(before, reading)
        domains = self._domains[:DOMAINS_MAX]
        sample = HostSample(self._host, self._uri, self._now(), load, self._domains_at, domains, self._problem)
        try:
            self._put(sample)
        except OSError as error:
            log.error("the sample of %s is lost: %s", self._host, error)

    def _poll_hypervisor(self) -> HostReading | None:
        """Lists the domains; what the hypervisor tells of the host itself, where it is asked for that."""
        try:
            hypervisor = self._open()
            if hypervisor is None:
                return None
            readings = hypervisor.domains()
            at = self._clock()
            self._domains = domains_between(self._readings, readings, at - self._read_at)
            self._readings, self._read_at, self._domains_at = readings, at, self._now()
            reading = hypervisor.host() if self._read_host is None else None
        except HypervisorError as error:
            self._hang_up()
            self._connect_at = self._clock() + self._backoff_s
            self._backoff_s = min(_BACKOFF_MAX_S, self._backoff_s * 2)
            self._say(str(error))
            return None
        self._backoff_s = _BACKOFF_S
        self._say("")
        return reading

    def _open(self) -> Hypervisor | None:
        """The connection; ``None`` while it is too early to try again.  Raises ``HypervisorError``."""
        if self._hypervisor is None and self._clock() >= self._connect_at:
            self._hypervisor = self._connect(self._uri)
        return self._hypervisor

    def _hang_up(self) -> None:
        hypervisor, self._hypervisor = self._hypervisor, None
        if hypervisor is not None:
            hypervisor.close()

    def _say(self, problem: str) -> None:
        if problem != self._problem:
            log.warning("%s: %s", self._host, problem or "the hypervisor answers again")
            self._problem = problem
