"""Change-sets: who changed which documents, when and why.

Each has a number of its own, the revision, which rises by one; once written, none changes.  The document of each
version stays as well, so what was applied at a revision can be told for ever.  All functions work on a connection in
a transaction of the caller's and raise ``sqlite3.Error``.
"""

import json
import sqlite3
import time
from collections.abc import Mapping
from typing import Any

from persona.shown import line
from persona_broker.policy.diff import in_another_order
from persona_broker.policy.origin import NOWHERE, Origin
from persona_broker.store.interface import Author, ChangeSet, Item, Origins, Versions
from persona_broker.store.pending import note

_EVERY = "SELECT revision, at, author, message, policies IS NOT NULL, generation FROM change_sets"
_NAMED_MAX = 3  # of those who were faster
TOLD_MAX = 100  # documents of one change-set that the audit names; the history has all


def revision(db: sqlite3.Connection) -> int:
    """The number of the newest change-set; 0 = there is none."""
    return int(db.execute("SELECT coalesce(max(revision), 0) FROM change_sets").fetchone()[0])


def applied(db: sqlite3.Connection) -> Versions:
    """The version of each document that is applied."""
    return {(kind, name): version for kind, name, version in db.execute("SELECT kind, name, version FROM applied")}


def add(
    db: sqlite3.Connection, before: Mapping[tuple[str, str], int], author: Author, generation: int, above: int = 0
) -> None:
    """Writes down what is applied now, and holds since a generation, against the versions ``before``.

    The revision is the next one, and no lower than ``above``.  The audit hears of it.
    """
    after, order, newest = applied(db), _order(db), revision(db)
    number = max(newest, above) + 1
    policies = None if order == policies_at(db, newest) else json.dumps(order)
    row = (number, time.time(), author.name, author.message, policies, generation)
    columns = "revision, at, author, message, policies, generation"
    db.execute(f"INSERT INTO change_sets ({columns}) VALUES (?, ?, ?, ?, ?, ?)", row)  # noqa: S608 - constants
    items = (
        (number, *key, before.get(key), after.get(key))
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    )
    db.executemany("INSERT INTO change_items VALUES (?, ?, ?, ?, ?)", items)
    note(db, "change_set", **told(db))


def told(db: sqlite3.Connection) -> dict[str, Any]:
    """The newest change-set, for the audit: of its documents how many they are, and the first TOLD_MAX."""
    query = "SELECT revision, author, message FROM change_sets ORDER BY revision DESC LIMIT 1"
    number, author, message = db.execute(query).fetchone()
    (count,) = db.execute("SELECT count(*) FROM change_items WHERE revision = ?", (number,)).fetchone()
    items = "SELECT kind, name, before, after FROM change_items WHERE revision = ? LIMIT ?"
    named = [
        dict(zip(("kind", "name", "before", "after"), item, strict=True))
        for item in db.execute(items, (number, TOLD_MAX))
    ]
    return {"author": author, "message": message, "revision": number, "count": count, "documents": named}


def is_behind(db: sqlite3.Connection) -> bool:
    """Whether a broker of 0.1 applied something meanwhile, to which one may have gone back: it keeps no change-sets."""
    newest = revision(db)
    return versions_at(db, newest) != applied(db) or policies_at(db, newest) != _order(db)


def catch_up(db: sqlite3.Connection) -> None:
    """Writes down what such a broker applied, where it did."""
    if is_behind(db):
        before, after = versions_at(db, revision(db)), applied(db)
        known = origins_at(db, revision(db))
        add(db, before, Author("", "what a broker that keeps no revisions applied"), _generation(db))
        put_origins(db, {key: NOWHERE for key in known if before.get(key) != after.get(key)})


def _generation(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT value FROM meta WHERE key = 'generation'").fetchone()[0])


def _order(db: sqlite3.Connection) -> list[str]:
    """The applied policies, in the order in which they are asked."""
    return [name for (name,) in db.execute("SELECT name FROM applied WHERE kind = 'Policy' ORDER BY position")]


def overtaken(db: sqlite3.Connection, wanted: int) -> str:
    """Why documents that were written for revision ``wanted`` are not applied: who was faster, and what to do."""
    now = revision(db)
    if wanted > now:
        return f"refused: the revision is {now}; there is no revision {wanted}"
    query = "SELECT revision, author, message FROM change_sets WHERE revision > ? ORDER BY revision DESC LIMIT ?"
    by = [
        f"{number} by {author or 'somebody unknown'}" + (f" ({message})" if message else "")
        for number, author, message in db.execute(query, (wanted, _NAMED_MAX))
    ]
    more = f" and {now - wanted - len(by)} before" if now - wanted > len(by) else ""
    fix = "'persona-broker history' shows what changed"
    return line(f"refused: the revision is {now} by now, no longer {wanted}: {', '.join(by)}{more}; {fix}")


def newest(db: sqlite3.Connection, limit: int, name: str | None = None) -> list[ChangeSet]:
    """The newest ``limit`` first; with ``name`` those that changed a document of that name."""
    if name is None:
        rows = db.execute(f"{_EVERY} ORDER BY revision DESC LIMIT ?", (limit,))
    else:
        of = "revision IN (SELECT revision FROM change_items WHERE name = ?)"
        rows = db.execute(f"{_EVERY} WHERE {of} ORDER BY revision DESC LIMIT ?", (name, limit))
    return [_read(db, row) for row in rows.fetchall()]


def one(db: sqlite3.Connection, number: int) -> ChangeSet | None:
    """The change-set of a revision."""
    row = db.execute(f"{_EVERY} WHERE revision = ?", (number,)).fetchone()
    return _read(db, row) if row is not None else None


def after(db: sqlite3.Connection, number: int) -> ChangeSet | None:
    """The next one; a restore may have left out numbers."""
    row = db.execute(f"{_EVERY} WHERE revision > ? ORDER BY revision LIMIT 1", (number,)).fetchone()
    return _read(db, row) if row is not None else None


def versions_at(db: sqlite3.Connection, number: int) -> Versions:
    """The version of each document that was applied at a revision."""
    # SQLite takes the other columns from the row that has the maximum
    query = (
        "SELECT kind, name, after FROM (SELECT kind, name, after, max(revision) FROM change_items"
        " WHERE revision <= ? GROUP BY kind, name) WHERE after IS NOT NULL"
    )
    return {(kind, name): version for kind, name, version in db.execute(query, (number,))}


def origins_at(db: sqlite3.Connection, number: int) -> dict[tuple[str, str], Origin]:
    """Where the documents of a revision were written, of those of which anybody knows."""
    query = (
        "SELECT kind, name, file, line FROM (SELECT kind, name, file, line, max(revision) FROM origins"
        " WHERE revision <= ? GROUP BY kind, name) WHERE file != ''"
    )
    return {(kind, name): Origin(file, number) for kind, name, file, number in db.execute(query, (number,))}


def origin_of(db: sqlite3.Connection, kind: str, name: str, number: int) -> Origin:
    """The same of one document."""
    query = (
        "SELECT file, line FROM origins WHERE kind = ? AND name = ? AND revision <= ? ORDER BY revision DESC LIMIT 1"
    )
    return Origin(*(db.execute(query, (kind, name, number)).fetchone() or ("", 0)))


def put_origins(db: sqlite3.Connection, moved: Origins) -> None:
    """As of the newest revision: a document that only moved within its files corrects it, and makes no other one."""
    now = revision(db)
    rows = ((*key, now, origin.file, origin.line) for key, origin in moved.items())
    db.executemany("INSERT OR REPLACE INTO origins VALUES (?, ?, ?, ?, ?)", rows)
    if moved:
        db.execute("UPDATE meta SET value = value + 1 WHERE key = 'moved'")


def since(db: sqlite3.Connection, kind: str, name: str, version: int) -> int:
    """The revision since which a version is, or last was, applied; 0 where it never was."""
    query = "SELECT max(revision) FROM change_items WHERE kind = ? AND name = ? AND after = ?"
    return int(db.execute(query, (kind, name, version)).fetchone()[0] or 0)


def _read(db: sqlite3.Connection, row: tuple[int, float, str, str, bool, int | None]) -> ChangeSet:
    number, at, author, message, moved, generation = row
    query = "SELECT kind, name, before, after FROM change_items WHERE revision = ? ORDER BY kind, name"
    items = tuple(
        Item(kind, name, before, after, NOWHERE if after is None else origin_of(db, kind, name, number))
        for kind, name, before, after in db.execute(query, (number,)).fetchall()
    )
    reordered = bool(moved) and in_another_order(policies_at(db, number - 1), policies_at(db, number))
    return ChangeSet(number, at, Author(author, message), reordered, items, generation)


def policies_at(db: sqlite3.Connection, number: int) -> list[str]:
    """The policies of a revision, in the order in which they were asked.  Raises ``sqlite3.DatabaseError``."""
    query = (
        "SELECT policies FROM change_sets WHERE revision <= ? AND policies IS NOT NULL ORDER BY revision DESC LIMIT 1"
    )
    row = db.execute(query, (number,)).fetchone()
    try:
        return [str(name) for name in json.loads(row[0])] if row is not None else []
    except (ValueError, TypeError, RecursionError) as error:
        raise sqlite3.DatabaseError(f"change_sets: the order of policies at revision {number}: {error}") from None
