"""The watcher: steady samples, latches that are kept, and a generation for each change of mind."""

import itertools
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from persona_broker.condition_watcher import Watcher
from persona_broker.host.load import MachineSource, SetSource
from persona_broker.policy.unreadable import Unreadable
from persona_broker.store.interface import StoreError
from persona_broker.store.sqlite import SqliteStore

from persona.documents import parse_document
from tests.broker.conftest import apply


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "db")
    yield store
    store.close()


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[SqliteStore]:
    """Another process's connection."""
    store = SqliteStore(tmp_path / "db")
    policy = {"kind": "Policy", "name": "a", "subjects": {"users": ["alice"]}, "persona": "A"}
    policy["when"] = {"host_load": {"cpu": {"below": 70, "again_below": 60}}}
    apply(
        store, [parse_document({"kind": "Persona", "name": "A", "command_whitelist": ["ls"]}), parse_document(policy)]
    )
    yield store
    store.close()


class Counting:
    """A measured source that counts how often it is read."""

    name = "counting"
    immediate = False

    def __init__(self) -> None:
        self.reads = 0

    def read(self) -> Mapping[str, float]:
        self.reads += 1
        return {"cpu": float(self.reads)}


def test_a_busy_database_does_not_make_it_measure_more_often(store: SqliteStore, operator: SqliteStore) -> None:
    source = Counting()
    watcher = Watcher(store, source, 15)
    watcher.look()
    for _ in range(50):
        operator.add_lost(1)
        watcher.look()
    assert source.reads == 1


def test_crossings_raise_the_generation_and_only_they(store: SqliteStore, operator: SqliteStore) -> None:
    watcher = Watcher(store, SetSource(store.set_load), 15)
    raised = []
    for cpu in (50, 69, 70, 65, 60, 59, 69, 71):
        operator.put_set_load({"cpu": float(cpu)})
        watcher.look()
        raised.append(watcher.generation)
    steps = [after - before for before, after in itertools.pairwise(raised)]
    assert steps == [0, 1, 0, 0, 1, 0, 1]
    assert store.generation() == watcher.generation


def test_latches_outlive_the_watcher(store: SqliteStore, operator: SqliteStore) -> None:
    operator.put_set_load({"cpu": 80.0})
    Watcher(store, SetSource(store.set_load), 15).look()
    assert len(store.latches() or ()) == 1
    operator.put_set_load({"cpu": 65.0})
    Watcher(store, SetSource(store.set_load), 15).look()
    assert len(store.latches() or ()) == 1  # between the two: still over


def test_policies_applied_while_it_raises_the_generation_are_seen(
    store: SqliteStore, operator: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own number is newer than theirs; it must look at their conditions nevertheless."""
    watcher = Watcher(store, SetSource(store.set_load), 15)
    operator.put_set_load({"cpu": 50.0})
    watcher.look()
    raise_generation = store.raise_generation

    def apply_first() -> int:
        documents = [document for document, _ in operator.documents() if not isinstance(document, Unreadable)]
        apply(operator, documents[:1])
        return raise_generation()

    monkeypatch.setattr(store, "raise_generation", apply_first)
    operator.put_set_load({"cpu": 80.0})
    watcher.look()
    assert watcher._snapshot.conditions
    watcher.look()
    assert not watcher._snapshot.conditions


def test_an_error_of_the_record_does_not_end_it(
    store: SqliteStore, operator: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(BaseException):
        pass

    ended: list[int] = []
    rounds = iter([StoreError("locked"), None, KeyError("a bug")])

    def look() -> None:
        error = next(rounds)
        if error is not None:
            raise error

    def end(code: int) -> None:
        ended.append(code)
        raise Ended

    watcher = Watcher(store, SetSource(store.set_load), 15)
    monkeypatch.setattr(watcher, "look", look)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended):
        watcher.run()
    assert ended == [70]
    assert list(rounds) == []


def test_this_machine_has_a_load() -> None:
    load = MachineSource().read()
    assert 0 <= load["cpu"] <= 100
    assert 0 < load["memory"] < 100
