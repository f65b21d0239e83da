"""From the loop to the broker: what a broker that drops answers, is slow, or is killed gets, and how often."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from persona_guest.audit.spool import MIB, Spool
from persona_guest.audit.upload import Recorder
from persona_guest.broker.http import Body, BrokerError, Connection
from persona_guest.settings import Broker as Settings
from persona_guest.shell import cli

from persona import wire
from persona.problems import Reason
from persona.record_codec import Record, decode_record, decode_stream
from tests.broker.audited import audited
from tests.broker.conftest import Broker, environment
from tests.guest.conftest import Run, trial_of
from tests.some import some
from tests.waiting import until

BOOT = "b" * 32


def record(at: float) -> Record:
    return Record(at, "s", f"u{at % 3}", "/bin/x", ("x",), "denied", None, None, None, None, "exec", False, False)


def spool_in(directory: Path) -> Spool:
    return Spool(directory / "spool", directory / "numbers", 4 * MIB, boot=BOOT)


class FakeBroker:
    """A fake: keeps what it is sent, and answers, drops the answer, or is away, as ``does`` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: int = wire.CURRENT) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.at: list[float] = []
        self.does: Callable[[], str] = lambda: "answers"
        self.answer: Callable[[dict[str, Any]], tuple[int, Any]] = lambda _body: (204, None)
        self._version = version
        monkeypatch.setattr(Connection, "call", lambda _self, *call: self.call(*call))

    def call(self, _method: str, _path: str, body: Body, _deadline: float) -> tuple[int, Any]:
        does = self.does()
        if does != "away":
            self.bodies.append(json.loads(json.dumps(body(self._version))))
            self.at.append(time.monotonic())
        if does != "answers":
            raise BrokerError(Reason.BROKER_UNREACHABLE, does)
        return self.answer(self.bodies[-1])

    def records(self) -> list[dict[str, Any]]:
        return [one for body in self.bodies for one in body["records"]]


def test_a_broker_that_drops_answers_gets_the_same_numbers_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = FakeBroker(monkeypatch)
    chance = random.Random(1)  # noqa: S311 - the same each time
    broker.does = lambda: chance.choice(["answers", "answers", "drops the answer", "away"])
    monkeypatch.setattr("persona_guest.audit.sender._AWAY_S", (0.01, 0.02))
    monkeypatch.setattr("persona_guest.audit.sender._BATCH", 10)
    journal: list[Record] = []
    for agent in range(3):
        recorder = Recorder(Settings(), journal.append, spool_in(tmp_path))
        for turn in range(100):
            recorder.add(record(100 * agent + turn))
        until(lambda: len(journal) == 100 * (agent + 1))  # noqa: B023 - it is waited for here
        if agent == 2:
            broker.does = lambda: "answers"
        recorder.close()
    got: dict[int, dict[str, Any]] = {}
    for one in broker.records():
        assert got.setdefault(one["number"], one) == one, "one number, one record"
    assert list(got) == list(range(1, 301)), "in order, and none is missing"
    assert [one["at"] for one in got.values()] == list(range(300))
    assert len(broker.records()) > 300, "at least once"
    streams = {decode_stream(body["stream"]) for body in broker.bodies}
    assert len(streams) == 1 and {stream.boot for stream in streams} == {BOOT}
    assert {body["lost"] for body in broker.bodies} == {0}
    assert all(decode_record(one) for one in broker.records())


def test_a_broker_of_0_1_0_is_told_of_no_numbers_and_counts_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = FakeBroker(monkeypatch, wire.FIRST)
    spool = spool_in(tmp_path)
    recorder = Recorder(Settings(), lambda _record: None, spool)
    until(lambda: recorder._sender._thread.is_alive())
    spool.add([], dropped=5)
    recorder.add(record(1))
    recorder.close()
    assert all(set(body) == {"records", "lost"} for body in some(broker.bodies))
    assert [set(one) & {"number", "lost"} for one in broker.records()] == [set()]
    assert sum(body["lost"] for body in broker.bodies) == 5


def test_records_that_the_broker_names_as_none_are_told_as_lost_by_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = FakeBroker(monkeypatch)

    def refuses(body: dict[str, Any]) -> tuple[int, Any]:
        bad = [index for index, one in enumerate(body["records"]) if one["at"] in (3, 5)]
        return 200, {"refused": [{"index": index, "detail": "no"} for index in [*bad, 99, "x"]]}

    broker.answer = refuses
    recorder = Recorder(Settings(), lambda _record: None, spool_in(tmp_path))
    for turn in range(8):
        recorder.add(record(turn))
    recorder.close()
    lost = [one["lost"] for one in broker.records() if one["event"] == "lost"]
    assert lost == [{"first": n, "last": n, "why": "refused"} for n in (4, 6)]


def test_a_broker_that_comes_back_is_not_flooded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = FakeBroker(monkeypatch)
    broker.does = lambda: "away"
    monkeypatch.setattr("persona_guest.audit.sender._AWAY_S", (0.01, 0.02))
    spool = spool_in(tmp_path)
    recorder = Recorder(Settings(), lambda _record: None, spool)
    for turn in range(1200):
        recorder.add(record(turn))
    until(lambda: spool.status().oldest_at == 0)
    assert spool.status().waiting > 100_000
    broker.does = lambda: "answers"
    until(lambda: spool.status().waiting == 0)
    assert len(broker.records()) == 1200
    assert broker.at[-1] - broker.at[0] > 0.9, "a thousand in a second"
    assert max(len(body["records"]) for body in broker.bodies) <= 200
    recorder.close()


def test_what_is_written_goes_on_while_the_broker_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = FakeBroker(monkeypatch)
    slow = threading.Event()
    broker.does = lambda: "answers" if slow.wait(20) else "away"
    journal: list[Record] = []
    recorder = Recorder(Settings(), journal.append, spool_in(tmp_path))
    recorder.add(record(1))
    until(lambda: len(journal) == 1)
    time.sleep(0.1)  # the first is on its way, and waits
    recorder.add(record(2))
    until(lambda: len(journal) == 2, 3)
    other = Spool(tmp_path / "spool", None, 4 * MIB, boot=BOOT)  # as an agent after this one finds it
    until(lambda: sum(b'"at":2' in path.read_bytes() for path in (tmp_path / "spool").glob("*.records")) == 1, 3)
    slow.set()
    recorder.close()
    other.close()
    assert [one["at"] for one in broker.records()] == [1, 2]


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path)
    broker.start()
    yield broker
    broker.stop()


def kill(broker: Broker) -> None:
    """All of its processes at once."""
    assert broker.process is not None
    os.killpg(broker.process.pid, signal.SIGKILL)
    broker.process.wait()


def kept(broker: Broker) -> list[dict[str, Any]]:
    return audited(broker.directory)


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.soak)])
def test_a_broker_that_is_killed_and_agents_that_follow_each_other_lose_and_double_nothing(
    real: Broker, tmp_path: Path, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persona_guest.audit.sender._AWAY_S", (0.05, 0.1))
    monkeypatch.setattr("persona_guest.audit.sender._BATCH", 10)
    settings = Settings(url=f"unix:{real.api}", token_file=str(tmp_path / "token"), timeout_s=1.0)
    chance = random.Random(2)  # noqa: S311 - the same moments each time
    at = 0
    for _ in range(kills):
        spool = spool_in(tmp_path)
        recorder = Recorder(settings, lambda _record: None, spool)
        for _ in range(300):
            recorder.add(record(at))
            at += 1
        time.sleep(chance.uniform(0.5, 1.0))  # from the first commit on it is being sent
        kill(real)
        for _ in range(50):
            recorder.add(record(at))
            at += 1
        recorder.close()
        assert spool.status().waiting > 0
        real.start(applied=())
    spool = spool_in(tmp_path)
    recorder = Recorder(settings, lambda _record: None, spool)
    recorder.add(replace(record(at), user="last"))
    until(lambda: any(one["user"] == "last" for one in kept(real)), 30)
    until(lambda: spool.status().waiting == 0)
    recorder.close()
    by_number = {one["number"]: one for one in kept(real)}
    assert sorted(by_number) == list(range(1, at + 2))
    assert [by_number[number]["at"] for number in sorted(by_number)] == list(range(at + 1))
    again = Counter(json.dumps(one, sort_keys=True) for one in kept(real))
    assert len(again) == at + 1, "what came twice is the same"


def test_status_says_how_the_records_fare() -> None:
    well: dict[str, Any] = {
        "waiting": 0,
        "bound": 64 * MIB,
        "oldest_at": None,
        "lost": {},
        "not_on_disk": "",
        "aside": [],
    }
    assert cli._records(well) == "0 B of 64 MiB wait for the broker"
    ill = {**well, "waiting": 3 * MIB, "oldest_at": 0, "lost": {"spool_full": 7}, "not_on_disk": "no", "aside": ["x"]}
    said = cli._records(ill)
    assert said.startswith("3 MiB of 64 MiB wait for the broker, the oldest from 19")
    assert said.endswith(", 7 lost (spool_full), not on disk: no, set aside: x")


# --- a real agent ---


def processes_of(home: Path, module: str) -> list[int]:
    """The pids of the trial's agent or broker, workers included."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if module.encode() in words and any(word.startswith(bytes(home)) for word in words):
                found.append(int(entry.parent.name))
    return found


@contextlib.contextmanager
def next_agent(home: Path) -> Iterator[None]:
    """An agent with the trial's settings, once it is ready."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(home / "notify-next"))
        notified.settimeout(15)
        argv = [sys.executable, "-m", "persona_guest", "--config", str(home / "guest.toml")]
        environ = {**environment(), "NOTIFY_SOCKET": str(home / "notify-next")}
        agent = subprocess.Popen(argv, env=environ, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            while b"READY=1" not in notified.recv(4096):
                pass
            yield
        finally:
            agent.terminate()
            agent.wait(15)


@pytest.mark.long
def test_a_real_agent_that_is_killed_is_followed_by_one_that_counts_on_and_may_deny(
    documents: Path, gated: Run, tmp_path: Path
) -> None:
    with trial_of(documents) as path:
        home = path.parents[1]
        gated("for i in 1 2 3; do true; /usr/bin/true; done; strace x", by=path)
        until(lambda: any("strace" in one["program"] for one in kept_by_trial(home)))
        for pid in processes_of(home, "persona_guest"):
            os.kill(pid, signal.SIGKILL)
        config = home / "guest.toml"
        config.write_text(config.read_text() + '[audit]\nspool_mib = 1\nwhen_full = "deny"\n')
        gone = tmp_path / "gone"
        script = f"/usr/bin/true; mkdir {tmp_path}/ready; while [ ! -e {gone} ]; do sleep 0.1; done\n"
        script += "i=0; while /usr/bin/true; do i=$((i+1)); [ $i = 4000 ] && break; done; echo $i"
        with next_agent(home):
            done: list[subprocess.CompletedProcess[str]] = []
            thread = threading.Thread(target=lambda: done.append(gated(script, by=path, timeout=150)))
            thread.start()
            try:
                until((tmp_path / "ready").exists)
                until(lambda: any("mkdir" in one["program"] for one in kept_by_trial(home)))
                for pid in processes_of(home, "persona_broker"):
                    with contextlib.suppress(ProcessLookupError):  # a worker ends with its parent
                        os.kill(pid, signal.SIGKILL)
            finally:
                gone.touch()
                thread.join()
            assert "audit_full" in done[0].stderr
            assert 50 < int(done[0].stdout) < 4000
        numbers = {one["number"] for one in kept_by_trial(home)}
        explained = {
            number
            for one in kept_by_trial(home)
            if "lost" in one
            for number in range(one["lost"]["first"], one["lost"]["last"] + 1)
        }
        assert sorted(numbers | explained) == list(range(1, max(numbers) + 1))
        assert not numbers & explained
        spooled = b"".join(file.read_bytes() for file in (home / "state" / "spool").glob("*.records"))
        assert b'"reason":"audit_full"' in spooled, "what is denied for want of room is recorded"


def kept_by_trial(home: Path) -> list[dict[str, Any]]:
    return audited(home)
