"""Raw readings of a host and its domains, and what two successive ones say: percentages and rates.

A reading has counters that only rise; a figure is what happened between two of them.  What cannot be told is left out:
nobody then takes it for 0.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

_NANOSECONDS = 1e9


class DomainState(StrEnum):
    """What libvirt says of a domain, as far as it matters here."""

    RUNNING = "running"
    PAUSED = "paused"
    SHUT_OFF = "shut_off"
    CRASHED = "crashed"
    OTHER = "other"  # being shut down, suspended by its guest, or what a later libvirt calls it


@dataclass(frozen=True, slots=True)
class Link:
    """One network card: bytes since boot, and the speed that it negotiated in bits per second (0 = not known)."""

    received_bytes: int
    sent_bytes: int
    speed_bps: float


@dataclass(frozen=True, slots=True)
class HostReading:
    """A host's own counters at one moment; ``at_s`` is monotonic.

    ``cpu`` is (busy, all) in any one unit of time, ``memory`` (total, available) in bytes.  ``disk_busy_ms`` is by disk
    for how long it had requests, ``stalled_us`` by resource (cpu, memory, io) for how long some task waited for it.
    """

    at_s: float
    cpu: tuple[float, float] | None = None
    memory: tuple[int, int] | None = None
    links: Mapping[str, Link] = field(default_factory=dict)
    disk_busy_ms: Mapping[str, int] = field(default_factory=dict)
    stalled_us: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DomainReading:
    """A domain's counters; ``None`` = the hypervisor did not say.  ``problem`` is why it says nothing at all."""

    uuid: str
    name: str
    state: DomainState
    cpu_ns: int | None = None
    cpus: int | None = None
    memory_bytes: int | None = None
    memory_max_bytes: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    received_bytes: int | None = None
    sent_bytes: int | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain between two readings: ``figures`` by name, those that are known.

    ``cpu`` is percent of one CPU, ``cpus`` a count, ``memory`` the balloon's size and ``memory_max`` what it may be at
    most, in bytes; the others (``read``, ``write``, ``receive``,
    ``send``) bytes per second.
    """

    uuid: str
    name: str
    state: DomainState
    figures: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""


def load_between(before: HostReading, after: HostReading) -> dict[str, float]:
    """The host's load in percent by metric: cpu, memory, network, disk, pressure; of those that are known.

    Of several network cards, disks and resources it is the one with most to do: that one makes programs wait.
    Where the counter of one went back (it began anew, or wrapped) nobody can tell which that is.
    """
    elapsed_s = after.at_s - before.at_s
    if elapsed_s <= 0:
        return {}
    load: dict[str, float] = {}
    if before.cpu is not None and after.cpu is not None:
        busy, whole = after.cpu[0] - before.cpu[0], after.cpu[1] - before.cpu[1]
        if whole > 0 and busy >= 0:
            load["cpu"] = 100 * busy / whole
    if after.memory is not None and after.memory[1] <= after.memory[0] > 0:
        load["memory"] = 100 * (1 - after.memory[1] / after.memory[0])
    network = [
        100 * 8 * (now - then) / elapsed_s / speed
        for name, link in after.links.items()
        if (was := before.links.get(name)) is not None and (speed := link.speed_bps) > 0
        for then, now in ((was.received_bytes, link.received_bytes), (was.sent_bytes, link.sent_bytes))
    ]
    if network and min(network) >= 0:
        load["network"] = max(network)
    for metric, earlier, later, per_s in (
        ("disk", before.disk_busy_ms, after.disk_busy_ms, 1e3),
        ("pressure", before.stalled_us, after.stalled_us, 1e6),
    ):
        shares = [100 * (later[name] - earlier[name]) / per_s / elapsed_s for name in earlier.keys() & later.keys()]
        if shares and min(shares) >= 0:
            load[metric] = max(shares)
    return {metric: min(100.0, max(0.0, percent)) for metric, percent in load.items()}


def domains_between(
    before: Iterable[DomainReading], after: Iterable[DomainReading], elapsed_s: float
) -> tuple[Domain, ...]:
    """Each domain of the later reading; rates only of those that both have and whose counters rose since."""
    known = {reading.uuid: reading for reading in before}
    return tuple(_domain(known.get(reading.uuid), reading, elapsed_s) for reading in after)


def _domain(was: DomainReading | None, now: DomainReading, elapsed_s: float) -> Domain:
    if now.problem:
        return Domain(now.uuid, now.name, now.state, {}, now.problem)
    figures: dict[str, float] = {}
    if now.cpus is not None:
        figures["cpus"] = now.cpus
    if now.memory_bytes is not None:
        figures["memory"] = now.memory_bytes
    if now.memory_max_bytes is not None:
        figures["memory_max"] = now.memory_max_bytes
    if was is not None and elapsed_s > 0 and now.state is DomainState.RUNNING:
        cpu = _rate(was.cpu_ns, now.cpu_ns, elapsed_s)
        rates = {
            "cpu": None if cpu is None else 100 * cpu / _NANOSECONDS,
            "read": _rate(was.read_bytes, now.read_bytes, elapsed_s),
            "write": _rate(was.written_bytes, now.written_bytes, elapsed_s),
            "receive": _rate(was.received_bytes, now.received_bytes, elapsed_s),
            "send": _rate(was.sent_bytes, now.sent_bytes, elapsed_s),
        }
        figures |= {name: rate for name, rate in rates.items() if rate is not None}
    return Domain(now.uuid, now.name, now.state, figures)


def _rate(before: int | None, after: int | None, elapsed_s: float) -> float | None:
    """``None`` where it began anew in between: the domain was started again."""
    return None if before is None or after is None or after < before else (after - before) / elapsed_s
