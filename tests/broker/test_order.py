"""The order of policies: by their ``order``, else where the database has them; what an older database says stays."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from persona_broker.policy.order import arrange
from persona_broker.policy.unreadable import Unreadable
from persona_broker.store.sqlite import SqliteStore

from persona.canonical import digest
from persona.documents import Document, parse_document
from persona.parsing import DocumentError
from tests.broker.conftest import Broker, apply

PERSONA = {"kind": "Persona", "name": "A", "command_whitelist": ["ls"]}


def policy(name: str, order: object = None) -> dict[str, Any]:
    document = {"kind": "Policy", "name": name, "subjects": {"users": ["alice"]}, "persona": "A"}
    return document if order is None else {**document, "order": order}


def documents(*policies: dict[str, Any]) -> list[Document]:
    return [parse_document(value) for value in (PERSONA, *policies)]


def order(store: SqliteStore) -> list[str]:
    """As the decision engine asks them."""
    return [policy.name for policy in store.snapshot().policies]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "db")
    yield store
    store.close()


def test_order_is_that_of_the_documents(store: SqliteStore) -> None:
    given = [policy("late", 9000), policy("y"), policy("b", 10), policy("at", 5000), policy("x"), policy("a", 10)]
    apply(store, documents(*given))
    assert order(store) == ["a", "b", "y", "x", "at", "late"]
    turned = [*given[:1], *given[2:4], given[1], given[5], given[4]]  # only what has no order keeps its sequence
    assert not apply(store, documents(*turned))
    apply(store, documents(policy("y"), policy("b", 10), policy("a", 11)))
    assert order(store) == ["b", "a", "y"]


@pytest.mark.parametrize("wrong", ["10", -1, 10000, 1.5, True, [1]])
def test_what_is_no_order_is_refused(wrong: object) -> None:
    with pytest.raises(DocumentError, match="order: expected a whole number from 0 to 9999"):
        parse_document(policy("a", wrong))


def test_zero_is_an_order(store: SqliteStore) -> None:
    apply(store, documents(policy("b"), policy("a", 0)))
    assert order(store) == ["a", "b"]
    assert store.documents()[1][0] == parse_document(policy("a", 0))


def test_a_record_of_the_first_version_decides_as_it_did(store: SqliteStore, tmp_path: Path) -> None:
    """Its rows are in the order in which they were applied, personas in between."""
    rows = [policy("z"), PERSONA, policy("a"), policy("m")]
    with closing(sqlite3.connect(tmp_path / "db")) as db, db:
        for position, value in enumerate(rows):
            key = digest(parse_document(value))
            db.execute(
                "INSERT INTO documents VALUES (?, ?, 1, ?, ?, 1)",
                (value["kind"], value["name"], key, json.dumps(value)),
            )
            db.execute("INSERT INTO applied VALUES (?, ?, ?, 1)", (position, value["kind"], value["name"]))
    assert order(store) == ["z", "a", "m"]
    before = store.generation()
    assert not apply(store, documents(policy("z"), policy("a"), policy("m")))
    assert store.generation() == before
    # a policy that has no order says of itself what it said then: no new version
    assert digest(parse_document(policy("z"))) == "90d92440d5cdbb5b17997f90bae15739d87b9c4ba04c9acf0105452266902ef3"


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ('{"kind": "Policy", "name": "b", "order": 20, "colour": 1}', ["a", "c", "b", "x"]),
        ('{"kind": "Policy", "name": "b", "colour": 1}', ["a", "c", "b", "x"]),
        ('{"kind": "Policy", "name": "b", "order": "x"}', ["a", "b", "c", "x"]),
        ("{", ["a", "b", "c", "x"]),
    ],
)
def test_what_cannot_be_read_stays_where_it_was(
    store: SqliteStore, tmp_path: Path, body: str, place: list[str]
) -> None:
    apply(store, documents(policy("a", 10), policy("b", 11), policy("x")))
    with closing(sqlite3.connect(tmp_path / "db")) as db, db:
        db.execute("UPDATE documents SET body = ? WHERE name = 'b'", (body,))
    stored = [document for document, _ in store.documents()]
    assert isinstance(stored[2], Unreadable)
    again = arrange([*stored, parse_document(policy("c", 15))])
    assert [document.name for document in again if document.name != "A"] == place


def test_explain_of_files_goes_by_it_too(cli: Broker, tmp_path: Path) -> None:
    other = {"kind": "Persona", "name": "B", "command_whitelist": ["ls"]}
    given = [PERSONA, other, policy("second", 2), {**policy("first", 1), "persona": "B"}]
    (tmp_path / "x.yaml").write_text("\n---\n".join(map(json.dumps, given)))
    ask = ("explain", "--user", "alice", "--vm", "v", "--files", str(tmp_path / "x.yaml"), "--", "ls")
    assert cli.run(*ask).stdout.startswith("granted under B, policy first (")
    assert cli.run("apply", str(tmp_path / "x.yaml")).returncode == 0
    listed = cli.run("policies", "list").stdout.splitlines()
    assert [line.split() for line in listed[1:]] == [["1", "1", "first", "->", "B"], ["2", "2", "second", "->", "A"]]
    found = json.loads(cli.run("policies", "list", "--json").stdout)["items"]
    assert [(item["place"], item["order"], item["name"]) for item in found] == [(1, 1, "first"), (2, 2, "second")]
