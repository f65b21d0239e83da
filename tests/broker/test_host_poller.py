"""The poller: what fails makes only itself unknown, it comes back, and leaves nothing behind."""

import gc
import json
import logging
import os
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from persona_broker.host.core.readings import Domain, DomainReading, DomainState, HostReading
from persona_broker.host.core.sample import HostSample
from persona_broker.host.hypervisor import HypervisorError
from persona_broker.host.poller import DomainPoller, HostPoller
from persona_broker.host.sample_files import SIZE_MAX, SampleFiles
from persona_broker.host.time_limit import TimeLimit, TookTooLongError
from persona_broker.host.top import HostRow, bar

from tests.waiting import until

UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"


class FakeClock:
    """Seconds that go by only when a test says so."""

    def __init__(self) -> None:
        self.at_s = 1000.0

    def __call__(self) -> float:
        return self.at_s


class FakeHypervisor:
    """One domain that has had all of one CPU; ``broken`` and ``opened`` are of all connections."""

    broken = False
    tried = opened = closed = 0

    def __init__(self, clock: FakeClock) -> None:
        type(self).tried += 1
        if type(self).broken:
            raise HypervisorError("nobody listens")
        type(self).opened += 1
        self._clock = clock

    def domains(self) -> Sequence[DomainReading]:
        if type(self).broken:
            raise HypervisorError("the connection broke")
        return [DomainReading(UUID, "vm", DomainState.RUNNING, cpu_ns=int(self._clock() * 1e9))]

    def host(self) -> HostReading:
        return HostReading(self._clock(), (self._clock() / 2, self._clock()))

    def close(self) -> None:
        type(self).closed += 1


class Lab:
    """A poller of a fake hypervisor, whose clock each round moves on by a second."""

    def __init__(self, *, remote: bool = False) -> None:
        self.samples: list[HostSample] = []
        self.clock = clock = FakeClock()

        class Mine(FakeHypervisor):
            """Counts for this test alone."""

        self.hypervisor = Mine

        def read_host() -> HostReading:
            return HostReading(clock(), (clock() / 4, clock()))

        reads: Callable[[], HostReading] | None = None if remote else read_host
        self.domains = DomainPoller(
            "fake:///", lambda _uri: self.hypervisor(clock), with_host=remote, clock=clock, now=clock
        )
        self.poller = HostPoller("lab", "fake:///", self.domains, reads, self.samples.append, clock)

    def round(self) -> None:
        """What two threads do."""
        self.domains.poll()
        self.poller.poll()

    def rounds(self, count: int) -> HostSample:
        for _ in range(count):
            self.clock.at_s += 1
            self.round()
        return self.samples[-1]


def test_two_rounds_make_a_sample() -> None:
    lab = Lab()
    lab.clock.at_s += 1
    lab.round()
    assert lab.samples == []  # of one reading nothing is known
    sample = lab.rounds(1)
    assert (sample.at, sample.load, sample.domains_at, sample.problem) == (1002.0, {"cpu": 25.0}, 1002.0, "")
    assert [(d.uuid, d.figures) for d in sample.domains] == [(UUID, {"cpu": 100.0})]


def test_of_a_remote_host_the_hypervisor_tells() -> None:
    lab = Lab(remote=True)
    assert lab.rounds(2).load == {"cpu": 50.0}
    before = len(lab.samples)
    lab.hypervisor.broken = True
    lab.rounds(2)
    assert len(lab.samples) == before  # its sample only grows old


def test_after_an_outage_no_load_is_an_average_over_it() -> None:
    lab = Lab()
    before = (lab.rounds(2), len(lab.samples))[1]
    lab.clock.at_s += 60
    lab.round()
    assert len(lab.samples) == before
    lab.rounds(1)
    assert len(lab.samples) == before + 1


def test_without_a_hypervisor_the_host_is_known_and_where_domains_are_grows_old() -> None:
    lab = Lab()
    lab.rounds(2)
    lab.hypervisor.broken = True
    sample = lab.rounds(3)
    assert (sample.at, sample.load, sample.domains_at) == (1005.0, {"cpu": 25.0}, 1002.0)
    assert [domain.uuid for domain in sample.domains] == [UUID]
    assert sample.problem == "nobody listens"


def test_it_comes_back_and_waits_longer_each_time() -> None:
    lab = Lab()
    lab.rounds(2)
    lab.hypervisor.broken = True
    lab.rounds(100)
    assert 6 <= lab.hypervisor.tried <= 12  # after 0.5 s, 1 s, 2 s, ... and then every 30 s
    lab.hypervisor.broken = False
    sample = lab.rounds(31)
    assert (sample.problem, sample.domains_at) == ("", lab.clock.at_s)


@pytest.mark.long
def test_ten_thousand_rounds_leave_descriptors_memory_and_connections_flat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("persona.host"), "disabled", True)  # pytest would keep what it says
    lab = Lab()
    lab.poller._put = SampleFiles(tmp_path).put

    def some(count: int) -> None:
        for number in range(count):
            lab.hypervisor.broken = number % 50 > 47
            lab.clock.at_s += 1
            lab.round()

    some(200)
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    ours = [tracemalloc.Filter(True, "*/persona_broker/host/*", all_frames=True)]  # and what that calls

    def held() -> tracemalloc.Snapshot:
        gc.collect()
        return tracemalloc.take_snapshot().filter_traces(ours)

    tracemalloc.start(8)
    try:
        some(500)
        before = held()
        some(10_000)
        grown = held().compare_to(before, "lineno")
    finally:
        tracemalloc.stop()
    assert sum(line.size_diff for line in grown) < 50_000, "\n".join(map(str, grown[:10]))
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert lab.hypervisor.opened > 100
    assert lab.hypervisor.opened - lab.hypervisor.closed <= 1


def test_what_ends_it_closes_the_connection() -> None:
    lab, stop = Lab(), threading.Event()
    running = threading.Thread(target=lab.poller.run, args=(stop,))
    running.start()
    until(lambda: lab.domains.listed.at is not None)
    stop.set()
    running.join(5)
    assert (lab.hypervisor.opened, lab.hypervisor.closed) == (1, 1)


def test_a_hypervisor_that_hangs_does_not_hold_up_the_host() -> None:
    lab, stop, hang = Lab(), threading.Event(), threading.Event()
    lab.domains._connect = lambda _uri: hang.wait(10) and lab.hypervisor(lab.clock)  # type: ignore[assignment,return-value]
    running = threading.Thread(target=lab.poller.run, args=(stop,))
    running.start()
    lab.clock.at_s += 1

    def seen() -> bool:
        lab.clock.at_s += 0.1
        return bool(lab.samples)

    until(seen)
    assert (lab.samples[0].load, lab.samples[0].domains_at) == ({"cpu": 25.0}, None)
    stop.set()
    hang.set()
    running.join(5)
    assert not running.is_alive()


def test_a_call_that_hangs_is_given_up_and_counted() -> None:
    limit, hang = TimeLimit("test"), threading.Event()
    with pytest.raises(TookTooLongError):
        limit.call(hang.wait, 0.05)
    assert limit.late == 1
    assert limit.call(lambda: 7, 5) == 7
    with pytest.raises(KeyError):
        limit.call(lambda: {"a": 1}["x"], 5)
    hang.set()
    for thread in limit._late:
        thread.join(5)
    assert limit.late == 0


def reading(folder: Path, *hosts: str) -> SampleFiles:
    """The broker's side, with the clock of a lab."""
    return SampleFiles(folder, hosts, lambda: 1002.0)


def test_a_sample_is_news_once(tmp_path: Path) -> None:
    writer, reader = SampleFiles(tmp_path), reading(tmp_path, "lab")
    sample = Lab().rounds(2)
    assert reader.news() == []
    writer.put(sample)
    assert reader.news() == [sample]
    assert reader.news() == []
    writer.put(sample)  # another file, though it says the same
    assert reader.news() == [sample]
    assert reading(tmp_path / "none", "lab").news() == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"host": "lab"}', "[" * 100_000, "\0", " " * (SIZE_MAX + 1)])
def test_a_file_that_is_no_sample_is_said_and_hides_no_other(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    sample = Lab().rounds(2)
    SampleFiles(tmp_path).put(sample)
    (tmp_path / "odd.json").write_text(text)
    reader = reading(tmp_path, "odd", "lab")
    assert reader.news() == [sample]
    assert caplog.records[0].message.startswith(f"{tmp_path}/odd.json: this sample")
    assert reader.news() == []  # and it is said once
    assert len(caplog.records) == 1


def test_no_host_speaks_for_another_and_no_link_is_followed(tmp_path: Path) -> None:
    SampleFiles(tmp_path).put(Lab().rounds(2))
    (tmp_path / "lab.json").rename(tmp_path / "other.json")
    (tmp_path / "lab.json").symlink_to(tmp_path / "other.json")
    assert reading(tmp_path, "lab", "other").news() == []


def test_top_shows_bars_and_what_is_not_known() -> None:
    sample = Lab().rounds(2)
    lines = list(HostRow("lab", sample, 1003.0, 15.0).lines())
    assert lines[0] == "lab  1 s ago"
    assert lines[1].split() == ["cpu", "[#####...............]", "25", "%"]
    assert lines[2].split() == ["memory", "unknown"]
    assert lines[-1].split() == ["vm", "running", "cpu", "100", "%", UUID]
    assert "too old to count" in next(iter(HostRow("lab", sample, 1100.0, 15.0).lines()))
    assert [bar(percent) for percent in (0, 100)] == ["[" + "." * 20 + "]", "[" + "#" * 20 + "]"]
    seen = [HostRow("lab", s, now, 15.0).is_seen for s, now in ((sample, 1003.0), (sample, 1100.0), (None, 1.0))]
    assert seen == [True, False, False]
    assert json.dumps(HostRow("lab", sample, 1003.0, 15.0).as_json())


def test_top_escapes_what_a_sample_says_of_a_domain() -> None:
    odd = Domain(UUID, "\x1b[2J", DomainState.RUNNING, {}, "\x1b[2J")
    sample = HostSample("lab", "fake:///", 1002.0, {}, 1002.0, (odd,))
    assert all(line.isprintable() for line in HostRow("lab", sample, 1003.0, 15.0).lines())
