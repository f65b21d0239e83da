"""Change-sets: who changed what, what there was at any revision, and taking it back."""

import json
import os
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from persona_broker.policy.field_diff import FieldChange, compare
from persona_broker.policy.merge import WHOLE
from persona_broker.policy_files.reader import load
from persona_broker.policy_files.writer import as_yaml
from persona_broker.store.change_sets import Author
from persona_broker.store.schema import MIGRATIONS
from persona_broker.store.sqlite import Store

from persona.documents import parse_document
from persona.problems import PersonaError
from tests.broker.conftest import ROOT, Broker
from tests.broker.test_apply import EXAMPLES, names, persona, policy, write

SET = {"kind": "CommandSet", "name": "git", "commands": ["git **", "tig"]}


@pytest.fixture
def store(cli: Broker) -> Iterator[Store]:
    store = Store(cli.directory / "db")
    yield store
    store.close()


def answer(cli: Broker, *words: str) -> Any:
    done = cli.run(*words, "--json")
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout)


def test_who_changed_what(cli: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.yaml"
    monkeypatch.setenv("SUDO_USER", "ann")
    assert answer(cli, "apply", write(file, persona("A"), policy("a")), "-m", "first")["revision"] == 1
    monkeypatch.setenv("SUDO_USER", "bob\x1b")
    assert answer(cli, "apply", write(file, persona("A", "cat"), policy("a")))["revision"] == 2
    assert answer(cli, "apply", str(file))["revision"] == 2  # nothing changed
    monkeypatch.delenv("SUDO_USER")
    assert answer(cli, "apply", write(file, policy("b", persona="A")), "--after", "a")["revision"] == 3
    newest, second, first = answer(cli, "history")["items"]
    assert (first["author"], first["message"], first["revision"]) == ("ann", "first", 1)
    assert (second["author"], newest["author"]) == ("bob?", "root")
    assert second["documents"] == [{"kind": "Persona", "name": "A", "before": 1, "after": 2}]
    assert newest["documents"] == [{"kind": "Policy", "name": "b", "before": None, "after": 1}]
    assert [item["revision"] for item in answer(cli, "history", "A")["items"]] == [2, 1]
    text = cli.run("history", "-n", "2").stdout
    assert "   2  " in text and "  'bob?'\n        Persona A: version 1 -> 2\n" in text and "first" not in text
    assert cli.run("history", "nobody").stdout == "no document 'nobody' was ever applied\n"


def test_a_change_that_is_not_of_the_newest_revision_names_who_was_faster(cli: Broker, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    assert cli.run("apply", write(file, persona("A")), "--if-revision", "0").returncode == 0
    assert cli.run("apply", write(file, persona("A", "cat")), "-m", "more").returncode == 0
    done = cli.run("apply", write(file, persona("A", "tac")), "--if-revision", "1")
    assert done.returncode == 1
    assert "the revision is 2 by now, no longer 1: 2 by root (more); 'persona-broker history'" in done.stderr
    assert "there is no revision 9" in cli.run("apply", str(file), "--if-revision", "9").stderr
    assert answer(cli, "apply", str(file), "--if-revision", "2")["revision"] == 3


def test_of_many_at_once_one_has_the_revision(cli: Broker) -> None:
    def change(number: int) -> bool:
        own = Store(cli.directory / "db")
        try:
            own.change([parse_document(persona("A", f"x{number}"))], WHOLE, Author(f"u{number}"), None, 0)
        except PersonaError:
            return False
        else:
            return True
        finally:
            own.close()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(change, range(8))).count(True) == 1


def test_what_was_at_a_revision_comes_back(cli: Broker, tmp_path: Path) -> None:
    first = write(tmp_path / "one" / "x.yaml", persona("A", "@git", "cat"), SET, policy("a"), policy("b", "bob"))
    second = write(tmp_path / "two" / "x.yaml", policy("b", "carol"), policy("a"), persona("A", "ls"), persona("B"))
    for file in (first, second):
        done = cli.run("apply", "--all", str(Path(file).parent), "--yes")
        assert done.returncode == 0, done.stderr
    assert names(cli) == ["b", "a"]
    exported = cli.run("export", "--revision", "1").stdout
    assert list(yaml.safe_load_all(exported))[1]["command_whitelist"] == ["@git", "cat"]
    done = cli.run("rollback", "1")
    assert (done.returncode, "documents would be removed" in done.stderr) == (4, True)
    assert answer(cli, "rollback", "1", "--yes", "--dry-run")["removed"] == ["Persona B"]
    assert answer(cli, "rollback", "1", "--yes")["revision"] == 3
    assert (names(cli), cli.run("export").stdout) == (["a", "b"], exported)
    assert answer(cli, "history", "-n", "1")["items"][0]["message"] == "rollback to 1"
    assert answer(cli, "diff", "1", "3")["documents"] == []
    assert "there is no revision 9; the newest is 3" in cli.run("rollback", "9").stderr


def test_what_is_exported_is_applied_to_the_same(cli: Broker, tmp_path: Path) -> None:
    cli.run("apply", EXAMPLES)
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "x.yaml").write_text(cli.run("export").stdout)
    assert cli.run("apply", "--all", str(tmp_path / "all")).stdout == "nothing changed\n"


_WORD = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_WORD, min_size=1, max_size=4), st.text(max_size=20))
def test_whatever_can_be_applied_is_written_and_read_back(tmp_path: Path, commands: list[str], text: str) -> None:
    try:
        document = parse_document({**persona("A", *commands), "description": text})
    except PersonaError:
        return
    (tmp_path / "x.yaml").write_text(as_yaml([document]))
    assert load([tmp_path / "x.yaml"]).documents == (document,)


def test_what_differs_between_two_revisions(cli: Broker, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    cli.run("apply", write(file, persona("A", "cat", "ls"), policy("a"), policy("b", "bob")))
    more = persona("A", "ls", "tac") | {"resource_limits": {"pids": 5}, "priority": 3}
    done = cli.run("apply", write(file, more, persona("B")))
    lines = [
        "command_whitelist: - cat",
        "command_whitelist: + tac",
        "resource_limits.pids: + 5",
        "priority: 50 -> 3",
    ]
    assert all(f"\n  Persona A: {line}\n" in done.stdout for line in lines), done.stdout
    found = cli.run("diff", "1").stdout.splitlines()
    assert found[0] == "Persona A: version 1 -> 2"
    assert {f"  {line}" for line in lines} <= set(found)
    assert found[-1] == "Persona B: added, version 1"
    assert answer(cli, "diff", "1", "1")["documents"] == []


def test_a_list_whose_order_alone_changed() -> None:
    assert list(compare({"a": ["x", "y"]}, {"a": ["y", "x"]})) == [FieldChange("a", ["x", "y"], ["y", "x"])]
    assert list(compare({"a": {"b": 1}}, {})) == [FieldChange("a.b", 1, None)]


def test_a_document_and_its_versions(cli: Broker, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    cli.run("apply", write(file, persona("A", "!git push **", "no", "git **"), policy("A")))
    cli.run("apply", write(file, persona("A", "ls")))
    shown = cli.run("show", "A").stdout
    assert shown.startswith("# Persona A, version 2\n") and "# Policy A, version 1\n" in shown
    one = cli.run("show", "A", "--kind", "Persona", "--version", "1").stdout
    assert yaml.safe_load(one)["command_whitelist"] == ["!git push **", "no", "git **"]
    assert answer(cli, "show", "A", "--kind", "Policy")["items"][0]["version"] == 1
    done = cli.run("show", "A", "--version", "7")
    assert (done.returncode, "has a version 7; 'persona-broker history A' shows" in done.stderr) == (1, True)
    assert cli.run("show", "nobody").returncode == 1


def test_what_0_1_0_applied_meanwhile_is_in_the_history(cli: Broker, store: Store, tmp_path: Path) -> None:
    cli.run("apply", write(tmp_path / "a.yaml", persona("A"), policy("a")))
    with store.writing() as db:  # as it does: no change-set
        db.execute("INSERT INTO documents SELECT kind, name, 2, 'x', body, at FROM documents WHERE name = 'A'")
        db.execute("UPDATE applied SET version = 2 WHERE name = 'A'")
    cli.run("apply", write(tmp_path / "b.yaml", persona("B")))
    newest, between, _ = answer(cli, "history")["items"]
    assert (newest["revision"], between["author"]) == (3, None)
    assert between["documents"] == [{"kind": "Persona", "name": "A", "before": 1, "after": 2}]
    assert "somebody unknown  what a broker that keeps no revisions applied" in cli.run("history").stdout


def test_what_was_applied_before_there_were_revisions_is_the_first(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "db")) as db, db:
        for migration in MIGRATIONS[:2]:
            for statement in migration:
                db.execute(statement)
        db.executemany(
            "INSERT INTO applied VALUES (?, ?, ?, 3)", [(2, "Policy", "a"), (1, "Policy", "b"), (0, "Persona", "A")]
        )
    store = Store(tmp_path / "db")
    (found,) = store.history(10)
    store.close()
    assert (found.revision, found.policies, len(found.items)) == (1, ("b", "a"), 3)


def test_a_message_is_one_line(cli: Broker) -> None:
    for text in ("a\nb", "x" * 501):
        assert cli.run("apply", EXAMPLES, "-m", text).returncode == 2


def test_without_an_account_there_is_a_number(cli: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    cli.run("apply", EXAMPLES)
    assert answer(cli, "history")["items"][0]["author"] == "uid 4000000000"


def test_the_examples_can_be_shown() -> None:
    documents = load([ROOT / "examples"]).documents
    assert len(list(yaml.safe_load_all(as_yaml(documents)))) == len(documents)
