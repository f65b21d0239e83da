"""What makes a search quick: beside each segment, the fields that are asked for, in a file that can be made anew.

Nothing here is evidence.  The broker brings the index up to date every few seconds, and so do ``prune`` and ``erase``;
appending never waits for it.  Whoever searches reads it (``lookup``).
"""

import logging
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from persona_broker.audit.chain import Chain
from persona_broker.audit.files import private_directory
from persona_broker.audit.segment import BUSY_S, Segment
from persona_broker.store.database import make_private, write_ahead

log = logging.getLogger("persona.audit")

FORMAT = 1
_EVERY_S = 5.0
_BLOCK = 20_000  # records of one transaction

_FIELD = "CASE WHEN json_valid({0}) THEN json_extract({0}, '$.{1}') END"
ENTRIES = (
    "CREATE TABLE entries (number INTEGER PRIMARY KEY, at_us INTEGER NOT NULL, guest TEXT, at REAL, user TEXT,"
    " session TEXT, program TEXT, event TEXT, decision TEXT, reason TEXT, persona TEXT)"
)
_TABLES = (
    ENTRIES,
    "CREATE INDEX entries_user ON entries (user)",
    "CREATE INDEX entries_session ON entries (session)",
    "CREATE INDEX entries_guest ON entries (guest)",
    "CREATE INDEX entries_program ON entries (program)",
    "CREATE INDEX entries_reason ON entries (reason) WHERE reason IS NOT NULL",
    "CREATE INDEX entries_denied ON entries (decision, at, reason) WHERE decision = 'denied'",
)
_EXTRACTED = ", ".join(
    _FIELD.format(column, name)
    for column, name in (
        ("facts", "at"),
        ("person", "user"),
        ("facts", "session"),
        ("person", "program"),
        ("facts", "event"),
        ("facts", "decision"),
        ("facts", "reason"),
        ("facts", "persona"),
    )
)
FILL = (  # after a number, so many
    f"INSERT INTO entries SELECT number, at_us, guest, {_EXTRACTED} FROM segment.records"  # noqa: S608 - constants
    " WHERE number > ? ORDER BY number LIMIT ?"
)


class Index:
    """The index of one segment, with the segment attached as ``segment``.  Raises ``sqlite3.Error``."""

    def __init__(self, segment: Path, progress: Callable[[int, int], None] = lambda _done, _all: None) -> None:
        Segment(segment).close()  # what is wrong with it is said by its name
        self._progress = progress
        folder = segment.parent / "index"
        private_directory(folder)
        self.path = folder / segment.name
        self._segment = segment
        try:
            self._db = self._open()
            self._catch_up()
        except sqlite3.DatabaseError as error:
            self._db.close()
            if isinstance(error, sqlite3.OperationalError):
                raise
            for end in ("", "-wal", "-shm"):  # it can be made anew
                self.path.with_name(self.path.name + end).unlink(missing_ok=True)
            self._db = self._open()
            self._catch_up()

    def close(self) -> None:
        """Ends the connection."""
        self._db.close()

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a query finds."""
        return self._db.execute(query, values).fetchall()

    def _open(self) -> sqlite3.Connection:
        make_private(self.path)
        db = self._db = sqlite3.connect(
            self.path.absolute().as_uri(), timeout=BUSY_S, isolation_level=None, check_same_thread=False, uri=True
        )
        write_ahead(db)
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA secure_delete = ON")
        db.execute("ATTACH ? AS segment", (f"{self._segment.absolute().as_uri()}?mode=ro",))
        if int(db.execute("PRAGMA main.user_version").fetchone()[0]) != FORMAT:
            db.execute("BEGIN IMMEDIATE")
            if int(db.execute("PRAGMA main.user_version").fetchone()[0]) != FORMAT:
                for table in _TABLES:
                    db.execute(table)
                db.execute(f"PRAGMA main.user_version = {FORMAT}")
            db.execute("COMMIT")
        return db

    def _catch_up(self) -> None:
        (last,) = self._db.execute("SELECT max(number) FROM segment.records").fetchone()
        while (done := self._through()) < (last or 0):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.execute(FILL, (self._through(), _BLOCK))
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            try:
                self._progress(done, last)
            except BaseException:
                self._db.close()
                raise

    def _through(self) -> int:
        return int(self._db.execute("SELECT ifnull(max(number), 0) FROM entries").fetchone()[0])

    def forget(self, numbers: list[int]) -> None:
        """Takes out what was erased."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany("UPDATE entries SET user = NULL, program = NULL WHERE number = ?", [(n,) for n in numbers])
        self._db.execute("COMMIT")
        self._db.execute("PRAGMA main.wal_checkpoint(TRUNCATE)")


class Indexer:
    """A thread that keeps the index of the newest segments up to date."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="indexer", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self, patience_s: float) -> None:
        """Ends after the transaction that it is in."""
        self._stop.set()
        self._thread.join(patience_s)

    def _run(self) -> None:
        seen = 0
        while not self._stop.wait(_EVERY_S):
            try:
                number = self._chain.head()[0]
                if number != seen:
                    for path in self._chain.segments()[-2:]:  # the one before may lack its last records
                        Index(path, self._go_on).close()
                    seen = number
            except (sqlite3.Error, OSError, InterruptedError) as error:
                if not self._stop.is_set():
                    log.warning("the index of the audit is not up to date; searches take longer: %s", error)

    def _go_on(self, _done: int, _all: int) -> None:
        if self._stop.is_set():
            raise InterruptedError("the broker ends")


def index_of(segment: Path) -> Path:
    """Where the index of a segment is."""
    return segment.parent / "index" / segment.name


def remove(segment: Path) -> None:
    """Deletes the index of a segment that was pruned."""
    path = index_of(segment)
    for end in ("", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
