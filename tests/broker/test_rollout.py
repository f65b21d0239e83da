"""How far a change has come, and whether more is denied since: what guests say, ``rollout``, and the metrics."""

import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from persona_broker.api.guests import Asked
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.format import split
from persona_broker.audit.delivery import Delivery
from persona_broker.audit.denials import COUNT, denials
from persona_broker.audit.index import Index
from persona_broker.policy.rollout import Denials, Moved, Seen, Taken, moved, taken
from persona_broker.spread import Newest
from persona_broker.store.interface import StoreError
from persona_broker.store.sqlite import SqliteStore

from persona.health import Report, encode_report
from persona.problems import Reason
from persona.record_codec import Record, encode_record
from tests.broker.conftest import VM, Broker, apply
from tests.broker.test_apply import persona, policy, write
from tests.broker.test_database import documents


@pytest.fixture
def store(cli: Broker) -> Iterator[SqliteStore]:
    with closing(SqliteStore(cli.directory / "db")) as store:
        yield store


@pytest.fixture
def chain(cli: Broker) -> Iterator[Chain]:
    with closing(Chain(cli.directory / "audit")) as chain:
        yield chain


def tell(chain: Chain, records: list[Record]) -> None:
    chain.deliver([Delivery("vm", [split(encode_record(record)) for record in records])])


def denied(at: float, reason: Reason = Reason.NO_MATCHING_POLICY) -> Record:
    return Record(at, "s", "alice", "/x", ("x",), "denied", reason, "A", 1, "a", "exec", False, False)


@pytest.mark.parametrize(
    ("seen", "state"),
    [(None, Taken.NEVER), (Seen(6, 1.0, 6, 1.0), Taken.BEHIND), (Seen(7, 1.0), Taken.TOLD),
     (Seen(0, None, 7), Taken.TAKEN), (Seen(9, 1.0, 8, 1.0), Taken.TAKEN)],
)  # fmt: skip
def test_what_a_guest_has(seen: Seen | None, state: Taken) -> None:
    assert taken(seen, 7) is state


@pytest.mark.parametrize(
    ("expected", "since", "surge"), [(0.0, 9, False), (0.0, 10, True), (100.0, 150, False), (100.0, 200, True)]
)
def test_what_a_surge_is(expected: float, since: int, surge: bool) -> None:
    assert Moved("x", expected, since).surge is surge


def test_what_is_expected_is_the_rate_of_before() -> None:
    found = moved(Denials(100, {"a": 10, "b": 1}), Denials(50, {"a": 30, "c": 40}))
    assert [(item.reason, item.expected, item.since) for item in found] == [("c", 0, 40), ("a", 5, 30), ("b", 0.5, 0)]
    assert moved(Denials(0, {}), Denials(50, {"a": 30}))[0].expected == 0


def test_denials_since_a_change_against_those_before(cli: Broker, store: SqliteStore, chain: Chain) -> None:
    store.add_guest("vm")
    apply(store, documents("ls"))
    with store.writing() as db:
        db.execute("UPDATE change_sets SET at = at - 3600")
    (change,) = store.history(1)
    for offset in range(4):
        tell(chain, [denied(change.at - 100 - offset), denied(change.at + offset)] * 10)
    tell(chain, [denied(change.at + 1, Reason.OUTSIDE_HOURS)] * 12)
    tell(chain, [denied(change.at - 9000, Reason.OUTSIDE_HOURS)] * 500)  # longer ago than is compared
    tell(chain, [replace(denied(change.at + 1), decision="granted", reason=None)] * 30)
    done = cli.run("rollout", "--json")
    value = json.loads(done.stdout)
    assert value["denials"] == [
        {"reason": "no_matching_policy", "since": 40, "expected": 40, "surge": False},
        {"reason": "outside_hours", "since": 12, "expected": 0, "surge": True},
    ]
    assert (done.returncode, value["without"], value["revision"]) == (1, ["vm"], 1)
    assert value["since_s"] == value["before_s"] == pytest.approx(3600, abs=60)
    text = cli.run("rollout", "1").stdout
    assert "  vm  was never connected\nguests that have it: 0 of 1\n" in text
    assert "  outside_hours: 12, expected 0  ! a surge: 'persona-broker records tail --reason outside_hours'" in text
    assert cli.run("rollout", "2").returncode == 1
    found = Newest(store, partial(denials, chain)).look(time.time())
    assert found is not None and [item.reason for item in found.denials if item.surge] == ["outside_hours"]


@pytest.mark.parametrize(("days", "count"), [(0, 1), (1, 1), (3, 0)])
def test_denials_are_counted_by_the_clock_of_the_guest_in_the_days_when_they_can_come(
    tmp_path: Path, days: int, count: int
) -> None:
    made, now = 1e9, [1e9 + days * 86400]
    with closing(Chain(tmp_path / "audit", lambda: now[0])) as chain:
        tell(chain, [denied(made)])
        now[0] += 86400  # what is in later files is no matter of theirs
        tell(chain, [denied(made + 86400 * 9)])
        assert denials(chain, made, made + 1) == Denials(1, {"no_matching_policy": 1} if count else {})
        assert denials(chain, made - 1, made) == Denials(1, {})


def test_counting_denials_reads_an_index_alone(chain: Chain) -> None:
    tell(chain, [denied(1e9)])
    with closing(Index(chain.segments()[0])) as index:
        plan = [row[-1] for row in index.rows(f"EXPLAIN QUERY PLAN {COUNT}", 0, 1)]
    assert plan[0] == "SEARCH entries USING COVERING INDEX entries_denied (decision=? AND at>? AND at<?)"


def test_who_scrapes_does_not_wait_for_an_index(store: SqliteStore, chain: Chain) -> None:
    apply(store, documents("ls"))
    tell(chain, [denied(time.time())] * 20)
    few = partial(denials, chain, behind_max=10)
    with pytest.raises(sqlite3.OperationalError, match="21 records behind"):
        few(0, time.time() + 60)
    assert Newest(store, few).look(time.time()) is None  # and a line in the log
    Index(chain.segments()[0]).close()
    found = Newest(store, few).look(time.time() + 1)
    assert found is not None and found.since.by_reason == {"no_matching_policy": 20}


def test_a_change_that_an_older_version_made_has_no_rollout(cli: Broker, store: SqliteStore, chain: Chain) -> None:
    assert Newest(store, partial(denials, chain)).look(1.0) is None
    apply(store, documents("ls"))
    with store.writing() as db:
        db.execute("UPDATE change_sets SET generation = NULL")
    assert "did not write down when it took effect" in cli.run("rollout").stderr
    assert Newest(store, partial(denials, chain)).look(1.0) is None


def test_a_guest_that_is_removed_is_forgotten(store: SqliteStore) -> None:
    store.add_guest("vm")
    store.put_told({"vm": 3, "stranger": 3}, 1.0)
    store.put_asked({"vm": 2}, 2.0)
    store.put_told({"vm": 2}, 4.0)  # of two streams the older one
    assert store.seen() == {"vm": Seen(3, 4.0, 2, 2.0)}
    store.add_guest("vm", "another token")
    store.remove_guest("vm")
    assert store.seen() == {}


def test_what_could_not_be_written_down_is_the_next_time(store: SqliteStore, tmp_path: Path) -> None:
    store.add_guest("vm")
    asked, closed = Asked(), SqliteStore(tmp_path / "db")
    closed.close()
    asked.note("vm", 3)
    asked.note("vm", 2)
    with pytest.raises(StoreError):
        asked.write_down(closed, 1.0)
    assert store.seen() == {}
    asked.write_down(store, 2.0)
    asked.write_down(store, 3.0)  # nothing is new
    assert store.seen() == {"vm": Seen(0, None, 3, 2.0)}


def until(look: Callable[[], Any], wanted: object) -> None:
    deadline = time.monotonic() + 15
    while (found := look()) != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found == wanted


@pytest.mark.long
def test_guests_of_a_served_broker(broker: Broker, tmp_path: Path) -> None:
    def state() -> str:
        (guest,) = json.loads(broker.run("rollout", "--json").stdout)["guests"]
        return str(guest["state"])

    def metric() -> str:
        text = broker.call("GET", "/metrics")[1].decode()
        return "".join(re.findall(r"^persona_broker_guests_behind (.*)$", text, re.MULTILINE))

    assert (state(), metric()) == ("never", "1")
    connection, response = broker.stream()
    try:
        response.readline()
        until(state, "told")
        file = write(tmp_path / "x.yaml", persona("X"), policy("x", "xavier", "X") | {"order": 9})
        assert broker.run("apply", file).returncode == 0
        with closing(SqliteStore(broker.directory / "db")) as store:
            generation = store.generation()
        until(state, "told")
        request = {
            "subject": {"user": "alice", "groups": [], "vm": VM}, "session": "s", "argv": ["ls"], "cwd": "/",
            "program": {"path": "/usr/bin/ls", "names": ["ls"], "paths": ["/usr/bin/ls"]}, "argv_complete": True,
        }  # fmt: skip
        deadline = time.monotonic() + 15
        while state() != "taken" and time.monotonic() < deadline:  # by whichever worker takes its report
            for _ in range(4):
                broker.call("POST", "/v1/decisions", {"request": request, "min_generation": generation})
            broker.call("POST", "/v1/health", encode_report(Report()))
            time.sleep(0.5)
        assert state() == "taken"
        done = broker.run("rollout")
        assert (done.returncode, "guests that have it: 1 of 1" in done.stdout) == (0, True), done.stdout
    finally:
        connection.close()
