"""Where documents are written: told by history, show, diff, explain and decisions, and no part of what they say."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from persona_broker.policy.origin import FILE_MAX, Origin, origin
from persona_broker.policy_files.reader import load
from persona_broker.store.sqlite import SqliteStore
from persona_broker.view import State

from persona import codec, json_fields
from persona.decisions import Denied, Granted, Lease, PersonaRef, Program, Request, Subject, Width
from persona.problems import Reason
from tests.broker.conftest import Broker
from tests.broker.test_apply import persona, policy, write
from tests.broker.test_history import answer


@pytest.fixture
def store(cli: Broker) -> Iterator[SqliteStore]:
    store = SqliteStore(cli.directory / "db")
    yield store
    store.close()


FILES = """\
kind: Persona
name: A
command_whitelist: [ls]
---
# whose
kind: Policy
name: a
subjects: {users: [alice]}
persona: A
"""


def of_alice(store: SqliteStore) -> Callable[[str], Any]:
    state = State(store, 15)

    def decide(name: str) -> Any:
        view = state.current()
        program = Program(f"/usr/bin/{name}", (name,), (f"/usr/bin/{name}",))
        request = Request(Subject("alice", (), "vm-1"), "s", program, (name,), "/")
        return view.snapshot.decide(request, view.condition_state)

    return decide


def test_a_document_is_named_with_its_file_and_line(cli: Broker, tmp_path: Path) -> None:
    folder = tmp_path / "policies" / "teams"
    folder.mkdir(parents=True)
    (folder / "10-analysts.yaml").write_text(FILES)
    cli.run("apply", str(folder.parent))
    first = cli.run("history").stdout
    assert "        Persona A: added, version 1 (teams/10-analysts.yaml:1)\n" in first
    assert "        Policy a: added, version 1 (teams/10-analysts.yaml:6)\n" in first
    assert cli.run("show", "a").stdout.startswith("# Policy a, version 1 (teams/10-analysts.yaml:6)\n")
    ask = ("explain", "--user", "alice", "--vm", "vm-1", "--")
    lines = cli.run(*ask, "ls").stdout.splitlines()
    assert lines[0] == "granted under A, policy a (teams/10-analysts.yaml:6)"
    assert lines[1] == "  a (teams/10-analysts.yaml:6) -> A: applies"
    assert cli.run(*ask, "nmap").stdout.startswith("denied, no_matching_policy, policy a (teams/10-analysts.yaml:6): ")
    value = (
        answer(cli, *ask[:-1], "--json", "--", "ls")
        if False
        else json.loads(cli.run("explain", "--user", "alice", "--vm", "vm-1", "--json", "--", "ls").stdout)
    )
    assert value["decision"]["policy_origin"] == value["considered"][0]["origin"] == "teams/10-analysts.yaml:6"
    assert value["decision"]["policy_version"] == 1
    of_files = cli.run(
        "explain", "--user", "alice", "--vm", "vm-1", "--files", str(folder / "10-analysts.yaml"), "--", "ls"
    )
    assert of_files.stdout.startswith("granted under A, policy a (10-analysts.yaml:6)\n")  # a file by its name alone


def test_moving_a_document_raises_nothing_and_is_told_all_the_same(
    cli: Broker, store: SqliteStore, tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text(FILES)
    cli.run("apply", str(tmp_path / "a.yaml"))
    decide, generation = of_alice(store), store.generation()
    assert decide("ls").policy_origin == "a.yaml:6"
    (tmp_path / "a.yaml").write_text("# one line more\n" + FILES)
    assert cli.run("apply", str(tmp_path / "a.yaml")).stdout == "nothing changed\n"
    assert (store.generation(), store.revision()) == (generation, 1)
    assert str(store.origins()["Policy", "a"]) == "a.yaml:7"
    assert "(a.yaml:7)" in cli.run("history").stdout
    time.sleep(0.01)  # a view is so old at most
    assert decide("ls").policy_origin == "a.yaml:7"
    before = store.rows("SELECT value FROM meta WHERE key = 'moved'")
    cli.run("apply", str(tmp_path / "a.yaml"))
    assert store.rows("SELECT value FROM meta WHERE key = 'moved'") == before


def test_origins_are_those_of_the_revision(cli: Broker, store: SqliteStore, tmp_path: Path) -> None:
    cli.run("apply", write(tmp_path / "one.yaml", persona("A"), policy("a")))
    cli.run("apply", write(tmp_path / "two.yaml", persona("A", "cat"), policy("a")))
    assert cli.run("diff", "1").stdout.startswith("Persona A: version 1 -> 2 (two.yaml:1)\n")
    items = answer(cli, "history", "A")["items"]
    assert [(i["documents"][0]["file"], i["documents"][0]["line"]) for i in items] == [("two.yaml", 1), ("one.yaml", 1)]
    assert answer(cli, "show", "A", "--version", "1")["items"][0]["file"] == "one.yaml"
    assert [item["file"] for item in answer(cli, "export", "--revision", "1")["items"]] == ["one.yaml"] * 2
    cli.run("rollback", "1")
    assert {where.file for where in store.origins().values()} == {"one.yaml"}
    with store.writing() as db:  # as 0.1.0 does, which knows no origins
        db.execute("INSERT INTO documents SELECT kind, name, 9, 'x', body, at FROM documents WHERE name = 'A' LIMIT 1")
        db.execute("UPDATE applied SET version = 9 WHERE name = 'A'")
    store.catch_up()
    assert set(store.origins()) == {("Policy", "a")}


def test_what_files_are_called_reaches_nobody_s_terminal_whole(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 250)
    folder.mkdir()
    (folder / "x\x1b[31m.yaml").write_text(FILES)
    shown = str(load([tmp_path]).origins["Policy", "a"])
    assert shown.endswith("d/x\\x1b[31m.yaml:6") and shown.startswith("…d") and shown.isprintable()
    assert len(origin("x" * 1000, 7).file) == FILE_MAX
    assert str(Origin("", 0)) == ""


def test_both_decisions_travel_with_versions_and_place_but_to_0_1_0() -> None:
    lease = Lease(1.0, Width.ARGV)
    granted = Granted(PersonaRef("A", 3), "a", lease, 7, 2, "a.yaml:6")
    denied = Denied(Reason.LOAD_UNKNOWN, "a", "A", "help", lease, 7, 3, 2, "a.yaml:6")
    for decision in (granted, denied):
        value = codec.encode_decision(decision)
        found = codec.decode_decision(value)
        assert (found.policy_version, found.policy_origin) == (2, "a.yaml:6")
        assert isinstance(found, Granted) or found.persona_version == 3
        old = codec.encode_decision(decision, 1)
        assert not {"policy_version", "policy_origin", "persona_version"} & old.keys()
        assert codec.decode_decision(old).policy_version is None
        for wrong in ({"policy_version": "2"}, {"policy_origin": 7}, {"policy_origin": "x" * 300}):
            with pytest.raises(json_fields.CodecError):
                codec.decode_decision({**value, **wrong})
