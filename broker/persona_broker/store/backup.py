"""A copy of the whole database in one file, made while brokers write, and the checks of one before it is used.

A copy has everything that the database has, tokens as hashes only (docs/backup.md).  Keys and settings are no part of
it: they are files of their own.
"""

import errno
import json
import os
import sqlite3
import stat
import struct
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from persona.problems import Fault, PersonaError
from persona.shown import line
from persona_broker.store.database import as_store_error, put_meta, read_only
from persona_broker.store.schema import migrate, version_of
from persona_broker.store.stored_text import is_damaged

Progress = Callable[[float], None]  # a share of 1

_MAGIC = b"SQLite format 3\0"
_WITH_EXPANSIONS = 2  # the first schema that has them
_STEP = 1024  # pages between two words of progress
_NAMED_MAX = 5


def nobody(_share: float) -> None:
    """For whom progress does not matter."""


def backup(database: Path, file: Path, progress: Progress = nobody) -> None:
    """Copies the database as it is at one moment; ``file`` is there when it is whole, and not before.

    Raises ``PersonaError`` where ``file`` exists, ``StoreError``, ``OSError``.
    """
    if os.path.lexists(file):
        raise PersonaError(Fault.CONFLICT, f"{file} is there already, and no backup is overwritten; name another file")
    part = file.with_name(f"{file.name}.part")
    part.unlink(missing_ok=True)  # of one that was cut
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with as_store_error(), closing(read_only(database)) as source:
            version_of(source)  # of an older one too: there is no better moment than before a migration
            at = time.time()  # before: whatever is not in it came later
            copy(source, part, progress)
            with closing(sqlite3.connect(part, isolation_level=None)) as target:
                target.execute("PRAGMA journal_mode = DELETE")  # one file, and nothing beside it
                put_meta(target, "backup_at", at)
                _refuse_damaged(target, part)
        put_in_place(part, file)
    finally:
        part.unlink(missing_ok=True)


def put_in_place(part: Path, file: Path) -> None:
    """Gives a file that is whole its name, when it is on the disk.  Raises ``OSError``, also where there is one."""
    keep(part)
    try:
        os.link(part, file)  # unlike a renaming, it overwrites nothing
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):  # a file system without links, as of a USB stick
            raise
        if os.path.lexists(file):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(file)) from None
        part.rename(file)
    keep(file.parent)


def copy(source: sqlite3.Connection, target: Path, progress: Progress = nobody) -> None:
    """Everything in ``source``, of one moment, whoever writes to it meanwhile.  Raises ``sqlite3.Error``."""

    def tell(_status: int, remaining: int, total: int) -> None:
        progress(1 - remaining / total if total else 1.0)

    with closing(sqlite3.connect(target, isolation_level=None)) as opened:
        source.execute("BEGIN")
        try:
            source.execute("SELECT count(*) FROM sqlite_master").fetchone()  # from here on it is of this moment
            source.backup(opened, pages=_STEP, progress=tell, sleep=0.01)
        finally:
            source.execute("ROLLBACK")


def keep(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def open_backup(file: Path) -> sqlite3.Connection:
    """A backup that is whole, of a schema that is known, and whose applied documents are what was applied.

    Nobody writes to it.  Raises ``PersonaError``, which names the file and the way out, and ``OSError``.
    """
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise _unfit(file, "it is no file", "name a file that 'persona-broker backup' made")
    with file.open("rb") as opened:
        head, size = opened.read(100), os.fstat(opened.fileno()).st_size
    if len(head) < 100 or not head.startswith(_MAGIC):
        raise _unfit(file, "it is no database", "name a file that 'persona-broker backup' made")
    page, pages = struct.unpack(">H", head[16:18])[0], struct.unpack(">I", head[28:32])[0]
    whole = (65536 if page == 1 else page) * pages
    if size < whole:
        raise _unfit(file, f"it is cut: {size} of {whole} bytes", "copy it anew, or take another backup")
    rest = file.with_name(f"{file.name}-wal")
    if rest.exists() and rest.stat().st_size:
        raise _unfit(file, f"{rest} is beside it, so it is in use, or a part of what was", "take a backup of it")
    uri = f"{file.absolute().as_uri()}?mode=ro&immutable=1"
    db = sqlite3.connect(uri, uri=True, isolation_level=None)
    try:
        _refuse_damaged(db, file)
        version_of(db)
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'applied'").fetchone():
            raise _unfit(file, "it is no broker's database", "name a file that 'persona-broker backup' made")
        _refuse_strangers(db, file)
        _refuse_damaged_documents(db, file)
    except BaseException as error:
        db.close()
        if isinstance(error, sqlite3.Error):
            raise _unfit(file, str(error), "take another backup, or the version that made it") from None
        raise
    return db


def _refuse_damaged(db: sqlite3.Connection, file: Path) -> None:
    try:
        (said,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        said = str(error)
    if said != "ok":
        raise _unfit(file, f"it is damaged ({said.splitlines()[-1]})", "copy it anew, or take another backup")


def _refuse_strangers(db: sqlite3.Connection, file: Path) -> None:
    """Triggers and views would do something of their own once they are in the database."""
    query = "SELECT name, sql FROM sqlite_master WHERE type IN ('trigger', 'view')"
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
        migrate(fresh)
        known = set(fresh.execute(query))
    if strange := sorted(name for name, sql in set(db.execute(query)) - known):
        raise _unfit(file, f"no broker made {line(strange[0])} in it", "take another backup")


def damaged(db: sqlite3.Connection) -> list[tuple[str, bool]]:
    """Stored documents that are not what was applied once, and of each whether it is applied now."""
    expansions, column = "", "NULL"
    if version_of(db) >= _WITH_EXPANSIONS:
        expansions, column = "LEFT JOIN expansions e USING (kind, name, version)", "e.body"
    query = (
        f"SELECT kind, name, version, d.digest, d.body, {column}, a.position IS NOT NULL FROM documents d {expansions}"  # noqa: S608 - constants
        " LEFT JOIN applied a USING (kind, name, version)"
    )
    return [
        (f"{kind} {name} (version {version})", bool(applied))
        for kind, name, version, *stored, applied in db.execute(query)
        if is_damaged((kind, name, version), stored)
    ]


def _refuse_damaged_documents(db: sqlite3.Connection, file: Path) -> None:
    wrong = [line(what) for what, applied in damaged(db) if applied]
    if wrong:
        more = f" and {len(wrong) - _NAMED_MAX} more" if len(wrong) > _NAMED_MAX else ""
        raise _unfit(file, f"not what was applied: {', '.join(wrong[:_NAMED_MAX])}{more}", "take another backup")


def _unfit(file: Path, why: str, fix: str) -> PersonaError:
    return PersonaError(Fault.BAD_DOCUMENT, f"{file} is not restored: {why}; {fix}. Nothing was changed")


@dataclass(frozen=True, slots=True)
class Backup:
    """When one was made (Unix seconds; ``None`` = SQLite's own tools made it), and its newest revision; 0 = none."""

    at: float | None
    revision: int


def backup_of(db: sqlite3.Connection) -> Backup:
    """What an open backup says of itself.  Raises ``sqlite3.Error``."""
    at = meta_of(db, "backup_at")
    has = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'change_sets'").fetchone()
    number = db.execute("SELECT coalesce(max(revision), 0) FROM change_sets").fetchone()[0] if has else 0
    return Backup(float(at) if isinstance(at, int | float) else None, int(number))


def meta_of(db: sqlite3.Connection, key: str) -> object:
    """What a database keeps by a name; ``None`` where it keeps nothing, or what nobody can read."""
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    with suppress(ValueError, TypeError, RecursionError):
        return json.loads(row[0]) if row is not None else None
    return None
