"""libvirt as a hypervisor that is observed, over a read-only connection: the one place that imports libvirt-python.

Facts of libvirt 9 that shape it.  QEMU's monitor has no timeout: a bulk call hangs with the first QEMU that is stopped.
With NOWAIT the next call goes past a domain that another call already waits for.  One domain's error discards the
whole bulk reply.  A client has at most five requests under way.  Keepalive works only while an event loop runs, and the
loop must be registered before the first connection is opened.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import libvirt

from persona_broker.host.core.libvirt_stats import STATES, reading_of
from persona_broker.host.core.readings import DomainReading, DomainState, HostReading
from persona_broker.host.hypervisor import HypervisorError
from persona_broker.host.time_limit import TimeLimit, TookTooLongError

log = logging.getLogger("persona.host")

T = TypeVar("T")
_FIRST_S = 20.0
_CALL_S = 3.0  # a hundred monitors, some milliseconds each, on a busy host
_EACH_S = 0.5  # of one domain, where they are asked one by one
_ALL_S = 5.0  # of all of them
_LATE_MAX = 3  # calls that hang with a domain: of five, two are left for what does not need its monitor
_KEEPALIVE_S, _KEEPALIVE_COUNT = 3, 3
_NO_MONITOR = libvirt.VIR_DOMAIN_STATS_STATE | libvirt.VIR_DOMAIN_STATS_CPU_TOTAL | libvirt.VIR_DOMAIN_STATS_INTERFACE
_STATS = _NO_MONITOR | libvirt.VIR_DOMAIN_STATS_BALLOON | libvirt.VIR_DOMAIN_STATS_VCPU | libvirt.VIR_DOMAIN_STATS_BLOCK
_NOWAIT = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
_CONTROL_OK, _CONTROL_ERROR = libvirt.VIR_DOMAIN_CONTROL_OK, libvirt.VIR_DOMAIN_CONTROL_ERROR
_NOT_ANSWERING = "its monitor does not answer"

_opening: dict[str, TimeLimit] = {}  # by URI: a machine that dies while it is asked may never answer
_loop_lock = threading.Lock()
_loop: list[threading.Thread] = []


def start_event_loop() -> None:
    """Registers libvirt's event loop and runs it for ever in a thread; once a process, before anything is opened."""
    with _loop_lock:
        if not _loop:
            libvirt.registerErrorHandler(lambda _context, _error: None, None)  # or each is printed as well as raised
            libvirt.virEventRegisterDefaultImpl()
            _loop.append(threading.Thread(target=_run_loop, name="libvirt events", daemon=True))
            _loop[0].start()


def _run_loop() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError as error:
            log.error("libvirt's event loop: %s", error)
            time.sleep(0.1)


class LibvirtHypervisor:
    """A ``Hypervisor``.  Raises ``HypervisorError`` where the URI cannot be opened."""

    def __init__(self, uri: str) -> None:
        start_event_loop()
        self._uri = uri
        self._calls = TimeLimit(f"libvirt {uri}")
        opening = _opening.setdefault(uri, TimeLimit(f"opening {uri}"))
        if opening.late >= _LATE_MAX:
            raise HypervisorError(f"{uri} cannot be opened: {opening.late} attempts still wait for an answer")
        try:
            self._connection: Any = opening.call(partial(libvirt.openReadOnly, uri), _FIRST_S)
        except (TookTooLongError, libvirt.libvirtError) as error:
            raise HypervisorError(f"{uri} cannot be opened: {error}") from error
        try:
            self._connection.setKeepAlive(_KEEPALIVE_S, _KEEPALIVE_COUNT)
        except libvirt.libvirtError:  # a driver without a connection, such as test:///default
            log.debug("%s has no keepalive", uri)
        try:  # a libvirtd that has just begun finds out what the host can do, for seconds, when it is first asked
            self._calls.call(partial(self._connection.getAllDomainStats, _NO_MONITOR, _NOWAIT), _FIRST_S)
        except (TookTooLongError, libvirt.libvirtError) as error:
            self.close()
            raise HypervisorError(f"{uri}: its domains cannot be listed: {error}") from error

    def domains(self) -> Sequence[DomainReading]:
        """All domains; see ``Hypervisor``."""
        for flags in (_STATS, _STATS, _NO_MONITOR):
            if flags == _STATS and self._calls.late >= _LATE_MAX:
                continue
            try:
                records = self._calls.call(partial(self._connection.getAllDomainStats, flags, _NOWAIT), _CALL_S)
            except TookTooLongError:
                continue  # its thread waits for a domain that hangs, which the next one goes past
            except libvirt.libvirtError as error:
                self._refuse_broken(error)
                return self._one_by_one()
            return self._readings(records)
        raise HypervisorError(f"{self._uri}: libvirtd does not answer")

    def host(self) -> HostReading:
        """CPU and memory, which is all that libvirt knows of a host."""
        cpu: dict[str, int] = self._ask(partial(self._connection.getCPUStats, libvirt.VIR_NODE_CPU_STATS_ALL_CPUS))
        memory: dict[str, int] = self._ask(
            partial(self._connection.getMemoryStats, libvirt.VIR_NODE_MEMORY_STATS_ALL_CELLS)
        )
        whole = sum(cpu.get(name, 0) for name in ("kernel", "user", "idle", "iowait"))
        free = sum(memory.get(name, 0) for name in ("free", "buffers", "cached"))
        busy = float(cpu.get("kernel", 0) + cpu.get("user", 0))
        return HostReading(
            time.monotonic(),
            (busy, float(whole)) if whole else None,
            (memory["total"] * 1024, free * 1024) if memory.get("total") else None,
        )

    def close(self) -> None:
        """Ends the connection, explicitly: what is only dropped keeps its socket until nobody holds a domain of it."""
        try:
            self._connection.close()
        except libvirt.libvirtError as error:
            log.debug("%s: closing: %s", self._uri, error)

    def _ask(self, what: Callable[[], T]) -> T:
        try:
            return self._calls.call(what, _CALL_S)
        except (TookTooLongError, libvirt.libvirtError) as error:
            raise HypervisorError(f"{self._uri}: {error}") from error

    def _refuse_broken(self, error: Exception) -> None:
        """Raises ``HypervisorError`` where the connection itself is what failed."""
        if self._ask(self._connection.isAlive) != 1:
            raise HypervisorError(f"{self._uri}: the connection broke: {error}") from error

    def _readings(self, records: Sequence[tuple[Any, dict[str, Any]]]) -> list[DomainReading]:
        found = []
        hanging = self._calls.late > 0
        for domain, stats in records:
            reading = reading_of(domain.UUIDString(), domain.name(), stats)
            if hanging and reading.state in (DomainState.RUNNING, DomainState.PAUSED) and self._is_busy(domain):
                reading = _unknown(reading.uuid, reading.name, reading.state, _NOT_ANSWERING)
            found.append(reading)
        return found

    def _is_busy(self, domain: Any) -> bool:
        """Whether a call has waited for the domain's monitor for about as long as one is given."""
        try:
            state, _, since_ms = self._calls.call(domain.controlInfo, _EACH_S)
        except (TookTooLongError, libvirt.libvirtError):
            return True
        waits = int(since_ms) >= _CALL_S * 500
        return bool(state == _CONTROL_ERROR or (state != _CONTROL_OK and waits))

    def _one_by_one(self) -> list[DomainReading]:
        """Where one domain's error discarded the reply of all."""
        found = []
        until = time.monotonic() + _ALL_S
        for domain in self._ask(self._connection.listAllDomains):
            uuid, name = domain.UUIDString(), domain.name()
            flags = _STATS if self._calls.late < _LATE_MAX else _NO_MONITOR
            try:
                if time.monotonic() > until:
                    raise TookTooLongError("others took all the time")
                get = partial(self._connection.domainListGetStats, [domain], flags, _NOWAIT)
                ((_, stats),) = self._calls.call(get, _EACH_S)
                found.append(reading_of(uuid, name, stats))
            except (TookTooLongError, libvirt.libvirtError, ValueError) as error:
                if isinstance(error, libvirt.libvirtError):
                    self._refuse_broken(error)
                found.append(_unknown(uuid, name, self._state_of(domain), f"its figures cannot be read: {error}"))
        return found

    def _state_of(self, domain: Any) -> DomainState:
        try:
            return STATES.get(self._calls.call(domain.state, _EACH_S)[0], DomainState.OTHER)
        except (TookTooLongError, libvirt.libvirtError):
            return DomainState.OTHER


def _unknown(uuid: str, name: str, state: DomainState, problem: str) -> DomainReading:
    return DomainReading(uuid, name, state, problem=problem[:500])
