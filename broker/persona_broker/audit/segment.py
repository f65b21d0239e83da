"""One day of the chain: an SQLite file (WAL) with the records, and what is known of the streams of guests.

Whoever appends holds SQLite's own write lock, so several processes make one order.  A commit is on the disk when it
returns (``synchronous = FULL``).
"""

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_broker.audit.core.format import (
    HASH_BYTES,
    SALT_BYTES,
    Entry,
    Row,
    Stream,
    link,
    message,
    person_digest,
    to_json,
)
from persona_broker.audit.core.streams import Gap, Received
from persona_broker.audit.new_segment import FORMAT
from persona_broker.store.database import read_only_uri

BUSY_S = 5.0
STREAMS_MAX = 1000  # of one guest that are remembered from one segment to the next: as many boots
_TRUNCATE_TRIES, _TRUNCATE_PAUSE_S = 20, 0.1
GAPS_MAX = 10_000  # of one stream that are remembered; 'audit verify' counts all

_COLUMNS = (
    "number, at_us, guest, (SELECT machine || ' ' || boot FROM streams WHERE id = stream), counter, facts, person, hash"
)


class SegmentError(sqlite3.DatabaseError):
    """A file of the chain that cannot be used; the message names it and the way out."""


class Segment:
    """An open file of the chain.  Not for several threads at once."""

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        """Raises ``SegmentError`` where it is none, ``FileNotFoundError`` where there is nothing."""
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}")
        self.path = path
        uri = f"{path.absolute().as_uri()}?mode=rw" if writable else read_only_uri(path)
        self._db = sqlite3.connect(uri, timeout=BUSY_S, isolation_level=None, check_same_thread=False, uri=True)
        try:
            found = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            if found != FORMAT:
                raise SegmentError(_broken(path, f"its format is {found}, and this persona-broker knows {FORMAT}"))
            if writable:
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.execute("PRAGMA secure_delete = ON")  # what is erased is gone from the file, too
            self.chain = self.meta("chain")
        except sqlite3.DatabaseError as error:
            self._db.close()
            if isinstance(error, SegmentError | sqlite3.OperationalError):
                raise
            raise SegmentError(_broken(path, str(error))) from error

    def close(self) -> None:
        """Ends the connection."""
        self._db.close()

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a query finds."""
        return self._db.execute(query, values).fetchall()

    def rows_in_bytes(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """The same, but SQLite returns text as bytes: verify hashes bytes, and decoding each text would cost time."""
        self._db.text_factory = bytes
        try:
            return self._db.execute(query, values).fetchall()
        finally:
            self._db.text_factory = str

    def span(self) -> tuple[int | None, int]:
        """Number of the first record, ``None`` where there is none, and of the last.

        Each is a query of its own: SQLite finds one of them at once, and reads everything where both are asked for.
        """
        query = "SELECT (SELECT min(number) FROM records), (SELECT ifnull(max(number), 0) FROM records)"
        ((first, last),) = self.rows(query)
        return first, last

    def meta(self, key: str) -> str:
        """What is noted under a key; empty where nothing is."""
        found = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return str(found[0]) if found is not None else ""

    @property
    def name(self) -> str:
        """The day, as the file is called."""
        return self.path.stem

    def sealed(self) -> str:
        """The segment that goes on where this one ended; empty where it did not end."""
        return self.meta("sealed")

    def head(self) -> tuple[int, bytes]:
        """Number and hash of the newest record."""
        found = self._db.execute("SELECT number, hash FROM records ORDER BY number DESC LIMIT 1").fetchone()
        if found is None or not isinstance(found[1], bytes) or len(found[1]) != HASH_BYTES:
            raise SegmentError(_broken(self.path, "its newest record has no hash"))
        return int(found[0]), found[1]

    def read(self, after: int, limit: int = -1) -> list[Row]:
        """The records after a number, in order."""
        query = f"SELECT {_COLUMNS} FROM records WHERE number > ? ORDER BY number LIMIT ?"  # noqa: S608 - constants
        return [_row(*found) for found in self._db.execute(query, (after, limit))]

    def of_counter(self, guest: str, stream: Stream, counter: int) -> list[Row]:
        """What came under a number of a stream."""
        query = (
            f"SELECT {_COLUMNS} FROM records WHERE counter = ? AND stream ="  # noqa: S608 - constants
            " (SELECT id FROM streams WHERE guest = ? AND machine = ? AND boot = ?)"
        )
        return [_row(*found) for found in self._db.execute(query, (counter, guest, stream.machine, stream.boot))]

    def carried(self) -> str:
        """What is known of the streams, as JSON; of each guest the newest STREAMS_MAX."""
        newest = "row_number() OVER (PARTITION BY guest ORDER BY id DESC) AS place"
        columns = "id, guest, machine, boot, last, conflicts"
        query = f"SELECT {columns} FROM (SELECT *, {newest} FROM streams) WHERE place <= ? ORDER BY id"  # noqa: S608 - constants
        streams = self.rows(query, STREAMS_MAX)
        return to_json([[*rest, self.gaps(ident)] for ident, *rest in streams])

    def gaps(self, stream: int) -> list[list[Any]]:
        """The gaps of a stream: first, last, why."""
        return [
            list(gap) for gap in self.rows("SELECT first, last, why FROM gaps WHERE stream = ? ORDER BY first", stream)
        ]

    def erase(self, numbers: list[int]) -> None:
        """Replaces the person's part of these records by its digest, in one transaction."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for number in numbers:
                found = self._db.execute(
                    "SELECT salt, person FROM records WHERE number = ? AND person IS NOT NULL", (number,)
                ).fetchone()
                if found is not None:
                    row = (person_digest(*found), number)
                    self._db.execute("UPDATE records SET person = NULL, salt = NULL, digest = ? WHERE number = ?", row)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def truncate_log(self) -> None:
        """Leaves nothing of what was erased in the write-ahead log.  Raises ``sqlite3.Error`` where others hold it."""
        for _ in range(_TRUNCATE_TRIES):
            busy, *_ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if not busy:
                return
            time.sleep(_TRUNCATE_PAUSE_S)
        raise sqlite3.OperationalError(f"{self.path}-wal: others read it; the same command again erases it there too")

    @contextmanager
    def writing(self) -> Iterator["Writer"]:
        """One transaction: all of it is on the disk afterwards, or nothing where it raises."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            writer = Writer(self, self._db)
            yield writer
            writer.flush()
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # with a full disk, SQLite has rolled it back itself
                self._db.execute("ROLLBACK")
            raise


@dataclass(slots=True)
class StreamState:
    """What a segment knows of a stream; what is changed in ``received`` is written with the transaction."""

    id: int
    guest: str
    stream: Stream
    received: Received
    gaps: list[Gap]  # as they are written


class Writer:
    """Appends within one transaction."""

    def __init__(self, segment: Segment, db: sqlite3.Connection) -> None:
        self._segment = segment
        self._db = db
        self.number, self.hash = segment.head()
        self._rows: list[tuple[Any, ...]] = []
        self._salts, self._salted = b"", 0  # random bytes, and how many of them are used
        self._states: dict[tuple[str, Stream], StreamState] = {}

    def add(self, entry: Entry, at_us: int, guest: str | None = None, state: StreamState | None = None) -> int:
        """Appends one record; its number."""
        if self._salted == len(self._salts):
            self._salts, self._salted = os.urandom(SALT_BYTES * 256), 0
        salt = self._salts[self._salted : self._salted + SALT_BYTES]
        self._salted += SALT_BYTES
        number = self.number + 1
        ident, stream = (state.id, state.stream) if state is not None else (None, None)
        said = message(number, at_us, guest, stream, entry.counter, entry.facts)
        self.hash = link(self.hash, person_digest(salt, entry.person), said)
        self._rows.append(
            (number, at_us, guest, ident, entry.counter, entry.facts, entry.person, salt, None, self.hash)
        )
        self.number = number
        return number

    def put(self, key: str, value: str) -> None:
        """Notes something under a key."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def conflict(self, state: StreamState) -> None:
        """Counts a number that came with two contents."""
        self._db.execute("UPDATE streams SET conflicts = conflicts + 1 WHERE id = ?", (state.id,))

    def find(self, state: StreamState, counter: int) -> list[Row]:
        """What this segment has under a number of a stream, what this transaction appended included."""
        self.flush()
        return self._segment.of_counter(state.guest, state.stream, counter)

    def moved(self) -> set[str]:
        """What the last batch took over from the broker's database."""
        return set(json.loads(self._segment.meta("moved") or "[]"))

    def move(self, uids: list[str]) -> None:
        """The same, of this batch."""
        self.put("moved", to_json(uids))

    def flush(self) -> None:
        """Writes what was added."""
        if self._rows:
            self._db.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", self._rows)
            self._rows.clear()
        for state in self._states.values():
            last = state.received.last
            self._db.execute("UPDATE streams SET last = ? WHERE id = ? AND last != ?", (last, state.id, last))
            if state.received.gaps != state.gaps:
                self._db.execute("DELETE FROM gaps WHERE stream = ?", (state.id,))
                rows = [(state.id, gap.first, gap.last, gap.why) for gap in state.received.gaps[:GAPS_MAX]]
                self._db.executemany("INSERT INTO gaps VALUES (?, ?, ?, ?)", rows)
                state.gaps = list(state.received.gaps)

    def state(self, guest: str, stream: Stream) -> StreamState:
        """What is known of a stream; of a new one nothing, and it is known from now on."""
        known = self._states.get((guest, stream))
        if known is not None:
            return known
        query = "SELECT id, last FROM streams WHERE guest = ? AND machine = ? AND boot = ?"
        found = self._db.execute(query, (guest, stream.machine, stream.boot)).fetchone()
        if found is None:
            insert = "INSERT INTO streams (guest, machine, boot, last) VALUES (?, ?, ?, 0) RETURNING id"
            found = (self._db.execute(insert, (guest, stream.machine, stream.boot)).fetchone()[0], 0)
        gaps = [Gap(*gap) for gap in self._segment.gaps(found[0])]
        known = StreamState(found[0], guest, stream, Received(found[1], list(gaps)), gaps)
        self._states[guest, stream] = known
        return known


def _row(
    number: int, at_us: int, guest: str | None, stream: str | None, counter: int | None, facts: str, person: str | None,
    hashed: bytes,
) -> Row:  # fmt: skip
    machine, _, boot = stream.partition(" ") if stream is not None else ("", "", "")
    return Row(number, at_us, guest, Stream(machine, boot) if stream else None, counter, facts, person, hashed)


def _broken(path: Path, why: str) -> str:
    fix = "move it away, with the files of its name, and keep it: the chain goes on in a new one"
    return f"{path}: {why}; nothing was changed in it; {fix}, and 'audit verify' says what is missing"
