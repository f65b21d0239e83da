"""Brings into the chain what waits in the broker's database: operators' actions, and records of before there was one.

A row is deleted there once it is in the chain.  The chain notes which rows it took last, in the transaction that
appends them: so a process that is killed in between loses nothing and doubles nothing, and several may do this at once.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from persona_broker.audit.chain import Chain
from persona_broker.audit.core.events import event
from persona_broker.audit.core.format import Entry, split
from persona_broker.audit.segment import Writer
from persona_broker.store.sqlite import SqliteStore

_BATCH = 1000  # rows of each table
_WAITING = (
    ("records", "SELECT id, guest, CAST(body AS BLOB) FROM records ORDER BY id LIMIT ?"),
    ("audit_pending", "SELECT id, NULL, CAST(body AS BLOB) FROM audit_pending ORDER BY id LIMIT ?"),
)


def waiting(store: SqliteStore) -> int:
    """How many rows wait.  Raises ``sqlite3.Error``."""
    return sum(int(store.rows(f"SELECT count(*) FROM {table}")[0][0]) for table, _ in _WAITING)  # noqa: S608 - constants


def take_over(store: SqliteStore, chain: Chain, progress: Callable[[int], None] = lambda _done: None) -> int:
    """Moves everything that waits; how many rows that were.  Raises ``sqlite3.Error``, ``OSError``."""
    done = 0
    while waiting(store):
        taken: list[tuple[str, int]] = []

        def work(writer: Writer, at_us: int, taken: list[tuple[str, int]] = taken) -> None:
            known, uids = writer.moved(), []
            for table, query in _WAITING:  # read while nobody else can append: what another takes is noted before
                for ident, guest, body in store.rows(query, _BATCH):
                    uid = f"{table}:{ident}:{hashlib.sha256(body).hexdigest()[:16]}"
                    uids.append(uid)
                    taken.append((table, ident))
                    if uid not in known:
                        writer.add(_entry(body, own=guest is None), at_us, None if guest is None else _name(guest))
            writer.move(uids)

        chain.change(work)
        with store.writing() as db:
            for table, ident in taken:
                db.execute(f"DELETE FROM {table} WHERE id = ?", (ident,))  # noqa: S608 - constants
        done += len(taken)
        progress(done)
    return done


def _entry(body: bytes, *, own: bool) -> Entry:
    """A row's text as a record, of the broker's ``own`` or a guest's; what cannot be read is kept as text."""
    try:
        value: Any = json.loads(body)
        if isinstance(value, dict):
            return event(value.pop("event"), value.pop("at"), **value) if own else split(value)
    except (ValueError, RecursionError, KeyError, TypeError):
        pass
    return split({"event": "unreadable", "text": body.decode("utf-8", "backslashreplace")})


def _name(guest: str) -> str:
    """A guest's name on one line; 'guest add' makes no others."""
    return "".join(char if char.isprintable() else "?" for char in guest)
