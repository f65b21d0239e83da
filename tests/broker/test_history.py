"""Change-sets: who changed what, what there was at any revision, and taking it back."""

import json
import os
import sqlite3
import subprocess
import threading
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
from persona_broker.policy.merge import ADD, WHOLE
from persona_broker.policy_files.reader import load
from persona_broker.policy_files.writer import as_yaml
from persona_broker.store.interface import Author
from persona_broker.store.schema import MIGRATIONS
from persona_broker.store.sqlite import SqliteStore

from persona.documents import Document, parse_document
from persona.problems import PersonaError
from tests import releases
from tests.broker.conftest import ROOT, Broker, environment
from tests.broker.test_apply import EXAMPLES, names, persona, policy, write

SET = {"kind": "CommandSet", "name": "git", "commands": ["git **", "tig"]}


@pytest.fixture
def store(cli: Broker) -> Iterator[SqliteStore]:
    store = SqliteStore(cli.directory / "db")
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
    assert second["documents"] == [
        {"kind": "Persona", "name": "A", "before": 1, "after": 2, "file": "a.yaml", "line": 1}
    ]
    assert newest["documents"] == [
        {"kind": "Policy", "name": "b", "before": None, "after": 1, "file": "a.yaml", "line": 1}
    ]
    assert [item["revision"] for item in answer(cli, "history", "A")["items"]] == [2, 1]
    text = cli.run("history", "-n", "2").stdout
    assert (
        "   2  " in text and "  'bob?'\n        Persona A: version 1 -> 2 (a.yaml:1)\n" in text and "first" not in text
    )
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


def test_another_revision_is_refused_before_anybody_is_asked(cli: Broker, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    cli.run("apply", write(file, persona("A"), policy("a")))
    cli.run("apply", "--yes", "--prune", write(file, persona("A", "cat")))
    for words in (("apply", "--prune", str(file)), ("rollback", "1"), ("apply", str(file), "--dry-run")):
        done = cli.run(*words, "--if-revision", "1")
        assert (done.returncode, "the revision is 2 by now" in done.stderr) == (1, True), words
    assert answer(cli, "rollback", "1", "--if-revision", "2", "-m", "oops")["revision"] == 3
    assert answer(cli, "history", "-n", "1")["items"][0]["message"] == "rollback to 1: oops"


def test_what_somebody_was_shown_is_not_done_to_what_they_have_not_seen(store: SqliteStore) -> None:
    def of(*commands: str) -> list[Document]:
        return [parse_document(persona("A", *commands))]

    store.change(of("ls"), ADD, Author("ann"))
    seen = store.plan(of("mine"), ADD)
    store.change(of("colleagues"), ADD, Author("bob"))
    with pytest.raises(PersonaError, match="no longer 1: 2 by bob"):
        store.carry_out(seen, Author("ann"))


def test_of_many_at_once_one_has_the_revision(cli: Broker) -> None:
    together = threading.Barrier(8)

    def change(number: int) -> bool:
        own = SqliteStore(cli.directory / "db")
        try:
            plan = own.plan([parse_document(persona("A", f"x{number}"))], WHOLE)
            together.wait()
            own.carry_out(plan, Author(f"u{number}"))
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
    whole = {"from": 1, "to": 3, "documents": [], "reordered": False}
    assert {key: answer(cli, "diff", "1", "3")[key] for key in whole} == whole
    assert answer(cli, "diff", "1", "2")["reordered"] is True
    assert [item["reordered"] for item in answer(cli, "history")["items"]] == [True, True, False]
    assert "        the order of policies\n" in cli.run("history", "-n", "1").stdout
    assert answer(cli, "diff", "0", "1")["documents"][0]["before"] is None
    assert cli.run("rollback", "0").returncode == 1
    assert "there is no revision 9; the newest is 3" in cli.run("rollback", "9").stderr


def test_what_is_exported_is_applied_to_the_same(cli: Broker, tmp_path: Path) -> None:
    most = persona("Most", "größe") | {"resource_limits": {"memory": "1000000TiB"}}
    cli.run("apply", EXAMPLES)
    cli.run("apply", write(tmp_path / "most.yaml", most))
    (tmp_path / "all").mkdir()
    done = subprocess.run(
        cli.argv("export"), env=environment(ROOT) | {"PYTHONIOENCODING": "latin-1"}, capture_output=True, check=True
    )
    (tmp_path / "all" / "x.yaml").write_bytes(done.stdout)
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
    assert found[0] == "Persona A: version 1 -> 2 (a.yaml:1)"
    assert {f"  {line}" for line in lines} <= set(found)
    assert found[-1] == "Persona B: added, version 1 (a.yaml:3)"
    assert answer(cli, "diff", "1", "1")["documents"] == []


def test_a_list_whose_order_alone_changed() -> None:
    assert list(compare({"a": ["x", "y"]}, {"a": ["y", "x"]})) == [FieldChange("a", ["x", "y"], ["y", "x"])]
    assert list(compare({"a": {"b": 1}}, {})) == [FieldChange("a.b", 1, None)]
    both = [FieldChange("a", None, "z"), FieldChange("a", ["x", "y"], ["y", "x", "z"])]  # the first that fits decides
    assert list(compare({"a": ["x", "y"]}, {"a": ["y", "x", "z"]})) == both
    assert list(compare({"a": ["x", "y"]}, {"a": ["x", "z", "y"]})) == both[:1]


def test_a_document_and_its_versions(cli: Broker, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    cli.run("apply", write(file, persona("A", "!git push **", "no", "git **"), policy("A")))
    cli.run("apply", write(file, persona("A", "ls")))
    shown = cli.run("show", "A").stdout
    assert shown.startswith("# Persona A, version 2 (a.yaml:1)\n") and "# Policy A, version 1 (a.yaml:3)\n" in shown
    one = cli.run("show", "A", "--kind", "Persona", "--version", "1").stdout
    assert yaml.safe_load(one)["command_whitelist"] == ["!git push **", "no", "git **"]
    assert answer(cli, "show", "A", "--kind", "Policy")["items"][0]["version"] == 1
    done = cli.run("show", "A", "--version", "7")
    assert (done.returncode, "has a version 7; 'persona-broker history A' shows" in done.stderr) == (1, True)
    assert cli.run("show", "nobody").returncode == 1


def test_what_0_1_0_applied_meanwhile_is_in_the_history(cli: Broker, store: SqliteStore, tmp_path: Path) -> None:
    cli.run("apply", write(tmp_path / "a.yaml", persona("A"), policy("a")))
    with store.writing() as db:  # as it does: no change-set
        db.execute("INSERT INTO documents SELECT kind, name, 2, 'x', body, at FROM documents WHERE name = 'A'")
        db.execute("UPDATE applied SET version = 2 WHERE name = 'A'")
    for words in (("history",), ("export",), ("diff", "1"), ("apply", str(tmp_path / "a.yaml"), "--dry-run")):
        done = cli.run(*words)
        assert (done.returncode, "'persona-broker migrate' makes it one" in done.stderr) == (3, True), words
    cli.run("apply", write(tmp_path / "b.yaml", persona("B")))
    newest, between, _ = answer(cli, "history")["items"]
    assert (newest["revision"], between["author"]) == (3, None)
    assert between["documents"] == [
        {"kind": "Persona", "name": "A", "before": 1, "after": 2, "file": None, "line": None}
    ]
    assert "somebody unknown  what a broker that keeps no revisions applied" in cli.run("history").stdout


def test_a_stale_history_is_brought_up_by_whatever_writes_it(cli: Broker, store: SqliteStore, tmp_path: Path) -> None:
    cli.run("apply", write(tmp_path / "a.yaml", persona("A"), policy("a"), policy("b", "bob")))
    with store.writing() as db:  # 0.1.0 applies them in another order: position by position
        for position, name in enumerate(("b", "a")):
            db.execute("UPDATE applied SET name = ? WHERE position = ?", (name, position + 1))
    assert names(cli) == ["b", "a"]
    done = cli.run("apply", str(tmp_path / "a.yaml"), "--if-revision", "1")
    assert (done.returncode, "what a broker that keeps no revisions applied" in done.stderr) == (1, True)
    newest, _first = answer(cli, "history")["items"]
    assert (newest["revision"], newest["documents"], newest["reordered"]) == (2, [], True)
    assert cli.run("diff", "1").stdout == "policies are asked in this order: b, a\n"
    exported = answer(cli, "export")["items"]
    assert [item["document"]["name"] for item in exported] == ["A", "b", "a"]


def test_0_1_0_goes_on_with_a_database_of_this_version(cli: Broker, tmp_path: Path) -> None:
    """Where nothing is applied that it does not know; what it applies is in the history."""
    old = environment(releases.unpack(tmp_path))
    file = write(tmp_path / "a.yaml", persona("A"), policy("a"))
    assert cli.run("apply", file).returncode == 0
    write(tmp_path / "a.yaml", persona("A", "cat"), policy("a"))
    done = subprocess.run(cli.argv("apply", file), env=old, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = cli.run("migrate").stdout
    assert said.startswith("revision 2 has what a broker that keeps no revisions applied\n"), said
    assert cli.run("migrate").stdout == "nothing to do\n"
    assert "cat" in cli.run("export").stdout
    (newest, _) = answer(cli, "history")["items"]
    assert (newest["author"], newest["documents"][0]["after"]) == (None, 2)


def test_what_cannot_be_read_stays_and_holds_up_no_rollback_of_the_rest(
    cli: Broker, store: SqliteStore, tmp_path: Path
) -> None:
    cli.run("apply", write(tmp_path / "a.yaml", persona("A"), policy("a"), policy("A"), persona("B")))
    cli.run("apply", write(tmp_path / "a.yaml", persona("A", "cat"), persona("B", "cat")))
    with store.writing() as db:
        db.execute("UPDATE documents SET body = '{\"x\": 1}' WHERE kind = 'Policy' AND name = 'A'")
        db.execute("UPDATE documents SET body = '{' WHERE name = 'B' AND version = 1")
    shown = cli.run("show", "A")
    assert (shown.returncode, shown.stderr.startswith("persona-broker: Policy A (version 1) cannot be read")) == (
        1,
        True,
    )
    assert yaml.safe_load(shown.stdout.partition("---")[0])["command_whitelist"] == ["cat"]
    assert '# {"x": 1}' in shown.stdout
    assert [item["problem"] is None for item in json.loads(cli.run("show", "A", "--json").stdout)["items"]] == [
        True,
        False,
    ]
    assert cli.run("export").returncode == 1
    found = answer(cli, "diff", "1")["documents"]
    assert [(item["name"], item["fields"] == [], item["problem"] is None) for item in found] == [
        ("A", False, True),
        ("B", True, False),
    ]
    done = cli.run("rollback", "1")
    assert (done.returncode, "Persona B (version 1) cannot be read" in done.stderr) == (1, True)
    assert "Policy A" not in done.stderr
    with store.writing() as db:
        db.execute("UPDATE documents SET body = ? WHERE name = 'B' AND version = 1", (json.dumps(persona("B")),))
    assert sorted(answer(cli, "rollback", "1")["changed"]) == ["Persona A", "Persona B"]
    assert cli.run("check").stdout.splitlines()[0].startswith("Policy A (version 1) cannot be read")


def test_a_persona_that_changed_with_its_command_set(cli: Broker, tmp_path: Path) -> None:
    cli.run("apply", write(tmp_path / "a.yaml", persona("A", "@git"), SET, policy("a")))
    cli.run("apply", write(tmp_path / "b.yaml", SET | {"commands": ["git **"]}))
    lines = cli.run("diff", "1").stdout.splitlines()
    assert lines[-2:] == ["Persona A: version 1 -> 2 (a.yaml:1)", "  its command sets changed"]


@pytest.mark.parametrize("tables", [("documents",), ("documents", "expansions")])
def test_a_text_that_is_not_the_one_that_was_applied_is_not_taken_for_it(
    cli: Broker, store: SqliteStore, tmp_path: Path, tables: tuple[str, ...]
) -> None:
    """It can be read, and says something else: nothing shows it as that version, and no rollback applies it."""
    uses = ("@git",) if len(tables) > 1 else ()
    cli.run("apply", write(tmp_path / "a.yaml", persona("A", *uses, "ls"), SET, policy("a")))
    cli.run("apply", write(tmp_path / "a.yaml", persona("A", *uses, "cat"), SET, policy("a")))
    with store.writing() as db:
        for table in tables:
            db.execute(f"UPDATE {table} SET body = replace(body, '\"ls\"', '\"nmap\"') WHERE name = 'A'")  # noqa: S608
            db.execute(f"UPDATE {table} SET body = replace(body, '\"cat\"', '\"nmap\"') WHERE name = 'A'")  # noqa: S608
    wrong = "Persona A (version 1) cannot be read: its text is not the one that was applied"
    for words in (("show", "A", "--version", "1"), ("export", "--revision", "1"), ("rollback", "1")):
        done = cli.run(*words)
        assert (done.returncode, wrong in done.stderr) == (1, True), (words, done.stderr)
        assert not [line for line in done.stdout.splitlines() if "nmap" in line and not line.startswith("#")]
    assert store.snapshot().personas == {}  # nor is anything granted by it
    assert cli.run("check").returncode == 1


def test_a_damaged_order_is_an_error_and_no_order(cli: Broker, store: SqliteStore, tmp_path: Path) -> None:
    cli.run("apply", write(tmp_path / "a.yaml", persona("A"), policy("a")))
    with store.writing() as db:
        db.execute("UPDATE change_sets SET policies = '['")
    for words in (("history",), ("export",), ("rollback", "1")):
        done = cli.run(*words)
        assert (done.returncode, "the order of policies at revision 1" in done.stderr) == (3, True), done.stderr


def test_what_was_applied_before_there_were_revisions_is_the_first(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "db")) as db, db:
        for migration in MIGRATIONS[:2]:
            for statement in migration:
                db.execute(statement)
        db.executemany(
            "INSERT INTO applied VALUES (?, ?, ?, 3)", [(2, "Policy", "a"), (1, "Policy", "b"), (0, "Persona", "A")]
        )
    store = SqliteStore(tmp_path / "db")
    (found,), ((order,),) = store.history(10), store.rows("SELECT policies FROM change_sets")
    store.close()
    assert json.loads(order) == ["b", "a"]
    assert (found.revision, found.reordered, len(found.items)) == (1, False, 3)


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
