"""Reads one segment by the fields that are asked for, and writes nothing, also where nothing can be written.

What its index has is found there; what the index does not have yet, or all where there is none that can be read, is put
into a temporary file that nobody else sees and that goes with the connection.
"""

import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from persona_broker.audit.index import ENTRIES, FILL, FORMAT, index_of
from persona_broker.audit.segment import Segment
from persona_broker.store.database import read_only, read_only_uri, unread_log

_BLOCK = 20_000  # records between two words of progress

Progress = Callable[[int, int], None]


class Part:
    """Entries of a segment, with the segment attached as ``segment``.  Raises ``sqlite3.Error``."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a query of the table ``entries`` finds."""
        return self._db.execute(query, values).fetchall()

    def last(self) -> int:
        """The number of its newest record; 0 where it has none."""
        return int(self.rows("SELECT ifnull(max(number), 0) FROM entries")[0][0])

    def close(self) -> None:
        """Ends the connection."""
        self._db.close()


class Lookup:
    """``parts`` have each record after the number ``after`` once, the older ones first.

    Raises ``sqlite3.Error``, also where the index is more than ``behind_max`` records behind.
    """

    def __init__(
        self,
        segment: Path,
        progress: Progress = lambda _done, _all: None,
        after: int = 0,
        behind_max: int | None = None,
    ) -> None:
        Segment(segment).close()  # what is wrong with it is said by its name
        self.parts: list[Part] = []
        try:
            kept = _kept(segment)
            if kept is not None:
                self.parts.append(kept)
                after = max(after, kept.last())
            self._read(segment, after, behind_max, progress)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends its connections."""
        for part in self.parts:
            part.close()

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a query of the table ``entries`` finds in each part, one after the other."""
        return [row for part in self.parts for row in part.rows(query, *values)]

    def _read(self, segment: Path, after: int, behind_max: int | None, progress: Progress) -> None:
        db = sqlite3.connect("", isolation_level=None, check_same_thread=False, uri=True)
        fresh = Part(db)
        self.parts.append(fresh)
        db.execute("PRAGMA journal_mode = OFF")  # nobody else has it
        db.execute(ENTRIES)
        db.execute("ATTACH ? AS segment", (read_only_uri(segment),))
        (last,) = db.execute("SELECT ifnull(max(number), 0) FROM segment.records").fetchone()
        if behind_max is not None and last - after > behind_max:
            raise sqlite3.OperationalError(f"{index_of(segment)} is {last - after} records behind; it is being made")
        while after < last:
            db.execute(FILL, (after, _BLOCK))
            after = fresh.last()
            progress(after, last)


def _kept(segment: Path) -> Part | None:
    """What the index has, as of now; ``None`` where there is none that can be read."""
    path = index_of(segment)
    if unread_log(path) is not None:  # SQLite would read half of the index: use the chain's own file
        return None
    with suppress(sqlite3.Error, OSError):
        db = read_only(path)
        try:
            db.execute("ATTACH ? AS segment", (read_only_uri(segment),))
            db.execute("BEGIN")  # whatever is indexed meanwhile is not seen: it is in the other part
            if int(db.execute("PRAGMA main.user_version").fetchone()[0]) == FORMAT:
                part = Part(db)
                part.last()
                return part
        except sqlite3.Error:
            db.close()
            raise
        db.close()
    return None
