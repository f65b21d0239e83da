"""One SQLite file (WAL) behind a lock: its connection, its transactions, and the values that are kept by name.

Every process opens its own; ``data_version`` tells cheaply whether another wrote.  The generation is
raised in the same transaction as the change that it announces.
"""

import contextlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from persona_broker.store.interface import StoreError
from persona_broker.store.schema import SqliteError, check, migrate

log = logging.getLogger("persona.record")

TIMEOUT_S = 5.0  # how long a transaction waits for that of another process
_SKIPPED_MAX = 1000  # rows that cannot be read of which the log tells
T = TypeVar("T")


class Access(Enum):
    """What a connection is for."""

    READ = "read"  # not one byte of the database is written, and it is not brought to another version
    WRITE = "write"  # made where there is none, and brought to this version


@contextmanager
def as_store_error() -> Iterator[None]:
    """What SQLite says becomes a ``StoreError``."""
    try:
        yield
    except StoreError:
        raise
    except sqlite3.Error as error:
        raise SqliteError(str(error)) from error


def read_write(path: Path) -> sqlite3.Connection:
    """A connection to the file, which is made where there is none.  Raises ``sqlite3.Error``, ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make_private(path)
    return sqlite3.connect(path, timeout=TIMEOUT_S, isolation_level=None, check_same_thread=False)


def make_private(path: Path) -> None:
    """Makes an empty file before SQLite does: who may read it knows every guest's commands.  Raises ``OSError``.

    One that is there is not even opened: when a process closes any descriptor of a file, it loses all its POSIX locks
    on that file, SQLite's too.
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(os.path.realpath(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        if os.geteuid() == 0:  # 'sudo persona-broker apply' must not keep the service's user out
            owner = path.parent.stat()
            os.chown(path, owner.st_uid, owner.st_gid)


def write_ahead(db: sqlite3.Connection) -> None:
    """Turns the write-ahead log on.  Raises ``sqlite3.Error``.

    While another connection does the same, SQLite refuses at once, whatever the timeout is: so this tries again.
    """
    until = time.monotonic() + TIMEOUT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(0.01)


def read_only(path: Path) -> sqlite3.Connection:
    """A connection that cannot write, also on a file system that nobody can write to.  Raises ``sqlite3.Error``."""
    uri = read_only_uri(path)
    return sqlite3.connect(uri, uri=True, timeout=TIMEOUT_S, isolation_level=None, check_same_thread=False)


def read_only_uri(path: Path) -> str:
    """The same, for a connection that this file is attached to."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    return f"{uri}&immutable=1" if _is_read_alone(path) else uri


def unread_log(path: Path) -> Path | None:
    """The write-ahead log beside a file that a reader here must leave out, ``None`` where there is none."""
    log = path.with_name(f"{path.name}-wal")
    return log if _is_read_alone(path) and log.exists() and log.stat().st_size else None


def _is_read_alone(path: Path) -> bool:
    """Whether SQLite has to take a file as it is, without what is beside it.

    It can do with a log and an index of it (``-wal``, ``-shm``) that are there, and not make them in a directory that
    cannot be written to: a read-only disk, or another user's.
    """
    beside = [path.with_name(path.name + end) for end in ("-wal", "-shm")]
    return not os.access(path.parent, os.W_OK, effective_ids=True) and not all(file.exists() for file in beside)


class Database:
    """One connection behind a lock.

    Raises ``StoreError`` where the file cannot be used, is a newer broker's, or an older one's and is only read; every
    method does, where it cannot be used any more.
    """

    def __init__(self, path: Path, access: Access = Access.WRITE) -> None:
        self._lock = threading.RLock()
        if access is Access.READ and (log := unread_log(path)) is not None:
            fix = "copy both to where you can write"
            raise SqliteError(f"{log} has newer changes, which cannot be read where nothing can be written; {fix}")
        with as_store_error():
            self._db = read_only(path) if access is Access.READ else read_write(path)
            try:
                if access is Access.READ:
                    check(self._db)
                else:
                    write_ahead(self._db)
                    self._db.execute("PRAGMA synchronous = NORMAL")
                    migrate(self._db)
            except BaseException:
                self._db.close()
                raise
        self._skipped: set[str] = set()  # each is logged once

    def close(self) -> None:
        """Ends the connection."""
        with self._lock:
            self._db.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it, or nothing where it raises."""
        with self._lock, as_store_error():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # with a full disk, SQLite has rolled it back itself
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Everything that is read within is of one moment."""
        with self._lock, as_store_error():
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._db.execute("COMMIT")

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a query finds."""
        with self._lock, as_store_error():
            return self._db.execute(query, values).fetchall()

    def data_version(self) -> int:
        """Another number after each write of another connection (PRAGMA data_version; microseconds)."""
        return int(self.rows("PRAGMA data_version")[0][0])

    def generation(self) -> int:
        """The number of the newest change that can change a decision."""
        return int(self.rows("SELECT value FROM meta WHERE key = 'generation'")[0][0])

    def stamp(self) -> tuple[int, int]:
        """The generation, and how often documents moved within their files: that changes no decision."""
        query = "SELECT value FROM meta WHERE key IN ('generation', 'moved') ORDER BY key"
        (generation,), (moved,) = self.rows(query)
        return int(generation), int(moved)

    def raise_generation(self) -> int:
        """Announces a change made elsewhere (a condition that began or ceased to hold)."""
        with self.writing() as db:
            return raise_generation(db)

    def meta(self, key: str, parse: Callable[[Any], T], default: T) -> T | None:
        """What is kept under a key; ``default`` where nothing is, ``None`` where it cannot be read."""
        rows = self.rows("SELECT value FROM meta WHERE key = ?", key)
        if not rows:
            return default
        try:
            return parse(json.loads(rows[0][0]))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            self.skip(f"meta {key}", error)
            return None

    def skip(self, what: str, error: Exception) -> None:
        """Logs, once, that a row cannot be read."""
        if what not in self._skipped and len(self._skipped) < _SKIPPED_MAX:
            self._skipped.add(what)
            log.error("%s cannot be read and does not count: %r", what, error)


def raise_generation(db: sqlite3.Connection) -> int:
    """Within the transaction of the change that it announces."""
    db.execute("UPDATE meta SET value = value + 1 WHERE key = 'generation'")
    return int(db.execute("SELECT value FROM meta WHERE key = 'generation'").fetchone()[0])


def put_meta(db: sqlite3.Connection, key: str, value: Any) -> None:
    """Keeps a value by name."""
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))
