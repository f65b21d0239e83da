"""A host's load crosses a threshold: its guests are told, their leases end, and nobody else's do."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from persona_broker.condition_watcher import Watcher
from persona_broker.host.core.readings import Domain, DomainState
from persona_broker.host.core.sample import HostSample
from persona_broker.host.load import SetSource
from persona_broker.host.sample_files import SampleFiles
from persona_broker.policy.conditions import Sample
from persona_broker.store.hosts import SeenHosts
from persona_broker.store.sqlite import SqliteStore
from persona_broker.view import State

from persona.documents import parse_document
from tests.broker.conftest import Broker, apply

VMS = ("vm-0", "vm-1", "vm-2")
PERSONA = {"kind": "Persona", "name": "A", "command_whitelist": ["ls"]}
POLICY = {
    "kind": "Policy", "name": "a", "subjects": {"users": ["alice"]}, "persona": "A",
    "when": {"host_load": {"cpu": {"below": 70, "again_below": 60}}},
}  # fmt: skip


def uuid(number: int) -> str:
    """That of the domain of ``vm-NUMBER``."""
    return f"00000000-0000-4000-8000-{number:012}"


def sample(host: str, cpu: float, runs: dict[str, DomainState]) -> HostSample:
    domains = tuple(Domain(uuid, f"name-{uuid}", state) for uuid, state in runs.items())
    now = time.time()
    return HostSample(host, "qemu:///system", now, {"cpu": cpu}, now, domains)


class World:
    """A watcher over a store in which vm-1 and vm-2 are domains of the hosts a and b, and vm-0 is none."""

    def __init__(self, folder: Path) -> None:
        self.store, self.operator = SqliteStore(folder / "db"), SqliteStore(folder / "db")
        apply(self.operator, [parse_document(PERSONA), parse_document(POLICY)])
        for vm in VMS:
            self.operator.add_guest(vm, vm)
        for number in (1, 2):
            self.operator.bind(f"vm-{number}", uuid(number))
        self.operator.put_set_load({"cpu": 5.0})
        self.files = SampleFiles(folder)
        self.loads("a", 5.0)
        self.loads("b", 5.0)
        self.watcher = Watcher(self.store, SetSource(self.store.set_load), 15, hosts=SampleFiles(folder, ("a", "b")))
        self.state = State(SqliteStore(folder / "db"), 15)
        self.look()

    def loads(self, host: str, cpu: float, runs: dict[str, DomainState] | None = None) -> None:
        self.files.put(sample(host, cpu, runs or {{"a": uuid(1), "b": uuid(2)}[host]: DomainState.RUNNING}))

    def look(self) -> None:
        self.watcher._hosts_at = 0.0
        self.watcher.look()

    def told(self) -> list[int]:
        return [self.watcher.generation_for(vm) for vm in VMS]

    def moved(self, act: Callable[[], object]) -> list[bool]:
        """Which of VMS hear of what ``act`` does."""
        before = self.told()
        act()
        self.look()
        return [later > earlier for earlier, later in zip(before, self.told(), strict=True)]

    def holds(self) -> list[bool]:
        """On which of VMS the policy holds, as a worker has it."""
        view = self.state.current(self.watcher.generation)
        return [view.condition_state.unmet_of(view.snapshot.policies[0], vm) is None for vm in VMS]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield World(tmp_path)


def test_a_crossing_is_told_to_the_guests_of_its_host_alone(world: World) -> None:
    assert world.holds() == [True, True, True]
    assert world.moved(lambda: world.loads("a", 80)) == [False, True, False]
    assert world.holds() == [True, False, True]
    assert world.moved(lambda: world.loads("a", 65)) == [False, False, False]  # between the two: still over
    assert world.holds() == [True, False, True]
    assert world.moved(lambda: world.loads("b", 90)) == [False, False, True]
    assert world.moved(lambda: world.loads("a", 50)) == [False, True, False]
    assert world.holds() == [True, True, False]


def test_what_a_guest_is_answered_is_of_the_generation_that_it_was_told(world: World) -> None:
    """Else its session, confirmed in another than its leases, would ask of every program."""
    for host, cpu in (("a", 80), ("b", 80), ("a", 5)):
        world.moved(lambda host=host, cpu=cpu: world.loads(host, cpu))  # type: ignore[misc]
        view = world.state.current(world.watcher.generation)
        assert [view.generation_for(vm) for vm in VMS] == world.told()


def test_the_broker_s_own_load_and_documents_concern_everybody(world: World) -> None:
    assert world.moved(lambda: world.operator.put_set_load({"cpu": 90.0})) == [True, True, True]
    assert world.holds() == [False, True, True]  # but it does not decide for VMs that are bound
    assert world.moved(lambda: apply(world.operator, [parse_document(PERSONA)])) == [True, True, True]


def test_a_domain_that_moves_is_judged_by_its_new_host(world: World) -> None:
    world.moved(lambda: world.loads("b", 90))
    assert world.holds() == [True, True, False]

    def migrate() -> None:
        world.loads("a", 5, {uuid(9): DomainState.RUNNING})
        world.loads("b", 90, {uuid(1): DomainState.RUNNING, uuid(2): DomainState.RUNNING})

    assert world.moved(migrate) == [False, True, False]
    assert world.holds() == [True, False, False]
    gone = {uuid(2): DomainState.RUNNING}
    assert world.moved(lambda: world.loads("b", 5, gone)) == [False, True, True]  # vm-1 is nowhere, vm-2 may again
    assert world.holds() == [True, False, True]


def test_documents_that_change_in_the_same_moment_concern_everybody(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = world.store.raise_generation_for

    def apply_first(guests: Any) -> int:
        apply(world.operator, [parse_document({**PERSONA, "command_whitelist": ["cat"]}), parse_document(POLICY)])
        return narrow(guests)

    monkeypatch.setattr(world.store, "raise_generation_for", apply_first)
    assert world.moved(lambda: world.loads("a", 80)) == [True, True, True]


def test_a_sample_that_grows_old_is_a_crossing_of_its_host(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A poller that hangs says nothing: that is what is noticed."""
    now = time.time
    world.moved(lambda: world.operator.put_set_load({"cpu": 5.0}))
    monkeypatch.setattr(time, "time", lambda: now() + 20)
    world.watcher._sample_at = 0.0
    assert world.moved(lambda: world.operator.add_lost(1)) == [False, True, True]
    assert world.holds() == [True, False, False]


def test_latches_of_a_host_outlive_the_watcher_and_are_its_own(world: World, tmp_path: Path) -> None:
    world.moved(lambda: world.loads("a", 80))
    world.loads("a", 65)
    world.loads("b", 65)
    Watcher(world.store, SetSource(world.store.set_load), 15, hosts=SampleFiles(tmp_path, ("a", "b"))).look()
    found = SeenHosts(world.operator).look()
    assert [len(found[host].latches or ()) for host in ("a", "b")] == [1, 0]


@pytest.mark.parametrize("column", ["latches", "sample"])
def test_latches_that_cannot_be_read_count_as_all_exceeded(world: World, tmp_path: Path, column: str) -> None:
    with world.operator.writing() as db:
        db.execute(f"UPDATE hosts SET {column} = 'x' WHERE name = 'a'")  # noqa: S608 - one of the two above
    world.watcher = Watcher(world.store, SetSource(world.store.set_load), 15, hosts=SampleFiles(tmp_path, ("a", "b")))
    world.moved(lambda: world.loads("a", 65))
    assert world.holds()[1] is False
    world.moved(lambda: world.loads("a", 50))
    assert world.holds()[1] is True


def test_the_sample_of_the_machine_itself_is_as_before(world: World) -> None:
    found = world.operator.sample()
    assert isinstance(found, Sample) and (found.source, found.load) == ("set", {"cpu": 5.0})


@pytest.mark.long
def test_a_real_broker_tells_one_guest_within_a_second_and_not_the_other(tmp_path: Path) -> None:
    broker = Broker(tmp_path)
    (tmp_path / "run").mkdir()
    files = SampleFiles(tmp_path / "run")
    uris = '["qemu+tls://a/system", "qemu+tls://b/system"]'
    # b's sample is put once, and the machine may be busy
    (tmp_path / "broker.toml").write_text(f'load_max_age_s = 60\n[host]\nuris = {uris}\ndirectory = "{tmp_path}/run"\n')
    documents = tmp_path / "documents.json"
    documents.write_text(json.dumps([PERSONA, POLICY]))
    assert broker.run("load", "set", "cpu=5").returncode == 0
    for number in (1, 2):
        (tmp_path / f"token-{number}").write_text(f"token-of-vm-{number}")
        (tmp_path / f"token-{number}").chmod(0o600)
    store = SqliteStore(tmp_path / "db")
    for number in (1, 2):
        store.add_guest(f"vm-{number}", f"token-of-vm-{number}")
        store.bind(f"vm-{number}", uuid(number))
    quiet = [sample("a", 5, {uuid(1): DomainState.RUNNING}), sample("b", 5, {uuid(2): DomainState.RUNNING})]
    for one in quiet:
        files.put(one)
    broker.start(applied=(documents,))
    try:
        streams = [broker.stream(f"token-of-vm-{number}") for number in (1, 2)]
        heard = [json.loads(stream.readline()) for _, stream in streams]
        time.sleep(0.5)  # the samples that lay there are looked at
        began = time.monotonic()
        files.put(sample("a", 90, {uuid(1): DomainState.RUNNING}))
        line = json.loads(streams[0][1].readline())
        while line["generation"] == heard[0]["generation"]:
            line = json.loads(streams[0][1].readline())
        took_s = time.monotonic() - began
        assert took_s < 3
        other = json.loads(streams[1][1].readline())
        assert (other["why"], other["generation"]) == ("beat", heard[1]["generation"])
        answers = [_decide(broker, number) for number in (1, 2)]
        assert [answer["decision"] for answer in answers] == ["denied", "granted"]
        assert answers[0]["reason"] == "load_exceeds_threshold"
        assert [answer["generation"] for answer in answers] == [line["generation"], heard[1]["generation"]]
        for connection, _ in streams:
            connection.close()
    finally:
        broker.stop()


def _decide(broker: Broker, number: int) -> dict[str, Any]:
    request = {
        "subject": {"user": "alice", "groups": [], "vm": f"vm-{number}"}, "session": "s-1",
        "program": {"path": "/usr/bin/ls", "names": ["ls"], "paths": ["/usr/bin/ls"]},
        "argv": ["ls"], "cwd": "/", "argv_complete": True,
    }  # fmt: skip
    status, answer = broker.call("POST", "/v1/decisions", {"request": request}, token=f"token-of-vm-{number}")
    assert status == 200, answer
    found: dict[str, Any] = answer
    return found
