"""The audit's chain: what is appended is there once, in one order, and every edit of it is found."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.format import Entry, Stream, split
from persona_broker.audit.core.streams import Gap
from persona_broker.audit.delivery import Delivery, Kept
from persona_broker.audit.search import Wanted, each
from persona_broker.audit.segment import Segment
from persona_broker.audit.verify import verify

from tests.broker.conftest import VM, Broker, environment

MACHINE, BOOT = "a" * 32, "b" * 32
STREAM = Stream(MACHINE, BOOT)
DAY_S = 86400.0
BEGAN = 1_790_000_000.0  # 2026-09-21


class Clock:
    """A clock that is set by hand."""

    def __init__(self, now: float = BEGAN) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def said(user: str = "alice", **more: Any) -> dict[str, Any]:
    """RECORD of docs/protocol.md."""
    return {
        "at": 1.5, "session": "s-1", "user": user, "program": "/usr/bin/ls", "argv": ["ls", "-l"],
        "decision": "granted", "reason": None, "persona": "A", "persona_version": 1, "policy": "a", "event": "exec",
        "leased": False, "complain": False, **more,
    }  # fmt: skip


def numbered(*numbers: int, **more: Any) -> list[Entry]:
    return [split(said(**more), number) for number in numbers]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def chain(tmp_path: Path, clock: Clock) -> Iterator[Chain]:
    with closing(Chain(tmp_path / "audit", clock)) as chain:
        yield chain


def deliver(chain: Chain, *entries: Entry, guest: str = VM, stream: Stream | None = STREAM) -> Kept:
    (kept,) = chain.deliver([Delivery(guest, entries, stream)])
    return kept


def findings(chain: Chain) -> list[tuple[str, str | None, int | None]]:
    return [(item.kind, item.segment, item.number) for item in verify(chain, ()).findings]


def counters(chain: Chain) -> list[int | None]:
    found = []
    for path in chain.segments():
        with closing(Segment(path)) as segment:
            found += [row.counter for row in segment.read(0) if row.guest is not None]
    return found


def test_what_was_appended_is_a_whole_chain(chain: Chain, clock: Clock) -> None:
    for day in range(3):
        clock.now = BEGAN + day * DAY_S
        deliver(chain, *numbered(*range(10 * day + 1, 10 * day + 11)))
        deliver(chain, split(said("bob")), stream=None, guest="other")
    assert [path.name for path in chain.segments()] == ["2026-09-21.db", "2026-09-22.db", "2026-09-23.db"]
    found = verify(chain, ())
    assert (found.findings, found.number, found.number) == ([], found.records, chain.head()[0])
    assert found.records == 3 * 11 + 3 + 2  # what opens each, and what seals two
    assert counters(chain).count(None) == 3
    assert [one.record for one in each(chain, Wanted(user="bob"))] == [said("bob")] * 3


def test_a_number_counts_once_and_with_another_content_is_kept_and_told(chain: Chain, clock: Clock) -> None:
    assert deliver(chain, *numbered(1, 2, 3)) == Kept(3, 0, ())
    assert deliver(chain, *numbered(2, 3, 4)) == Kept(1, 2, ())
    clock.now += DAY_S  # the first ones are in yesterday's file by now
    assert deliver(chain, *numbered(4, 5)) == Kept(1, 1, ())
    assert findings(chain) == []
    assert deliver(chain, *numbered(2, user="mallory")) == Kept(1, 0, (2,))
    assert deliver(chain, *numbered(2, user="mallory"), *numbered(2)) == Kept(0, 2, ())  # both are known
    assert [(kind, segment) for kind, segment, _ in findings(chain)] == [("conflict", "2026-09-22.db")]
    assert counters(chain) == [1, 2, 3, 4, 5, 2]
    # another guest, machine or boot has numbers of its own
    assert deliver(chain, *numbered(2), guest="other").conflicts == ()
    assert deliver(chain, *numbered(1, 2), stream=Stream(MACHINE, "c" * 32)) == Kept(2, 0, ())


def test_the_same_in_the_words_of_another_version_is_no_conflict(chain: Chain) -> None:
    shuffled = dict(reversed(said().items()))
    deliver(chain, split(shuffled, 1))
    assert deliver(chain, *numbered(1)) == Kept(0, 1, ())


def test_gaps_are_proven_and_markers_explain_them(chain: Chain, clock: Clock) -> None:
    deliver(chain, *numbered(2, 3, 7))
    clock.now += DAY_S
    lost = {"first": 5, "last": 6, "why": "spool full"}
    marker = split(said(event="lost", lost=lost), 8, Gap(5, 6, "spool full"))
    deliver(chain, marker, *numbered(12))
    texts = [item.text for item in verify(chain, ()).findings]
    assert [text.partition(" of ")[0] for text in texts] == ["number 1", "number 4", "numbers 9 to 11"]
    assert {(item.kind, item.vm) for item in verify(chain, ()).findings} == {("lost", VM)}
    deliver(chain, *numbered(1, 4, 9, 10, 11))  # they were late
    deliver(chain, *numbered(5))  # even what the guest thought lost
    assert findings(chain) == []


def test_what_guests_call_like_the_broker_s_own_is_theirs(chain: Chain) -> None:
    deliver(chain, split(said(conflict_with=7, lost={"first": 1, "last": 99, "why": "x"}), 5))
    assert [item.text[:14] for item in verify(chain, ()).findings] == ["numbers 1 to 4"]
    (found,) = each(chain, Wanted())
    assert "conflict_with" not in found.row.facts and "lost" not in found.row.facts


def test_a_stream_of_many_gaps_and_many_streams_are_bounded(
    chain: Chain, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persona_broker.audit.segment.GAPS_MAX", 5)
    monkeypatch.setattr("persona_broker.audit.segment.STREAMS_MAX", 3)
    deliver(chain, *numbered(*range(2, 40, 2)))
    for boot in range(6):
        deliver(chain, *numbered(1), stream=Stream(MACHINE, f"{boot:032x}"))
    clock.now += DAY_S
    deliver(chain, *numbered(2), stream=Stream(MACHINE, f"{5:032x}"))
    assert len(verify(chain, ()).findings) == 19  # all the same
    with closing(Segment(chain.segments()[-1])) as segment:
        assert segment.rows("SELECT count(*) FROM streams") == [(3,)]
    with closing(Segment(chain.segments()[0])) as segment:
        assert segment.rows("SELECT count(*) FROM gaps") == [(5,)]


def test_sealed_segments_become_plain_files_that_can_be_read_anywhere(
    chain: Chain, clock: Clock, tmp_path: Path
) -> None:
    for _ in range(3):
        deliver(chain, *numbered(1))
        clock.now += DAY_S
    before = verify(chain, ())
    chain.settle()
    sealed = chain.segments()[:-1]
    assert {path.name for path in (tmp_path / "audit").glob("*-wal")} <= {f"{chain.segments()[-1].name}-wal"}
    assert [path.read_bytes()[18:20] for path in sealed] == [b"\1\1"] * 2
    assert (verify(chain, ()).hash, verify(chain, ()).findings) == (before.hash, [])
    with closing(sqlite3.connect(sealed[0])) as db:  # somebody looks at one: the others go on
        db.execute("BEGIN IMMEDIATE")
        chain.settle()
    deliver(chain, *numbered(2))
    assert findings(chain) == []


def test_what_killed_processes_left_goes(chain: Chain, clock: Clock, tmp_path: Path) -> None:
    chain.add([])
    for name, age_s in ((".2026-09-21.1.a", 7200.0), (".2026-09-21.2.b", 60.0)):
        (tmp_path / "audit" / name).touch()
        os.utime(tmp_path / "audit" / name, (clock.now - age_s, clock.now - age_s))
    chain.sweep()
    assert [path.name for path in (tmp_path / "audit").iterdir() if path.name.startswith(".")] == [".2026-09-21.2.b"]


def test_a_clock_that_goes_back_reopens_nothing(chain: Chain, clock: Clock) -> None:
    deliver(chain, *numbered(1))
    clock.now += 3 * DAY_S
    deliver(chain, *numbered(2))
    clock.now -= 2 * DAY_S
    deliver(chain, *numbered(3))
    assert [path.stem for path in chain.segments()] == ["2026-09-21", "2026-09-24"]
    assert findings(chain) == []
    clock.now += 5 * DAY_S
    deliver(chain, *numbered(4))
    assert counters(chain) == [1, 2, 3, 4]
    assert findings(chain) == []


def test_threads_and_processes_make_one_order(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from tests.broker.test_audit_chain import Chain, Stream, deliver, numbered
number = int(sys.argv[2])
chain = Chain(Path(sys.argv[1]))
for first in range(1, 100, 20):
    deliver(chain, *numbered(*range(first, first + 20)), guest=f"vm-{number}")
"""
    run = [sys.executable, "-c", program, str(tmp_path / "audit")]
    processes = [subprocess.Popen([*run, str(number)], env=_tests()) for number in range(4)]
    chain = Chain(tmp_path / "audit")
    threads = [
        threading.Thread(target=lambda n=n: [deliver(chain, *numbered(i), guest=f"t-{n}") for i in range(1, 11)])
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait(60) for process in processes] == [0] * 4
    found = verify(chain, ())
    assert (found.findings, found.records) == ([], 1 + 4 * 100 + 8 * 10)


def _tests() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    found = environment()
    return {**found, "PYTHONPATH": f"{found['PYTHONPATH']}:{root}/tests"}


def test_over_http_with_numbers(broker: Broker) -> None:
    stream = {"machine": MACHINE, "boot": BOOT}
    body = {"stream": stream, "records": [said(number=1), said(number=3)], "lost": 0}
    for _ in range(2):
        assert broker.call("POST", "/v1/records", body) == (204, b"")
    chain = Chain(broker.directory / "audit")
    assert counters(chain) == [1, 3]

    def lost() -> int:
        return int(broker.call("GET", "/metrics")[1].split(b"\npersona_broker_records_lost_total ")[1].split()[0])

    before = lost()
    marker = said(number=4, event="lost", lost={"first": 2, "last": 2, "why": "spool full"})
    bad = [
        said(),
        said(number=0),
        said(number="x"),
        {**marker, "number": 5, "lost": {"first": 3, "last": 2, "why": ""}},
    ]
    status, answer = broker.call("POST", "/v1/records", {**body, "records": [marker, *bad, said(number=6)]})
    assert (status, [refused["index"] for refused in answer["refused"]]) == (200, [1, 2, 3, 4])
    assert counters(chain) == [1, 3, 4, 6]
    assert lost() == before + 1
    assert broker.call("POST", "/v1/records", {**body, "records": [marker]}) == (204, b"")
    assert lost() == before + 1  # it is the same marker
    assert [item.text[:8] for item in verify(chain, ()).findings] == ["number 5"]
    for wrong in ({"machine": "x", "boot": BOOT}, {"machine": MACHINE}, {**stream, "moon": 1}, "x"):
        assert broker.call("POST", "/v1/records", {**body, "stream": wrong})[0] == 400
    changed = {**body, "records": [said("mallory", number=3)]}
    assert broker.call("POST", "/v1/records", changed) == (204, b"")
    assert b"audit_conflicts_total 1" in broker.call("GET", "/metrics")[1]
    assert counters(chain) == [1, 3, 4, 6, 3]
    shown = json.loads(broker.run("records", "tail", "--json", "-n", "1").stdout)
    contradicted = [row.number for row in chain.read(0, 1000) if row.counter == 3]
    assert (shown["user"], shown["conflict_with"]) == ("mallory", contradicted[0])
