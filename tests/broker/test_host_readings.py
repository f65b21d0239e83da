"""Two readings of a host become percentages, and what nobody said is left out rather than taken for 0."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from persona_broker.host.core import proc_text
from persona_broker.host.core.libvirt_stats import reading_of
from persona_broker.host.core.readings import (
    Domain,
    DomainReading,
    DomainState,
    HostReading,
    Link,
    domains_between,
    load_between,
)
from persona_broker.host.core.sample import HostSample, decode, encode
from persona_broker.host.machine import Machine

from persona.json_fields import CodecError

GIB = 1 << 30
BEFORE = HostReading(
    100.0, (50.0, 200.0), (4 * GIB, 3 * GIB), {"eno1": Link(0, 0, 1e9)}, {"sda": 0, "sdb": 0}, {"cpu": 0, "io": 0}
)
AFTER = HostReading(
    102.0, (125.0, 300.0), (4 * GIB, 1 * GIB), {"eno1": Link(25_000_000, 50_000_000, 1e9)},
    {"sda": 500, "sdb": 1000}, {"cpu": 400_000, "io": 200_000},
)  # fmt: skip
UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"


def test_the_load_is_what_happened_between_two_readings() -> None:
    """Of two disks, of two resources and of both directions of a link it is the busier one."""
    assert load_between(BEFORE, AFTER) == {"cpu": 75.0, "memory": 75.0, "network": 20.0, "disk": 50.0, "pressure": 20.0}


@pytest.mark.parametrize(
    ("after", "known"),
    [
        (HostReading(102.0), set()),
        (HostReading(102.0, cpu=(125.0, 200.0)), set()),  # no tick went by
        (HostReading(102.0, cpu=(125.0, 300.0)), {"cpu"}),
        (HostReading(102.0, links={"eno1": Link(1, 1, 0.0)}), set()),  # its speed is not known
        (HostReading(102.0, links={"eno2": Link(1, 1, 1e9)}), set()),  # plugged in since
        (HostReading(102.0, disk_busy_ms={"sdc": 1}), set()),
        (HostReading(102.0, cpu=(49.0, 300.0)), set()),  # these went back
        (HostReading(102.0, memory=(1, 2)), set()),
        (HostReading(102.0, links={"eno1": Link(-1, 1, 1e9)}), set()),
        (HostReading(102.0, disk_busy_ms={"sda": -1, "sdb": 5}), set()),
        (HostReading(102.0, stalled_us={"cpu": 1, "io": -1}), set()),
        (HostReading(100.0, cpu=(125.0, 300.0)), set()),  # at the same moment
    ],
)
def test_what_cannot_be_told_is_left_out(after: HostReading, known: set[str]) -> None:
    assert load_between(BEFORE, after).keys() == known


counters = st.integers(0, 1 << 60)


@given(counters, counters, counters, counters, st.floats(0.001, 1e6))
def test_a_percentage_is_one(before: int, after: int, stalled: int, later: int, elapsed_s: float) -> None:
    """Counters may wrap, and a clock may be set."""
    first = HostReading(0.0, None, None, {"a": Link(before, 0, 1e9)}, {"a": before}, {"cpu": stalled})
    second = HostReading(elapsed_s, None, None, {"a": Link(after, 0, 1e9)}, {"a": after}, {"cpu": later})
    assert all(0 <= percent <= 100 for percent in load_between(first, second).values())


def domain(uuid: str = UUID, **fields: object) -> DomainReading:
    values = {"uuid": uuid, "name": "vm", "state": DomainState.RUNNING, **fields}
    return DomainReading(**values)  # type: ignore[arg-type]


def test_a_domain_has_percent_of_one_cpu_and_rates() -> None:
    before = [domain(cpu_ns=1_000_000_000, cpus=2, memory_bytes=GIB, read_bytes=0, sent_bytes=5)]
    after = [domain(cpu_ns=4_000_000_000, cpus=2, memory_bytes=GIB, read_bytes=3000, sent_bytes=5)]
    (found,) = domains_between(before, after, 2.0)
    assert found.figures == {"cpu": 150.0, "cpus": 2, "memory": GIB, "read": 1500.0, "send": 0.0}


def test_one_that_began_anew_has_no_rates_until_the_next_reading() -> None:
    (found,) = domains_between([domain(cpu_ns=9)], [domain(cpu_ns=3)], 1.0)
    assert found.figures == {}
    (found,) = domains_between([], [domain(cpu_ns=3)], 1.0)
    assert found.figures == {}


def test_one_that_hangs_is_unknown_and_the_others_are_not() -> None:
    other = "00000000-0000-0000-0000-000000000001"
    hanging, fine = domains_between(
        [domain(cpu_ns=0), domain(other, cpu_ns=0)],
        [domain(cpu_ns=10**9, problem="its monitor does not answer"), domain(other, cpu_ns=10**9)],
        1.0,
    )
    assert (hanging.figures, hanging.problem) == ({}, "its monitor does not answer")
    assert (fine.figures, fine.problem) == ({"cpu": 100.0}, "")


def test_libvirt_s_names_are_read() -> None:
    stats = {
        "state.state": 1, "cpu.time": 7, "vcpu.current": 2, "balloon.current": 1024, "block.count": 2,
        "block.0.rd.bytes": 1, "block.0.wr.bytes": 2, "block.1.rd.bytes": 10, "net.count": 1, "net.0.rx.bytes": 4,
        "net.0.tx.bytes": 5,
    }  # fmt: skip
    found = reading_of(UUID, "vm", stats)
    wanted = domain(
        cpu_ns=7, cpus=2, memory_bytes=1 << 20, read_bytes=11, received_bytes=4, sent_bytes=5
    )  # one disk does not say what was written to it
    assert found == wanted
    assert reading_of(UUID, "vm", {}) == domain(state=DomainState.OTHER)
    odd = {"state.state": "1", "cpu.time": -1, "vcpu.current": True, "block.count": 1 << 40}
    assert reading_of(UUID, "vm", odd) == domain(state=DomainState.OTHER)


def test_the_kernel_s_text_is_read() -> None:
    assert proc_text.cpu_times("cpu  10 1 20 100 50 2 3 4 9 0\ncpu0 1\n") == (40.0, 190.0)
    assert proc_text.memory("MemTotal: 2 kB\nMemFree: 1 kB\nMemAvailable:  1 kB\n") == (2048, 1024)
    assert proc_text.transferred("a\nb\n  eno1: 7 0 0 0 0 0 0 0 9 0 0\n") == {"eno1": (7, 9)}
    line = "   8       0 sda 1 2 3 4 5 6 7 8 9 10 11 12\n"
    assert proc_text.disk_busy_ms(line) == {"sda": 10}
    assert proc_text.stalled_us("some avg10=0.00 avg60=0.00 avg300=0.00 total=77\nfull avg10=0 total=9\n") == 77


@pytest.mark.parametrize("text", ["", "cpu\n", "cpu a b c d e f g h\n", "MemTotal: x kB", "\0" * 100, "some total=-1"])
def test_odd_text_is_not_known(text: str) -> None:
    assert (proc_text.cpu_times(text), proc_text.memory(text), proc_text.stalled_us(text)) == (None, None, None)
    assert (proc_text.transferred(text), proc_text.disk_busy_ms(text)) == ({}, {})


def test_only_what_has_hardware_behind_it_counts(tmp_path: Path) -> None:
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    for folder in ("net", "pressure"):
        (proc / folder).mkdir(parents=True)
    (proc / "net/dev").write_text(
        "a\nb\n eno1: 1 0 0 0 0 0 0 0 2\n vnet0: 1 0 0 0 0 0 0 0 2\n wlan0: 3 0 0 0 0 0 0 0 4\n"
    )
    (proc / "diskstats").write_text(
        "".join(f"8 0 {name} 1 2 3 4 5 6 7 8 9 10 11\n" for name in ("sda", "sda1", "dm-0"))
    )
    for path in (
        "class/net/eno1/device",
        "class/net/wlan0/device",
        "class/net/vnet0",
        "block/sda/device",
        "block/dm-0",
    ):
        (sys / path).mkdir(parents=True)
    (sys / "class/net/eno1/speed").write_text("1000\n")
    (sys / "class/net/wlan0/speed").write_text("-1\n")
    found = Machine(proc, sys, lambda: 5.0).read()
    assert found.links == {"eno1": Link(1, 2, 1e9), "wlan0": Link(3, 4, 0.0)}
    assert found.disk_busy_ms == {"sda": 10}
    assert (found.at_s, found.cpu, found.memory, found.stalled_us) == (5.0, None, None, {})


def test_this_machine_can_be_read() -> None:
    found = Machine().read()
    assert found.cpu is not None and 0 < found.cpu[0] <= found.cpu[1]
    assert found.memory is not None and 0 < found.memory[1] <= found.memory[0]


SAMPLE = HostSample(
    "lab-1", "qemu:///system", 1000.5, {"cpu": 5.0, "disk": 1.5}, 999.0,
    (Domain(UUID, "vm", DomainState.RUNNING, {"cpu": 150.0}), Domain(UUID, "b", DomainState.PAUSED, {}, "hangs")),
    "why",
)  # fmt: skip


def test_a_sample_crosses() -> None:
    assert decode(json.loads(json.dumps(encode(SAMPLE)))) == SAMPLE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("at", "now"), ("at", float("nan")), ("at", True), ("at", -1), ("host", 7), ("host", "x" * 2000),
        ("load", {"cpu": 101}), ("load", {"moons": 1}), ("load", []), ("domains", {}), ("domains", [{}]),
        ("domains", [7] * 10_001), ("domains_at", "x"), ("more", 1), ("problem", None),
    ],
)  # fmt: skip
def test_a_sample_that_is_none_is_refused_by_its_field(field: str, value: object) -> None:
    with pytest.raises(CodecError, match=f"^{field}"):
        decode({**encode(SAMPLE), field: value})


def test_a_problem_too_long_to_be_read_is_cut() -> None:
    sample = HostSample("lab", "qemu:///system", 1.0, {}, None, (), "x" * 5000)
    assert decode(encode(sample)).problem == "x" * 1000
