"""What must not be pruned or erased: all records of a user, or of a session."""

import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass

from persona.problems import Fault, PersonaError
from persona_broker.store.interface import Author
from persona_broker.store.pending import note
from persona_broker.store.sqlite import SqliteStore

KINDS = ("user", "session")
_ALL = "SELECT kind, name, at, author, message FROM audit_holds ORDER BY at"


@dataclass(frozen=True, slots=True)
class Hold:
    """``kind`` is one of KINDS, ``at`` in Unix seconds."""

    kind: str
    name: str
    at: float
    author: str
    message: str


def holds(store: SqliteStore) -> list[Hold]:
    """All of them, oldest first.  Raises ``sqlite3.Error``."""
    return [Hold(*row) for row in store.rows(_ALL)]


def holds_in(db: sqlite3.Connection) -> list[Hold]:
    """The same, as they are in a transaction.  Raises ``sqlite3.Error``."""
    return [Hold(*row) for row in db.execute(_ALL)]


def add(store: SqliteStore, kind: str, name: str, author: Author) -> None:
    """Raises ``PersonaError`` where it is held already."""
    with store.writing() as db:
        row = (kind, name, time.time(), author.name, author.message)
        if not db.execute("INSERT OR IGNORE INTO audit_holds VALUES (?, ?, ?, ?, ?)", row).rowcount:
            raise PersonaError(Fault.CONFLICT, f"the {kind} {name!r} is held already")
        note(db, "audit_held", author=author.name, message=author.message, kind=kind, name=name)


def remove(store: SqliteStore, kind: str, name: str, author: Author) -> None:
    """Raises ``PersonaError`` where it is not held."""
    with store.writing() as db:
        if not db.execute("DELETE FROM audit_holds WHERE kind = ? AND name = ?", (kind, name)).rowcount:
            raise PersonaError(Fault.NOT_FOUND, f"the {kind} {name!r} is not held; 'audit hold list' shows what is")
        note(db, "audit_released", author=author.name, message=author.message, kind=kind, name=name)


def named(found: Sequence[Hold]) -> str:
    """For a message."""
    return ", ".join(f"{hold.kind} {hold.name}" for hold in found)
