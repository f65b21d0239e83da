"""Hosts: a round of the poller, a plan of the arbiter, and what watching hosts leaves of the speed of decisions."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

from persona_broker.host.core.arbiter import Host, Kept, LiveSession, Rules, Shape, Vm, arbitrate
from persona_broker.host.core.readings import DomainReading, DomainState, HostReading
from persona_broker.host.poller import DomainPoller, HostPoller
from persona_broker.host.sample_files import SampleFiles
from persona_broker.policy.conditions import ConditionInputs, ConditionState, Sample, latch, look, thresholds
from persona_broker.policy.host_load import HostJudge, HostState

from persona.decisions import Program, Request, Subject
from tests.bench.decide import CALLS, snapshot
from tests.bench.row import Missing, Row, measured, pairs

GIB = 1 << 30
HOSTS = 50
NOW = 1000.0
_RULES = Rules()
_LS = Program("/usr/bin/ls", ("ls",), ("/usr/bin/ls",))


class FakeHypervisor:
    """So many domains, each of which has run a second longer whenever it is asked."""

    def __init__(self, count: int) -> None:
        self._uuids = [f"00000000-0000-4000-8000-{number:012}" for number in range(count)]
        self._asked = 0

    def domains(self) -> Sequence[DomainReading]:
        self._asked += 1
        each = self._asked * 1_000_000_000
        return [
            DomainReading(uuid, f"vm {uuid}", DomainState.RUNNING, each, 4, 4 * GIB, 4 * GIB, each, each, each, each)
            for uuid in self._uuids
        ]

    def host(self) -> HostReading:
        return HostReading(float(self._asked), (self._asked / 2, float(self._asked)), (64 * GIB, 32 * GIB))

    def close(self) -> None:
        """Nothing is open."""


def round_of(count: int, directory: Path) -> Callable[[], float]:
    """Measures a whole round, from the hypervisor's (fake) answer to the sample's file, in ms."""
    domains = DomainPoller("fake:///", lambda _uri: FakeHypervisor(count), with_host=True)
    poller = HostPoller(f"h{count}", "fake:///", domains, None, SampleFiles(directory).put)

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(20):
            domains.poll()
            poller.poll()
        return (time.perf_counter() - began) / 20 * 1000

    return measure


def fake_round() -> Row:
    """A hundred domains beside one: a fake hypervisor answers at once."""
    with tempfile.TemporaryDirectory(prefix="persona-bench-") as directory:
        many, one, _ = pairs(round_of(100, Path(directory)), round_of(1, Path(directory)))
    return Row("host.poll_fake_ms", many, "ms", "1 domain (fake too)", one, many / one, "< 20 ms")


def real_round() -> Row:
    """What libvirt tells of two real domains, beside libvirt's own bulk call."""
    from persona_broker.host.libvirt_hypervisor import LibvirtHypervisor  # the other figures need no libvirt

    from tests.host.lab import SLEEP, Libvirtd

    libvirtd = Libvirtd()
    try:
        for name in ("one", "two"):
            libvirtd.begin(name, SLEEP)
        hypervisor = LibvirtHypervisor(libvirtd.uri)
        try:

            def ms(call: Callable[[], object]) -> float:
                began = time.perf_counter()
                for _ in range(20):
                    call()
                return (time.perf_counter() - began) / 20 * 1000

            bulk = hypervisor._connection.getAllDomainStats
            ours, libvirts, ratio = pairs(lambda: ms(hypervisor.domains), lambda: ms(bulk))
        finally:
            hypervisor.close()
    finally:
        libvirtd.close()
    return Row("host.poll_ms", ours, "ms", "getAllDomainStats", libvirts, ratio, "< 2, target 1.3")


def vms(count: int) -> list[Vm]:
    """A host's, with three personas in turn."""
    sessions = [(LiveSession(20, 0.5, GIB),), (LiveSession(50, 2.0),), (LiveSession(90), LiveSession(20)), ()]
    shape = Shape(100, None, 4 * GIB)
    return [Vm(f"vm-{at}", 4, 4 * GIB, sessions[at % 4], shape, 4 * GIB, GIB + at) for at in range(count)]


def plans() -> Row:
    """A plan for a thousand VMs of one host beside one for fifty, twenty times."""
    busy = Host({"cpu": 99.0, "memory": 95.0}, GIB)

    def ms(count: int, times: int) -> Callable[[], float]:
        found = vms(count)

        def measure() -> float:
            memory = Kept()
            began = time.perf_counter()
            for number in range(times):
                _, memory = arbitrate(_RULES, float(number), busy, found, memory)
            return (time.perf_counter() - began) * 1000

        return measure

    thousand, twenty, ratio = pairs(ms(1000, 1), ms(50, 20))
    return Row("arbiter.plan_ms", thousand, "ms", "50 VMs, 20 times", twenty, ratio, "< 1.5; under 50 ms")


def decisions(hosts: int) -> Callable[[], float]:
    """Measures decisions a second about the VMs of so many hosts, of which every other is busy."""
    found = snapshot(1000)
    states, bindings = {}, {}
    for number in range(hosts):
        sample = Sample(NOW, {"cpu": 90.0 if number % 2 else 5.0}, f"h{number}")
        latches = latch(frozenset(), thresholds(found.conditions), sample)
        states[f"h{number}"] = HostState(f"h{number}", sample, latches, NOW, {f"u{number}": True})
        bindings[f"vm-{number}"] = f"u{number}"
    placed = HostJudge(15).look(found.conditions, states, bindings, NOW)
    inputs = ConditionInputs(Sample(NOW, {"cpu": 5.0}, "psutil"), frozenset(), NOW, 15)
    state: ConditionState = look(found.conditions, inputs, 1, None, placed)
    questions = [  # as many different ones, whatever the number of hosts
        Request(Subject(f"user{number}", (), f"vm-{number % hosts}"), "s-1", _LS, ("ls",), "/")
        for number in range(1000)
    ]
    asked = list(islice(cycle(questions), CALLS))

    def measure() -> float:
        began = time.perf_counter()
        for question in asked:
            found.decide(question, state)
        return CALLS / (time.perf_counter() - began)

    return measure


def by_host() -> Row:
    """Conditions on the load of fifty hosts beside those on one."""
    fifty, one, ratio = pairs(decisions(HOSTS), decisions(1))
    return Row("decide.hosts", fifty, "1/s", "VMs of 1 host", one, ratio, "> 0.9")


def rows() -> Iterator[Row | Missing]:
    """host.*, arbiter.* and decide.hosts"""
    return measured(
        ("host.poll_fake_ms", fake_round),
        ("host.poll_ms", real_round),
        ("arbiter.plan_ms", plans),
        ("decide.hosts", by_host),
    )
