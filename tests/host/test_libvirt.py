"""What persona-host sees of a real libvirtd with real domains, and what it makes of all that goes wrong there."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest
from persona_broker.host.core.readings import Domain, DomainState
from persona_broker.host.core.sample import HostSample
from persona_broker.host.hypervisor import HypervisorError
from persona_broker.host.libvirt_hypervisor import LibvirtHypervisor, _opening
from persona_broker.host.sample_files import SampleFiles
from persona_broker.store.sqlite import SqliteStore

from tests.broker.conftest import Broker, environment
from tests.host.lab import SLEEP, Libvirtd
from tests.waiting import until

pytestmark = [pytest.mark.long, pytest.mark.root]


class Poller:
    """A persona-host of its own process, and its newest sample."""

    def __init__(self, folder: Path, libvirtd: Libvirtd) -> None:
        self.folder = folder / "run"
        self.folder.mkdir()
        self.config = folder / "broker.toml"
        self.config.write_text(
            f'load_max_age_s = 3\n[host]\nuris = ["{libvirtd.uri}"]\nnames = ["lab"]\ndirectory = "{self.folder}"\n'
        )
        self._log = folder / "log"
        command = [sys.executable, "-m", "persona_broker.host_command", "--config", str(self.config), "run"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment(), stderr=log)
        self._files, self._newest = SampleFiles(self.folder, ("lab",)), None  # type: tuple[SampleFiles, HostSample | None]

    def newest(self) -> HostSample | None:
        for sample in self._files.news():
            self._newest = sample
        return self._newest

    def seen(self, what: Callable[[HostSample], bool], limit_s: float = 40.0) -> HostSample:
        """The first sample from now on that is as asked."""
        began = time.time()
        found: list[HostSample] = []

        def look() -> bool:
            sample = self.newest()
            if sample is not None and sample.at > began and what(sample):
                found.append(sample)
            return bool(found)

        try:
            until(look, limit_s)
        except AssertionError:
            print(self._newest, self._log.read_text(), sep="\n")
            raise
        return found[0]


@pytest.fixture
def poller(tmp_path: Path, libvirtd: Libvirtd) -> Iterator[Poller]:
    poller = Poller(tmp_path, libvirtd)
    try:
        poller.seen(lambda sample: "cpu" in domain(sample, "burner").figures)
        yield poller
    finally:
        poller.process.send_signal(signal.SIGCONT)
        poller.process.terminate()
        assert poller.process.wait(30) == 0


def domain(sample: HostSample, name: str) -> Domain:
    """One that is not there has no figures either."""
    return next((one for one in sample.domains if one.name == name), Domain("", name, DomainState.OTHER))


def test_load_is_seen_of_whoever_makes_it(poller: Poller) -> None:
    def shows(sample: HostSample) -> bool:
        """The other one boots for a second, too, before it sleeps."""
        burner, idle = (domain(sample, name).figures.get("cpu", 0) for name in ("burner", "idle"))
        return burner > 10 and idle < burner / 4

    sample = poller.seen(shows)
    assert domain(sample, "burner").figures["memory"] == 16 << 20
    assert sample.load["cpu"] > 20 / (os.cpu_count() or 1)  # a burner has a good part of one of them
    assert 0 < sample.load["memory"] < 100
    assert (sample.host, sample.problem) == ("lab", "")


def test_a_stopped_qemu_makes_only_itself_unknown(poller: Poller, libvirtd: Libvirtd) -> None:
    def shows(sample: HostSample) -> bool:
        """On a busy machine two calls may hang with the domain before one goes past, which costs a disk figure."""
        return bool(domain(sample, "idle").problem) and domain(sample, "burner").figures.keys() >= {"cpu", "read"}

    os.kill(libvirtd.qemu("idle"), signal.SIGSTOP)
    try:
        for _ in range(3):
            sample = poller.seen(shows)
            assert (domain(sample, "idle").figures, domain(sample, "idle").state) == ({}, DomainState.RUNNING)
            assert domain(sample, "idle").problem == "its monitor does not answer"
            assert (domain(sample, "burner").problem, sample.problem) == ("", "")
    finally:
        os.kill(libvirtd.qemu("idle"), signal.SIGCONT)
    poller.seen(lambda sample: "cpu" in domain(sample, "idle").figures)


def test_a_libvirtd_that_is_killed_costs_no_figure_of_the_host_and_comes_back(
    poller: Poller, libvirtd: Libvirtd
) -> None:
    libvirtd.kill()
    try:
        sample = poller.seen(lambda sample: bool(sample.problem))
        assert "cpu" in sample.load
        assert {one.name for one in sample.domains} == {"burner", "idle"}  # the last that is known
        stale = sample.domains_at
        assert poller.seen(lambda sample: bool(sample.problem)).domains_at == stale
    finally:
        libvirtd.start()
    sample = poller.seen(lambda sample: not sample.problem and "cpu" in domain(sample, "burner").figures)
    assert domain(sample, "burner").state is DomainState.RUNNING


def test_a_libvirtd_that_is_stopped_makes_its_domains_old_and_nothing_else(poller: Poller, libvirtd: Libvirtd) -> None:
    os.kill(libvirtd.pid, signal.SIGSTOP)
    try:
        sample = poller.seen(lambda sample: sample.at - (sample.domains_at or 0) > 3)
        assert "cpu" in sample.load
    finally:
        os.kill(libvirtd.pid, signal.SIGCONT)
    poller.seen(lambda sample: not sample.problem and "cpu" in domain(sample, "burner").figures)


def test_a_domain_that_is_destroyed_is_seen_to_be_off(poller: Poller, libvirtd: Libvirtd) -> None:
    ident = libvirtd.begin("short", SLEEP)
    poller.seen(lambda sample: domain(sample, "short").state is DomainState.RUNNING)
    libvirtd.destroy("short")
    sample = poller.seen(lambda sample: domain(sample, "short").state is DomainState.SHUT_OFF)
    assert (domain(sample, "short").uuid, "cpu" in domain(sample, "short").figures) == (ident, False)
    assert domain(sample, "burner").state is DomainState.RUNNING
    libvirtd.ask(lambda connection: connection.lookupByName("short").undefine())
    poller.seen(lambda sample: not domain(sample, "short").uuid)


def test_top_shows_it(poller: Poller) -> None:
    command = [sys.executable, "-m", "persona_broker.host_command", "--config", str(poller.config), "top"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines if line[0] in ("burner", "idle")] == ["burner", "idle"]  # the busiest first
    assert any(line[0] == "cpu" and line[-1] == "%" for line in lines)


def test_its_connection_cannot_change_a_domain(libvirtd: Libvirtd) -> None:
    hypervisor = LibvirtHypervisor(libvirtd.uri)
    try:
        with pytest.raises(libvirt.libvirtError, match="read only"):
            hypervisor._connection.lookupByName("idle").destroy()
    finally:
        hypervisor.close()


def test_one_domain_s_error_costs_no_other_its_figures(libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bulk call fails as a whole; what fails is made up, the rest is libvirt's."""
    hypervisor = LibvirtHypervisor(libvirtd.uri)

    class Failing:
        """The real connection, but for what asks of all domains, or of the idle one."""

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def getAllDomainStats(self, _stats: int, _flags: int) -> object:
            raise libvirt.libvirtError("made up")

        def domainListGetStats(self, domains: list[libvirt.virDomain], stats: int, flags: int) -> object:
            if domains[0].name() == "idle":
                raise libvirt.libvirtError("made up too")
            return real.domainListGetStats(domains, stats, flags)

    real = hypervisor._connection
    monkeypatch.setattr(hypervisor, "_connection", Failing())
    try:
        found = {one.name: one for one in hypervisor.domains()}
        assert (found["burner"].problem, found["burner"].cpu_ns is not None) == ("", True)
        assert "made up too" in found["idle"].problem
        assert (found["idle"].state, found["idle"].cpu_ns) == (DomainState.RUNNING, None)
    finally:
        hypervisor.close()


@pytest.mark.parametrize(
    "uri", ["qemu+unix:///system?socket=/nonexistent", "moon:///system", "qemu+tcp://127.0.0.1:1/"]
)
def test_a_uri_that_nobody_answers_is_said_by_name(uri: str) -> None:
    with pytest.raises(HypervisorError, match="cannot be opened"):
        LibvirtHypervisor(uri)


def test_a_machine_that_dies_while_it_is_asked_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    uri, answers = "qemu+ssh://dead/system", threading.Event()
    monkeypatch.setattr(libvirt, "openReadOnly", lambda _uri: answers.wait(60))
    monkeypatch.setattr("persona_broker.host.libvirt_hypervisor._FIRST_S", 0.05)
    try:
        for _ in range(3):
            with pytest.raises(HypervisorError, match=r"cannot be opened: no answer within 0\.05 s"):
                LibvirtHypervisor(uri)
        with pytest.raises(HypervisorError, match="3 attempts still wait"):
            LibvirtHypervisor(uri)
    finally:
        answers.set()
    monkeypatch.undo()
    until(lambda: _opening[uri].late == 0)
    with pytest.raises(HypervisorError, match="cannot be opened: "):  # it is tried again
        LibvirtHypervisor(uri)


@pytest.mark.parametrize("rounds", [300, pytest.param(10_000, marks=pytest.mark.soak)])
def test_many_polls_and_connections_leave_nothing_behind(libvirtd: Libvirtd, rounds: int) -> None:
    def some(count: int) -> None:
        for _ in range(count):
            hypervisor = LibvirtHypervisor(libvirtd.uri)
            for _ in range(10):
                assert len(hypervisor.domains()) >= 2
            hypervisor.close()
        gc.collect()

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def resident_kib() -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])

    some(3)
    before, memory = held(), resident_kib()
    some(rounds // 10)
    until(lambda: held() <= before, 5)
    assert resident_kib() - memory < 4096


def test_a_decision_follows_the_host_of_the_guest_s_domain(poller: Poller, libvirtd: Libvirtd, tmp_path: Path) -> None:
    """Through a real broker: bound, seen, too old, seen again, gone."""
    persona = {"kind": "Persona", "name": "A", "command_whitelist": ["ls"]}
    policy = {
        "kind": "Policy", "name": "a", "subjects": {"users": ["alice"]}, "persona": "A",
        "when": {"host_load": {"memory": {"below": 100}}},
    }  # fmt: skip
    (tmp_path / "documents.json").write_text(json.dumps([persona, policy]))
    ident = libvirtd.begin("guest", SLEEP)
    broker = Broker(tmp_path)  # its broker.toml is the poller's
    assert broker.run("load", "set", "memory=50").returncode == 0
    with contextlib.closing(SqliteStore(tmp_path / "db")) as store:
        store.add_guest("vm-1", "token-of-vm-1")
        store.bind("vm-1", ident)
    broker.start(applied=(tmp_path / "documents.json",))

    def reason() -> str:
        request = {
            "subject": {"user": "alice", "groups": [], "vm": "vm-1"}, "session": "s", "cwd": "/",
            "program": {"path": "/usr/bin/ls", "names": ["ls"], "paths": ["/usr/bin/ls"]},
            "argv": ["ls"], "argv_complete": True,
        }  # fmt: skip
        _, answer = broker.call("POST", "/v1/decisions", {"request": request}, token="token-of-vm-1")
        return str(answer.get("reason") or answer["decision"])

    try:
        until(lambda: reason() == "granted")
        poller.process.send_signal(signal.SIGSTOP)
        until(lambda: reason() == "load_unknown")
        poller.process.send_signal(signal.SIGCONT)
        until(lambda: reason() == "granted")
        libvirtd.destroy("guest")
        libvirtd.ask(lambda connection: connection.lookupByName("guest").undefine())
        until(lambda: reason() == "load_unknown")
    finally:
        broker.stop()
