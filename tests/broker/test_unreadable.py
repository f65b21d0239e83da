"""Stored documents that today's checks refuse: each grants nothing, and takes nothing else down with it."""

import json
import shutil
import sqlite3
import zoneinfo
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from persona_broker.policy.conditions import ConditionState, Unmet
from persona_broker.policy.snapshot import Snapshot
from persona_broker.policy.unreadable import PROBLEM_MAX, Unreadable
from persona_broker.store.sqlite import SqliteStore
from persona_broker.view import State

from persona import wire
from persona.decisions import Decision, Denied, Granted, Subject
from persona.documents import parse_document
from persona.problems import AnyReason, Reason
from persona.wire import Effect, NewField
from tests.broker.conftest import VM, Broker, apply
from tests.broker.test_snapshot import CLEAR, ask, persona, policy

NIGHT = {"hours": "22:00-06:00 Europe/Berlin"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "db")
    yield store
    store.close()


def put(store: SqliteStore, *documents: dict[str, Any]) -> None:
    apply(store, [parse_document(document) for document in documents])


def damage(store: SqliteStore, kind: str, name: str, body: object) -> None:
    """As another version of the broker, or a bad disk, would have left it."""
    text = body if isinstance(body, (str, bytes)) or body is None else json.dumps(body)
    with store.writing() as db:
        if text is None:
            db.execute("DELETE FROM documents WHERE kind = ? AND name = ?", (kind, name))
        else:
            db.execute("UPDATE documents SET body = ? WHERE kind = ? AND name = ?", (text, kind, name))
        db.execute("UPDATE meta SET value = value + 1 WHERE key = 'generation'")
    store._parsed.clear()  # as in a process that begins


def decide(found: Snapshot, name: str = "ls", user: str = "alice", condition_state: ConditionState = CLEAR) -> Decision:
    return found.decide(ask(name, user=user), condition_state)


def why(decision: Decision) -> tuple[AnyReason, str | None]:
    assert isinstance(decision, Denied)
    return decision.reason, decision.policy


BODIES: list[object] = [
    "", "{", "[" * 100_000, "null", "7", '"text"', "[]", "{}", b"\xff\xfe", "1e999", "9" * 5000, None,
    {"kind": "Quota", "name": "first"}, {"kind": "Persona", "name": "first", "command_whitelist": ["./x"]},
    {"kind": "Policy", "name": "other", "subjects": {"users": ["alice"]}, "persona": "A"},
    {"kind": "Policy", "name": "first", "subjects": ["alice"], "persona": "A"},
    {"kind": "Policy", "name": "first", "subjects": {"users": [{}, 7]}, "persona": ["A"]},
    {"kind": "Policy", "name": "first", "subjects": {"users": ["alice"]}, "persona": "A", "when": [], "vms": 7},
    {"kind": "Policy", "name": "first", "subjects": {"users": ["alice"]}, "persona": "A", "when": {"hours": {}}},
    {"kind": "Policy", "name": "first", "subjects": {"users": ["alice"]}, "persona": "A", "commands": [{}]},
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda body: str(body)[:40])
@pytest.mark.parametrize("kind", ["Persona", "Policy"])
def test_whatever_is_stored_others_are_decided_and_it_grants_nothing(
    store: SqliteStore, kind: str, body: object
) -> None:
    put(
        store,
        persona("first", "ls"),
        persona("B", "ls"),
        policy("first", "first"),
        policy("second", "B", subjects={"users": ["bob"]}),
    )
    damage(store, kind, "first", body)
    found = State(store, 15).current().snapshot
    assert isinstance(decide(found, user="bob"), Granted)
    assert isinstance(decide(found, user="alice"), Denied)
    assert [(item.kind, item.name) for item in found.unreadable] == [(kind, "first")]
    assert 0 < len(found.unreadable[0].problem) <= PROBLEM_MAX
    assert found.unreadable[0].problem.isprintable()


def test_a_persona_that_cannot_be_read_denies_and_does_not_let_a_wider_one_speak(store: SqliteStore) -> None:
    put(
        store,
        persona("Narrow", "ls"),
        persona("Wide", "**"),
        policy("narrow", "Narrow", commands=["ls", "git"]),
        policy("wide", "Wide", subjects={"users": ["*"]}),
    )
    damage(store, "Persona", "Narrow", {**persona("Narrow", "ls"), "sandbox": "strict"})
    found = store.snapshot()
    refused = decide(found)
    assert why(refused) == (Reason.INVALID_PERSONA, "narrow")
    assert isinstance(refused, Denied)
    assert "persona Narrow of policy narrow cannot be read: sandbox: unknown field" in refused.help
    assert why(decide(found, "git"))[0] is Reason.INVALID_PERSONA  # whether it would have allowed it is not known
    assert isinstance(decide(found, "id"), Granted)  # it does not speak for it
    assert isinstance(decide(found, user="bob"), Granted)
    off = ConditionState(2, {"narrow": Unmet(Reason.OUTSIDE_HOURS, "later")})
    assert isinstance(decide(found, condition_state=off), Granted)  # its own words: now the next one speaks


def test_one_that_comes_before_goes_on_granting(store: SqliteStore) -> None:
    put(store, persona("A", "ls"), persona("B", "ls"), policy("a", "A"), policy("b", "B"))
    damage(store, "Persona", "B", "{")
    assert isinstance(decide(store.snapshot()), Granted)


@pytest.mark.parametrize(
    ("changed", "program", "user", "denied"),
    [
        ({"colour": "red"}, "ls", "alice", True),
        ({"colour": "red"}, "git", "alice", False),  # it is for ls only
        ({"colour": "red"}, "ls", "bob", False),
        ({"commands": ["ls", "./x"]}, "git", "alice", True),  # for which commands is not known
        ({"vms": ["vm-2"], "colour": "red"}, "ls", "alice", False),
        ({"vms": 7}, "ls", "alice", True),
        ({"subjects": {"users": ["alice", "a b"]}}, "ls", "alice", True),
        ({"when": {"hours": "Mon-Fri 08:00-18:00 Moon/Base"}}, "ls", "alice", False),  # a condition: does not hold
        ({"when": {"moon": "full"}}, "ls", "alice", False),
    ],
)
def test_a_policy_that_cannot_be_read(
    store: SqliteStore, changed: dict[str, Any], program: str, user: str, denied: bool
) -> None:
    first = policy("first", "A", commands=["ls"])
    put(store, persona("A", "ls"), persona("Wide", "**"), first, policy("wide", "Wide", subjects={"users": ["*"]}))
    damage(store, "Policy", "first", {**first, **changed})
    decision = decide(store.snapshot(), program, user)
    if denied:
        assert why(decision) == (Reason.INVALID_POLICY, "first")
    else:
        assert isinstance(decision, Granted)
        assert decision.policy == "wide"


def test_conditions_that_can_be_read_count(store: SqliteStore) -> None:
    first = policy("first", "A", when=NIGHT)
    put(store, persona("A", "ls"), first, policy("wide", "A"))
    damage(store, "Policy", "first", {**first, "colour": "red"})
    found = store.snapshot()
    assert list(found.conditions.values()) == [("first",)]
    assert why(decide(found)) == (Reason.INVALID_POLICY, "first")
    assert isinstance(
        decide(found, condition_state=ConditionState(2, {"first": Unmet(Reason.OUTSIDE_HOURS, "later")})), Granted
    )


def test_a_user_of_one_logs_in_and_is_under_no_later_persona(store: SqliteStore) -> None:
    first = policy("first", "A")
    put(store, persona("A", "ls"), first, policy("wide", "A", subjects={"users": ["*"]}))
    damage(store, "Policy", "first", {**first, "colour": "red"})
    found = store.snapshot()
    alice, bob = (found.admit(Subject(user, (), VM), CLEAR) for user in ("alice", "bob"))
    assert alice.admitted
    assert alice.entry is None
    assert bob.entry is not None and bob.entry.policy.name == "wide"


def test_the_same_document_applied_again_mends_it(store: SqliteStore) -> None:
    documents = persona("A", "ls"), policy("a", "A")
    for body in ("{", None):
        put(store, *documents)
        version = store.documents()[0][1]
        damage(store, "Persona", "A", body)
        parsed = [parse_document(document) for document in documents]
        assert store.plan(parsed).changes.changed == ("Persona A",)
        assert apply(store, parsed).changed == ("Persona A",)
        assert store.documents()[0] == (parsed[0], version + 1)  # guests keep a version for good
        assert not apply(store, parsed)


def test_a_row_written_otherwise_is_no_change(store: SqliteStore) -> None:
    put(store, persona("A", "ls"), policy("a", "A"))
    damage(store, "Persona", "A", json.dumps(persona("A", "ls"), indent=1))  # readable, the same in other words
    assert not store.plan([parse_document(document) for document in (persona("A", "ls"), policy("a", "A"))]).changes


def test_it_is_logged_once_and_when_it_is_over(store: SqliteStore, caplog: pytest.LogCaptureFixture) -> None:
    put(store, persona("A", "ls"), policy("a", "A"))
    damage(store, "Persona", "A", "{")
    for _ in range(3):
        store.snapshot()
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "Persona A (version 1) cannot be read"
    ]
    put(store, persona("A", "ls"), policy("a", "A"))
    store.snapshot()
    assert "Persona A is read again" in caplog.records[-1].getMessage()


def test_tzdata_may_go_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zone is read with its policy, not once more each time its hours are looked at."""
    zones = tmp_path / "zones"
    (zones / "Our").mkdir(parents=True)
    shutil.copy("/usr/share/zoneinfo/Europe/Berlin", zones / "Our" / "Zone")
    zoneinfo.reset_tzpath([str(zones), "/usr/share/zoneinfo"])
    try:
        store = SqliteStore(tmp_path / "db")
        put(store, persona("A", "ls"), policy("a", "A", when={"hours": "00:00-24:00 Our/Zone"}))
        state = State(store, 15)
        shutil.rmtree(zones)
        zoneinfo.ZoneInfo.clear_cache()
        monkeypatch.setattr("persona_broker.view._JUDGE_EVERY_S", 0.0)
        monkeypatch.setattr("persona_broker.view._CHECK_EVERY_S", 0.0)
        view = state.current()
        assert isinstance(view.snapshot.decide(ask("ls"), view.condition_state), Granted)
        store.raise_generation()  # read anew from memory
        assert state.current().snapshot.unreadable == ()
    finally:
        zoneinfo.reset_tzpath()


@pytest.mark.parametrize("cut", [0, 3, 30, 50, 100])
def test_a_zone_file_that_is_cut_is_unknown(tmp_path: Path, cut: int) -> None:
    (tmp_path / "Cut").mkdir()
    (tmp_path / "Cut" / "Zone").write_bytes(Path("/usr/share/zoneinfo/Europe/Berlin").read_bytes()[:cut])
    zoneinfo.reset_tzpath([str(tmp_path)])
    try:
        with SqliteStore(tmp_path / "db").reading():
            store = SqliteStore(tmp_path / "db")
            put(store, persona("A", "ls"), policy("a", "A"))
            damage(store, "Policy", "a", policy("a", "A", when={"hours": "00:00-24:00 Cut/Zone"}))
            (item,) = (found for found, _ in store.documents() if isinstance(found, Unreadable))
        assert "unknown time zone 'Cut/Zone'" in item.problem
    finally:
        zoneinfo.reset_tzpath()


@pytest.mark.parametrize("key", ["sample", "latches", "load_set"])
@pytest.mark.parametrize("value", ["{", "7", "[7]", '{"at": []}', "null"])
def test_a_load_that_cannot_be_read_is_not_known(store: SqliteStore, key: str, value: str) -> None:
    loaded = policy("a", "A", when={"host_load": {"cpu": {"below": 70}}})
    put(store, persona("A", "ls"), loaded, policy("b", "A", subjects={"users": ["bob"]}))
    with store.writing() as db:
        db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
    view = State(store, 15).current()
    assert isinstance(view.snapshot.decide(ask("ls", user="bob"), view.condition_state), Granted)
    assert why(view.snapshot.decide(ask("ls"), view.condition_state))[0] is Reason.LOAD_UNKNOWN
    assert store.set_load() == {}


def test_a_persona_that_an_older_agent_cannot_keep_grants_nothing_there(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "PERSONA_FIELDS", {"resource_limits.pids": NewField(2, Effect.RESTRICTS)})
    limited = {**persona("Limited", "ls"), "resource_limits": {"pids": 9}}
    put(store, limited, persona("Free", "ls", "cat"), policy("a", "Limited", commands=["ls"]), policy("b", "Free"))
    new = store.snapshot()
    old = new.for_wire(1)
    assert old is new.for_wire(1)
    assert new.for_wire(wire.CURRENT) is new
    assert isinstance(decide(new), Granted)
    denied = decide(old)  # and no later policy, without the limit, speaks for it
    assert isinstance(denied, Denied)
    assert why(denied) == (Reason.INVALID_PERSONA, "a")
    assert "does not know resource_limits.pids and cannot keep it; upgrade persona-guest" in denied.help
    assert isinstance(decide(old, "cat"), Granted)
    assert old.groups_in_use(VM) == new.groups_in_use(VM)
    admission = old.admit(Subject("alice", (), VM), CLEAR)
    assert (admission.admitted, admission.entry) == (True, None)


# --- a broker that serves -------------------------------------------------------------------------


@pytest.fixture
def served(cli: Broker, tmp_path: Path) -> Iterator[Broker]:
    """Three policies, the second of which another version wrote, and a persona that is damaged."""
    (tmp_path / "set.yaml").write_text(
        "{kind: Persona, name: Reader, command_whitelist: [ls]}\n---\n"
        "{kind: Persona, name: Broken, command_whitelist: [ls]}\n---\n"
        "{kind: Policy, name: office, subjects: {users: [ann]}, persona: Reader}\n---\n"
        "{kind: Policy, name: broken, subjects: {users: [cid]}, persona: Broken, commands: [ls]}\n---\n"
        "{kind: Policy, name: rest, subjects: {users: [bea, cid]}, persona: Reader}\n"
    )
    assert cli.run("apply", str(tmp_path / "set.yaml")).returncode == 0
    assert cli.run("check").returncode == 0
    office = {"kind": "Policy", "name": "office", "subjects": {"users": ["ann"]}, "persona": "Reader"}
    office["when"] = {"hours": "Mon-Fri 08:00-18:00 US/Nowhere"}
    with closing(sqlite3.connect(tmp_path / "db")) as db, db:
        db.execute("UPDATE documents SET body = ? WHERE name = 'office'", (json.dumps(office),))
        db.execute("UPDATE documents SET body = 'no JSON' WHERE name = 'Broken'")
    cli.start(applied=())
    yield cli
    cli.stop()


def test_a_broker_with_such_documents_serves_the_others(served: Broker) -> None:
    def asked(user: str) -> dict[str, Any]:
        program = {"path": "/usr/bin/ls", "names": ["ls"], "paths": ["/usr/bin/ls"]}
        request = {
            "subject": {"user": user, "groups": [], "vm": VM}, "session": f"s-{user}", "program": program,
            "argv": ["ls"], "cwd": "/", "argv_complete": True,
        }  # fmt: skip
        status, answer = served.call("POST", "/v1/decisions", {"request": request})
        assert status == 200
        return dict(answer)

    assert asked("bea")["decision"] == "granted"
    ann, cid = asked("ann"), asked("cid")
    assert ann["reason"] == "invalid_policy"
    assert "unknown time zone 'US/Nowhere'" in ann["help"]
    assert cid["reason"] == "invalid_persona"
    for user in ("ann", "cid"):
        session = {"session": f"s-{user}", "subject": {"user": user, "groups": [], "vm": VM}}
        opened = served.call("POST", "/v1/sessions", {**session, "service": "sshd", "remote": ""})
        assert opened[1]["admitted"]
        assert opened[1]["persona"] is None
    entry = served.call("GET", "/v1/sessions/s-ann/personas")[1]["entries"][0]
    assert (entry["holds"], entry["reason"], entry["persona"]) == (False, "invalid_policy", None)
    assert "US/Nowhere" in entry["detail"]
    holding = served.call("POST", "/v1/sessions/current", {"sessions": ["s-cid"]})[1]["sessions"]["s-cid"]["personas"]
    assert [(item["name"], item["commands"]) for item in holding] == [("Reader", ["**", "!ls"])]


def test_it_shows_them(served: Broker) -> None:
    assert served.call("GET", "/readyz")[1]["unreadable"] == 2
    text = served.call("GET", "/metrics")[1].decode()
    for kind, count in (("Persona", 1), ("Policy", 1), ("other", 0)):
        assert f'persona_broker_documents_unreadable{{kind="{kind}"}} {count}' in text
    status, problem = served.call("GET", "/v1/personas/Broken")
    assert (status, problem["code"]) == (422, "bad_document")
    assert served.call("GET", "/v1/personas/Reader/versions/1")[0] == 200
    listed = served.call("GET", "/v1/personas")[1]
    assert [item["document"]["name"] for item in listed["items"]] == ["Reader"]
    assert [item["name"] for item in listed["unreadable"]] == ["Broken"]
    assert [item["name"] for item in served.call("GET", "/v1/policies")[1]["unreadable"]] == ["office"]
    checked = served.run("check")
    assert checked.returncode == 1
    assert "Policy office (version 1) cannot be read: when.hours: unknown time zone 'US/Nowhere'" in checked.stdout
    problems = json.loads(served.run("check", "--json").stdout)["problems"]
    assert {(item["kind"], item["name"]) for item in problems} == {("Policy", "office"), ("Persona", "Broken")}
    explained = served.run("explain", "--user", "cid", "--vm", VM, "--", "ls")
    assert explained.returncode == 1
    assert (
        "denied, invalid_persona, policy broken (set.yaml:7): persona Broken of policy broken cannot be read"
        in explained.stdout
    )
    assert "it keeps the policies after it from being asked" in explained.stdout
