"""Applying documents: all of them at once, and one among all, beside the least that it takes to keep their texts."""

import hashlib
import json
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from persona_broker.policy.merge import ADD, WHOLE
from persona_broker.store.interface import Author
from persona_broker.store.sqlite import SqliteStore

from persona.canonical import to_mapping
from persona.documents import Document, Persona
from tests.bench.decide import snapshot
from tests.bench.row import Missing, Row, measured

WHO = Author("bench")


def documents(count: int) -> list[Document]:
    """A hundred personas and ``count`` policies."""
    full = snapshot(count)
    return [*(versioned.persona for versioned in full.personas.values()), *full.policies]


def bare_ms(given: list[Document], file: Path) -> float:
    """Serialises and hashes them, and inserts the texts in one transaction of SQLite."""
    with closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE texts (name TEXT PRIMARY KEY, digest TEXT, body TEXT) WITHOUT ROWID")
        began = time.perf_counter()
        with db:
            for document in given:
                body = json.dumps(to_mapping(document))
                row = (f"{type(document).__name__} {document.name}", hashlib.sha256(body.encode()).hexdigest(), body)
                db.execute("INSERT INTO texts VALUES (?, ?, ?)", row)
        return 1000 * (time.perf_counter() - began)


def apply_ms(given: list[Document], file: Path) -> tuple[float, float]:
    """Milliseconds to apply all of them to an empty store; and then to change one, by a process that has read all."""
    first = next(document for document in given if isinstance(document, Persona))
    with closing(SqliteStore(file)) as store:
        began = time.perf_counter()
        store.change(given, WHOLE, WHO)
        applied = time.perf_counter()
        store.documents()
        read = time.perf_counter()
        store.carry_out(store.plan([replace(first, description="another")], ADD), WHO)
        changed = time.perf_counter()
        if store.revision() != 2:
            raise RuntimeError(f"revision {store.revision()} and not 2")
    return 1000 * (applied - began), 1000 * (changed - read)


def of(count: int, name: str) -> list[Row]:
    """Both figures for so many policies."""
    given = documents(count)
    with tempfile.TemporaryDirectory(prefix="persona-bench-") as directory:
        least = bare_ms(given, Path(directory) / "bare")
        whole, one = apply_ms(given, Path(directory) / "db")
    target = "no target: an operator waits for it, no decision does"
    return [
        Row(f"store.apply_ms.{name}", whole, "ms", "bare hash and insert", least, whole / least, target),
        Row(f"store.change_ms.{name}", one, "ms", "all of them", whole, one / whole, target),
    ]


def rows() -> Iterator[Row | Missing]:
    """store.*"""
    return measured(
        ("store.apply_ms.1k, store.change_ms.1k", lambda: of(1000, "1k")),
        ("store.apply_ms.100k, store.change_ms.100k", lambda: of(100_000, "100k")),
    )
