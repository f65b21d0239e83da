"""Finding records: search, tail and export, and the index that makes them quick."""

import contextlib
import json
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from persona_broker.audit.chain import Chain
from persona_broker.audit.core import ocsf
from persona_broker.audit.core.format import split
from persona_broker.audit.delivery import Delivery
from persona_broker.audit.index import Index, Indexer, index_of
from persona_broker.audit.search import Wanted, each, later, newest
from persona_broker.audit.segment import Segment
from persona_broker.store.sqlite import SqliteStore

from tests.broker.conftest import ROOT, Broker
from tests.broker.filled import SECRET, answer
from tests.broker.test_audit_chain import BOOT, DAY_S, MACHINE, said
from tests.some import some


@pytest.mark.parametrize(
    ("words", "right"),
    [
        (("--user", "alice"), [2, 3, 7, 8, 12, 13, 17, 18]),
        (("--user", "alice", "-n", "3"), [13, 17, 18]),
        (("--vm", "vm-2"), [4, 9, 14, 19]),
        (("--session", "s-2"), [12, 13]),
        (("--program", "nmap"), [4, 9, 14, 19]),
        (("--decision", "denied", "--until", "2026-09-23T00:00:00Z"), [4, 9]),
        (("--reason", "outside_hours", "--since", "2026-09-24T00:00:00Z"), [19]),
        (("--persona", "B"), []),
        (("--event", "segment_sealed"), [5, 10, 15]),
        (("--user", "alice", "--since", "2026-09-22T00:00:00Z", "--until", "2026-09-23T00:00:00Z"), [7, 8]),
    ],
)
def test_search(filled: Broker, words: tuple[str, ...], right: list[int]) -> None:
    found = answer(filled, "search", *words)
    assert sorted(one["number"] for one in found) == right
    assert len(filled.run("audit", "search", *words).stdout.splitlines()) == len(right)


def test_tail_has_everything_and_what_operators_did(filled: Broker) -> None:
    assert filled.run("apply", str(ROOT / "examples"), "-m", "first try").returncode == 0
    assert filled.run("guest", "add", "vm-9", "--token-file", str(filled.directory / "t")).returncode == 0
    assert filled.run("load", "set", "cpu=10").returncode == 0
    assert filled.run("guest", "remove", "vm-9").returncode == 0
    found = [one["record"] for one in answer(filled, "tail", "-n", "4")]
    assert [one["event"] for one in found] == ["change_set", "guest_added", "load_set", "guest_removed"]
    assert found[0]["count"] == len(found[0]["documents"]) > 5
    assert (found[0]["revision"], found[0]["message"], found[1]["vm"], found[1]["renewed"]) == (
        1,
        "first try",
        "vm-9",
        False,
    )
    assert {one["author"] for one in found} == {"root" if os.getuid() == 0 else found[0]["author"]}
    assert "change_set" in filled.run("audit", "tail", "-n", "4").stdout
    assert answer(filled, "verify")["whole"]


def test_export_has_stable_names(filled: Broker) -> None:
    done = filled.run("audit", "export", "--user", "alice", "--vm", "vm-1")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 8
    assert lines[0].keys() == {
        "number", "received_at", "vm", "machine", "boot", "counter", "erased", "hash", "record",
    }  # fmt: skip
    first = lines[0]
    assert (first["machine"], first["boot"], first["counter"], first["erased"]) == (MACHINE, BOOT, 1, False)
    assert first["record"] == {**said(argv=["mysql", SECRET], session="s-0"), "at": "1970-01-01T00:00:01.500Z"}


def test_export_as_ocsf(filled: Broker) -> None:
    done = filled.run("audit", "export", "--format", "ocsf")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 12
    assert "left out: OCSF has no class for them" in done.stderr
    denied = next(line for line in lines if line["status_id"] == 2)
    assert (denied["class_uid"], denied["category_uid"], denied["type_uid"], denied["action_id"]) == (
        1007,
        1,
        100701,
        2,
    )
    assert denied["process"]["file"] == {"name": "nmap", "path": "/usr/bin/nmap", "type_id": 1}
    assert (denied["actor"]["user"], denied["device"]["hostname"]) == ({"name": "bob"}, "vm-2")
    login = ocsf.event_of(7, 1_000_000, "vm-1", said(event="admission"))
    assert login is not None
    assert (login["class_uid"], login["activity_id"], login["type_uid"], login["time"]) == (3002, 1, 300201, 1500)
    assert login["dst_endpoint"] == {"hostname": "vm-1"}
    # what https://schema.ocsf.io/1.1.0 requires of both classes
    for event in (denied, login):
        assert {"activity_id", "category_uid", "class_uid", "metadata", "severity_id", "time", "type_uid"} <= set(event)
        assert {"version", "product"} <= set(event["metadata"])
    assert ocsf.event_of(7, 1, "vm-1", said(event="network")) is None
    assert ocsf.event_of(7, 1, None, {"event": "exec"}) is None


def test_the_broker_keeps_the_index(cli: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_broker.audit.index._EVERY_S", 0.02)
    with closing(Chain(cli.directory / "audit")) as chain:
        indexer = Indexer(chain)
        indexer.start()
        try:
            chain.deliver([Delivery("vm-1", [split(said())])])
            deadline = time.monotonic() + 10
            while indexed(chain.segments()[0]) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            indexer.stop(5)


def indexed(segment: Path) -> int:
    path = segment.parent / "index" / segment.name
    with contextlib.suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT count(*) FROM entries").fetchone()[0])
    return 0


def test_a_broken_index_is_read_around_and_made_anew(filled: Broker) -> None:
    segment = Chain(filled.directory / "audit").segments()[0]
    Index(segment).close()
    index_of(segment).write_bytes(b"garbage" * 1000)
    assert len(answer(filled, "search", "--user", "alice")) == 8
    assert index_of(segment).read_bytes() == b"garbage" * 1000
    Index(segment).close()
    assert indexed(segment) == Segment(segment).head()[0]


@pytest.mark.parametrize("through", ["nothing", "some", "everything"])
def test_a_search_writes_nothing_and_finds_everything_once(filled: Broker, through: str) -> None:
    """Whatever the index has: what it lacks is read from the records."""
    chain = Chain(filled.directory / "audit")
    for segment in chain.segments() if through != "nothing" else ():
        Index(segment).close()
        if through == "some":
            with closing(sqlite3.connect(index_of(segment))) as db, db:
                db.execute("DELETE FROM entries WHERE number > (SELECT min(number) + 1 FROM entries)")
    numbers = [one.number for one in each(chain, Wanted(guests_only=False))]
    assert numbers == list(range(1, chain.head()[0] + 1))
    assert [one.number for one in newest(chain, Wanted(guests_only=False), 7)[0]] == numbers[-7:]
    assert [one.number for one in later(chain, Wanted(guests_only=False), 2, 4)[0]] == [3, 4, 5, 6]
    (alike,) = newest(chain, Wanted(user="bob", distinct=True), 100)[0]
    assert (alike.count, alike.number) == (4, max(one.number for one in each(chain, Wanted(user="bob"))))
    before = {path: path.read_bytes() for path in some(filled.directory.rglob("*")) if path.is_file()}
    for words in ("audit tail", "audit search --user alice", "audit export", "audit verify", "records tail", "rollout"):
        assert filled.run(*words.split()).returncode in (0, 1)
    after = {path: path.read_bytes() for path in sorted(filled.directory.rglob("*")) if path.is_file()}
    logs = {path for path in after if path.name.endswith(("-wal", "-shm"))}  # SQLite's, of whoever reads
    assert {path: after[path] for path in after.keys() - logs} == {path: before[path] for path in before.keys() - logs}
    assert all(path.stat().st_size == 0 for path in logs - before.keys() if path.name.endswith("-wal"))


def test_odd_text_is_found(cli: Broker) -> None:
    SqliteStore(cli.directory / "db").close()
    odd = ["\udc80x", "a\x00b", "x" * 256, "\U0001f600", '"quoted\\"', "'; DROP TABLE records; --"]
    with closing(Chain(cli.directory / "audit")) as chain:
        extra = {"moon": {"phase": ["new", {"deep": [[[1e300, -0.0, None, ""]]]}]}, "person": {}, "number": "x"}
        chain.deliver([Delivery("vm-1", [split({**said(user), **extra}) for user in odd])])
        for user in set(odd) - {"a\x00b"}:  # SQLite ends a text of JSON there
            assert [one.record["user"] for one in each(chain, Wanted(user=user))] == [user]
    assert len(answer(cli, "tail", "-n", "6")) == 6
    assert answer(cli, "verify")["whole"]


@pytest.mark.parametrize(
    "count",
    [
        100_000,
        pytest.param(1_000_000, marks=[pytest.mark.long, pytest.mark.timeout(600)]),
        pytest.param(10_000_000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_a_search_by_user_and_day_takes_less_than_a_second(cli: Broker, count: int) -> None:
    SqliteStore(cli.directory / "db").close()
    with closing(Chain(cli.directory / "audit")) as chain:
        for first in range(0, count, 5000):
            entries = [split(said(f"user{n % 500}", odd={"n": [n]})) for n in range(first, first + 5000)]
            chain.deliver([Delivery(f"vm-{first % 7}", entries)])
        for path in chain.segments():
            Index(path).close()  # as the broker does every few seconds
        began = time.thread_time()  # what others on this machine take does not count
        found = list(each(chain, Wanted(user="user7", received_since=time.time() - DAY_S)))
        took = time.thread_time() - began
    assert len(found) == count // 500
    assert took < 1
