"""Going back to a backup, so that nothing that a guest has seen is undercut.

**The epoch.**  A generation is ``epoch << 20`` and a count within.  Each restore begins an epoch, later than any before
it: the moment, in seconds since 2026, or one more than the newest that is known.  So every generation after it is above
every one before, also above those that the lost database had and no backup has, and guests need to know nothing of it.

**Where the database is there still**, it is changed in one transaction: its history, its records and what was taken
from anybody (guests that are gone, tokens that were renewed, sessions that were revoked) stay; documents, and which
guests there are, become those of the backup.

**Where it is gone**, the backup takes its place.  What was taken since is taken again as far as the audit tells
(``Removals``), and every guest is quarantined unless that is all.  Revisions and versions go on from the epoch's
number, since nobody knows which ones were used.
"""

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from persona.problems import Fault, PersonaError
from persona_broker.policy.origin import NOWHERE
from persona_broker.store import change_sets
from persona_broker.store.backup import Progress, copy, meta_of, nobody, open_backup, put_in_place
from persona_broker.store.database import as_store_error, put_meta, read_write
from persona_broker.store.interface import Author
from persona_broker.store.pending import note
from persona_broker.store.schema import check, migrate, version_of

EPOCH_BITS = 20  # changes within an epoch; should there be more, the count goes on into the epoch, which rises as well
_BEGIN = 1_767_225_600.0  # 2026-01-01T00:00:00Z
_WITH_SITE = 4  # the first schema that has one
_HISTORY = ("change_sets", "change_items", "origins")


@dataclass(frozen=True, slots=True)
class Removals:
    """What was taken since a backup: guests that were removed or given another token, and sessions revoked.

    ``held``: by kind and name what is held in the audit since then (when, by whom, why), ``None`` = not any more.
    ``bound``: by guest the UUID of the domain that it was bound to last, ``None`` = to none any more, in that order.
    ``told``: events and their times that the audit has already.  ``complete``: nothing else was taken.
    """

    guests: frozenset[str] = frozenset()
    revoked: frozenset[str] = frozenset()
    ending: frozenset[str] = frozenset()
    held: Mapping[tuple[str, str], tuple[float, str, str] | None] = field(default_factory=dict)
    bound: Mapping[str, str | None] = field(default_factory=dict)
    told: frozenset[tuple[str, float]] = frozenset()
    complete: bool = False


Recall = Callable[[sqlite3.Connection], Removals]  # of an open backup, as the audit tells it


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did: whose documents hold now, by which numbers, and which guests went or are quarantined."""

    backup_at: float | None
    backup_revision: int
    revision: int
    generation: int
    gone: tuple[str, ...]
    quarantined: tuple[str, ...]


def epoch_of(generation: int) -> int:
    """The restore epoch of a generation; 0 = none was ever begun."""
    return generation >> EPOCH_BITS


def restore(
    database: Path,
    file: Path,
    author: Author,
    progress: Progress = nobody,
    recall: Recall = lambda _backup: Removals(),
) -> Restored:
    """Checks everything before anything is changed, then changes all or nothing.

    ``recall`` is asked where the database is gone.
    Raises ``PersonaError``, which names the file and the way out, ``StoreError``, ``OSError``.
    """
    with as_store_error(), closing(open_backup(file)) as source:
        if os.path.lexists(database):
            return _into(database, source, file, author)
        for rest in (f"{database}-wal", f"{database}-journal"):
            if os.path.lexists(rest):  # SQLite would play it into whatever database it finds there
                raise PersonaError(
                    Fault.CONFLICT, f"{rest} is left of the lost database; move it away. Nothing was changed"
                )
        return replace_lost(database, source, author, recall(source), progress)


# --- where the database is there ----------------------------------------------------------------------


def _into(database: Path, source: sqlite3.Connection, file: Path, author: Author) -> Restored:
    with tempfile.TemporaryDirectory(prefix=".restore-", dir=database.parent) as folder:
        scratch = Path(folder) / "backup"
        older = version_of(source) < _WITH_SITE
        copy(source, scratch)
        with closing(sqlite3.connect(scratch, isolation_level=None)) as copied:
            migrate(copied)
            site = None if older else meta_of(copied, "site")
        with closing(_live(database)) as db:
            if site is None or site != meta_of(db, "site"):
                of = "says of no site that it is of" if site is None else "is of another site than"
                fix = f"{_MOVE.format(database)}, where it is really to be replaced"
                raise PersonaError(Fault.CONFLICT, f"{file} {of} {database}; {fix}. Nothing was changed")
            db.execute("ATTACH ? AS backup", (str(scratch),))
            db.execute("BEGIN IMMEDIATE")
            try:
                restored = _change(db, file, author)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            return restored


_MOVE = "stop the service, move {0}, {0}-wal and {0}-shm away, and restore again"


def _live(database: Path) -> sqlite3.Connection:
    """Raises ``PersonaError`` where it is broken: no restore overwrites what somebody may still want to save."""
    db = read_write(database)
    try:
        db.execute("PRAGMA synchronous = FULL")
        (said,) = db.execute("PRAGMA integrity_check(1)").fetchone()
        if said != "ok":
            raise sqlite3.DatabaseError(said.splitlines()[-1])
        check(db)
    except sqlite3.DatabaseError as error:
        db.close()
        raise PersonaError(
            Fault.CONFLICT, f"{database} cannot be used ({error}); {_MOVE.format(database)}. Nothing was changed"
        ) from None
    return db


def _change(db: sqlite3.Connection, file: Path, author: Author) -> Restored:
    """In a transaction, with the backup attached."""
    _refuse_another_past(db, file)
    change_sets.catch_up(db)
    for table in ("documents", "expansions", *_HISTORY):
        db.execute(f"INSERT OR IGNORE INTO main.{table} SELECT * FROM backup.{table}")  # noqa: S608 - constants
    at, number = _of_backup(db)
    before = change_sets.versions_at(db, change_sets.revision(db))
    origins = {**dict.fromkeys(change_sets.origins_at(db, change_sets.revision(db)), NOWHERE)}
    origins |= change_sets.origins_at(db, number)
    db.execute("DELETE FROM main.applied")
    db.execute("INSERT INTO main.applied SELECT * FROM backup.applied")
    gone = [name for (name,) in db.execute("SELECT name FROM main.guests EXCEPT SELECT name FROM backup.guests")]
    _remove(db, gone)
    (theirs,) = db.execute("SELECT value FROM backup.meta WHERE key = 'generation'").fetchone()
    generation = _begin_epoch(db, time.time(), int(theirs))
    change_sets.add(db, before, _said(author, at, number), generation)
    change_sets.put_origins(db, origins)
    restored = Restored(at, number, change_sets.revision(db), generation, tuple(gone), ())
    _note(db, author, restored, lost=False)
    return restored


def _refuse_another_past(db: sqlite3.Connection, file: Path) -> None:
    """Where both tell the same version or revision otherwise, the two were never one database."""
    differ = (
        "SELECT 1 FROM backup.documents b JOIN main.documents m USING (kind, name, version) WHERE b.digest != m.digest"
        " UNION SELECT 1 FROM backup.change_sets b JOIN main.change_sets m USING (revision)"
        " WHERE b.at != m.at OR b.author != m.author"
    )
    if db.execute(differ).fetchone():
        raise PersonaError(
            Fault.CONFLICT, f"{file} has another history than the database, under the same numbers; nothing was changed"
        )


def _of_backup(db: sqlite3.Connection) -> tuple[float | None, int]:
    (number,) = db.execute("SELECT coalesce(max(revision), 0) FROM backup.change_sets").fetchone()
    row = db.execute("SELECT value FROM backup.meta WHERE key = 'backup_at'").fetchone()
    return (float(row[0]) if row is not None else None), int(number)


# --- where it is gone ---------------------------------------------------------------------------------


def replace_lost(
    database: Path, source: sqlite3.Connection, author: Author, known: Removals, progress: Progress = nobody
) -> Restored:
    """The backup becomes the database, which is there when it is whole, and not before."""
    database.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".restore-", dir=database.parent))
    try:
        scratch = folder / database.name
        scratch.touch(mode=0o600)
        copy(source, scratch, progress)
        with closing(sqlite3.connect(scratch, isolation_level=None)) as db:
            migrate(db)
            db.execute("PRAGMA journal_mode = DELETE")  # one file, that can be put in place as a whole
            db.execute("BEGIN IMMEDIATE")
            restored = _renumber(db, author, known)
            db.execute("COMMIT")
        if os.geteuid() == 0:  # as for a new one: it is the service's
            owner = database.parent.stat()
            os.chown(scratch, owner.st_uid, owner.st_gid)
        try:
            put_in_place(scratch, database)
        except FileExistsError:
            raise PersonaError(Fault.CONFLICT, f"{database} is there by now; nothing was changed") from None
        return restored
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _renumber(db: sqlite3.Connection, author: Author, known: Removals) -> Restored:
    at, number = meta_of(db, "backup_at"), change_sets.revision(db)
    at = at if isinstance(at, float) else None
    db.execute("DELETE FROM meta WHERE key = 'backup_at'")  # of the copy, and not of the database that it becomes
    change_sets.catch_up(db)
    _take_again(db, known)
    if not known.complete:
        db.execute("INSERT OR IGNORE INTO quarantine SELECT name, ? FROM guests", (time.time(),))
    # a second ahead: nobody knows whether the lost one had begun an epoch in this very second
    generation = _begin_epoch(db, time.time() + 1)
    epoch = epoch_of(generation)
    put_meta(db, "version_floor", epoch)  # who knows which versions the lost one had given out
    change_sets.add(db, change_sets.applied(db), _said(author, at, number), generation, above=epoch)
    quarantined = tuple(name for (name,) in db.execute("SELECT guest FROM quarantine ORDER BY guest"))
    restored = Restored(at, number, change_sets.revision(db), generation, tuple(sorted(known.guests)), quarantined)
    _note(db, author, restored, lost=True)
    return restored


def _take_again(db: sqlite3.Connection, known: Removals) -> None:
    _remove(db, known.guests)
    for ident in sorted(known.revoked | known.ending):
        db.execute("UPDATE sessions SET revoked = 1 WHERE id = ?", (ident,))
    for ident in sorted(known.ending):
        db.execute("INSERT OR IGNORE INTO ending SELECT id FROM sessions WHERE id = ?", (ident,))
    _bind(db, known.bound)
    for key, why in known.held.items():
        db.execute("DELETE FROM audit_holds WHERE kind = ? AND name = ?", key)
        if why is not None:
            db.execute("INSERT INTO audit_holds VALUES (?, ?, ?, ?, ?)", (*key, *why))
    query = (
        "SELECT id, json_extract(body, '$.event'), json_extract(body, '$.at') FROM audit_pending WHERE json_valid(body)"
    )
    for number, event, at in db.execute(query).fetchall():
        if (event, at) in known.told:
            db.execute("DELETE FROM audit_pending WHERE id = ?", (number,))


def _bind(db: sqlite3.Connection, bound: Mapping[str, str | None]) -> None:
    """After guests were removed.  First each lets go of what it had: a domain is one guest's, and two may swap."""
    for guest in bound:
        db.execute("DELETE FROM bindings WHERE guest = ?", (guest,))
    for guest, uuid in bound.items():
        if uuid is not None:  # another guest that has it still lost it before, untold
            query = "INSERT OR REPLACE INTO bindings (guest, uuid) SELECT name, ? FROM guests WHERE name = ?"
            db.execute(query, (uuid, guest))


# --- both ---------------------------------------------------------------------------------------------


def _remove(db: sqlite3.Connection, guests: Iterable[str]) -> None:
    for name in guests:
        db.execute("DELETE FROM guests WHERE name = ?", (name,))
        db.execute("DELETE FROM health WHERE guest = ?", (name,))
        db.execute("DELETE FROM sessions WHERE guest = ?", (name,))


def _begin_epoch(db: sqlite3.Connection, now: float, other: int = 0) -> int:
    """The generation that the restore announces, above that of the database and an ``other`` one that is known."""
    (known,) = db.execute("SELECT value FROM meta WHERE key = 'generation'").fetchone()
    epoch = max(epoch_of(max(int(known), other)) + 1, int(now - _BEGIN))
    put_meta(db, "generation", epoch << EPOCH_BITS)
    return epoch << EPOCH_BITS


def _note(db: sqlite3.Connection, author: Author, done: Restored, *, lost: bool) -> None:
    """For the audit; its change-set is there already."""
    of = {"backup_at": done.backup_at, "backup_revision": done.backup_revision, "revision": done.revision}
    guests = {"gone": done.gone, "quarantined": done.quarantined}
    note(db, "database_restored", author=author.name, message=author.message, lost=lost, **of, **guests)


def _said(author: Author, at: float | None, revision: int) -> Author:
    made = time.strftime("of %Y-%m-%dT%H:%M:%SZ ", time.gmtime(at)) if at is not None else ""
    why = f": {author.message}" if author.message else ""
    return Author(author.name, f"restore of a backup {made}(revision {revision}){why}")
