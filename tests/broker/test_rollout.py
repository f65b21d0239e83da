"""How far a change has come, and whether more is denied since: what guests say, ``rollout``, and the metrics."""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from persona_broker.policy.rollout import Denials, Moved, Seen, Taken, moved, taken
from persona_broker.spread import Newest
from persona_broker.store import rollout
from persona_broker.store.sqlite import SqliteStore

from persona.codec import Record
from persona.health import Report, encode_report
from persona.problems import Reason
from tests.broker.conftest import VM, Broker, apply
from tests.broker.test_apply import persona, policy, write
from tests.broker.test_database import documents


@pytest.fixture
def store(cli: Broker) -> Iterator[SqliteStore]:
    with closing(SqliteStore(cli.directory / "db")) as store:
        yield store


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


def test_denials_since_a_change_against_those_before(cli: Broker, store: SqliteStore) -> None:
    store.add_guest("vm")
    apply(store, documents("ls"))
    with store.writing() as db:
        db.execute("UPDATE change_sets SET at = at - 3600")
    (change,) = store.history(1)
    for offset in range(4):
        store.add_records("vm", [denied(change.at - 100 - offset), denied(change.at + offset)] * 10, 0)
    store.add_records("vm", [denied(change.at + 1, Reason.OUTSIDE_HOURS)] * 12, 0)
    store.add_records("vm", [denied(change.at - 9000, Reason.OUTSIDE_HOURS)] * 500, 0)  # longer ago than is compared
    with store.writing() as db:
        db.execute("INSERT INTO records (guest, body) VALUES ('vm', '{torn')")
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
    found = Newest(store).look(time.time())
    assert found is not None and [item.reason for item in found.denials if item.surge] == ["outside_hours"]


def test_records_that_do_not_go_back_so_far_say_how_far(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "RECORDS_MAX", 10)
    store.add_records("vm", [denied(100.0 + number) for number in range(30)], 0)
    assert store.denials(0, 200) == Denials(80, {"no_matching_policy": 10})
    assert store.denials(0, 110) == Denials(0, {})
    assert store.denials(125, 200) == Denials(75, {"no_matching_policy": 5})


def test_a_change_that_an_older_version_made_has_no_rollout(cli: Broker, store: SqliteStore) -> None:
    assert Newest(store).look(1.0) is None
    apply(store, documents("ls"))
    with store.writing() as db:
        db.execute("UPDATE change_sets SET generation = NULL")
    assert "did not write down when it took effect" in cli.run("rollout").stderr
    assert Newest(store).look(1.0) is None


def test_a_guest_that_is_removed_is_forgotten(store: SqliteStore) -> None:
    store.add_guest("vm")
    store.put_told({"vm": 3, "stranger": 3}, 1.0)
    store.put_asked({"vm": 2}, 2.0)
    store.put_told({"vm": 2}, 4.0)  # of two streams the older one
    assert store.seen() == {"vm": Seen(3, 4.0, 2, 2.0)}
    store.add_guest("vm", "another token")
    store.remove_guest("vm")
    assert store.seen() == {}


def until(look: Callable[[], Any], wanted: object) -> None:
    deadline = time.monotonic() + 15
    while (found := look()) != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found == wanted


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
        generation = json.loads(response.readline())["generation"]
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
