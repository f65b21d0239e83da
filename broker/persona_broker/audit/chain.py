"""The chain of all records: a directory with a file a day, and how several processes append to it.

A segment ends with a sealing record that names the next; the next begins with its number and hash.  So one file's write
lock (SQLite's) makes the order, and from whatever a process leaves behind that dies in between, any other goes on.
"""

import contextlib
import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from persona_broker.audit.core.events import event
from persona_broker.audit.core.format import Entry, Row, Stream
from persona_broker.audit.delivery import Delivery, Kept, deliver
from persona_broker.audit.files import private_directory
from persona_broker.audit.new_segment import Start, create
from persona_broker.audit.segment import BUSY_S, Segment, Writer
from persona_broker.store.database import unread_log

log = logging.getLogger("persona.audit")

T = TypeVar("T")

_NAME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}\.db")
_SCRATCH_MAX_S = 3600.0  # a segment is begun in milliseconds
_EARLIER_MAX = 30  # segments in which a number that came again is looked for: nobody can make an append wait for more


@dataclass(slots=True)
class _Waiting:
    """What a thread wants appended, and what became of it."""

    work: Callable[[Writer, int], object]
    done: threading.Event = field(default_factory=threading.Event)
    result: object = None
    error: BaseException | None = None


class Chain:
    """One per process; any thread may call.  Nothing is opened before it is needed.

    Threads that append at the same moment share one transaction: the disk is waited for once.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self.directory = directory
        self._clock = clock
        self._current: Segment | None = None
        self._inode = 0
        self._earlier_ones: dict[Path, Segment] = {}  # that are open while something is appended
        self._settled: set[Path] = set()  # sealed segments that are files of their own
        self._lock = threading.Lock()
        self._queue: list[_Waiting] = []
        self._queue_lock = threading.Lock()

    def close(self) -> None:
        """Ends the connection."""
        with self._lock:
            self._leave()

    def segments(self) -> list[Path]:
        """The files of the chain, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if _NAME.fullmatch(path.name))

    def unread(self) -> list[Path]:
        """Logs beside segments with records that cannot be read here, since nothing can be written (``unread_log``)."""
        return [log for path in self.segments() if (log := unread_log(path)) is not None]

    def head(self) -> tuple[int, bytes]:
        """Number and hash of the newest record; 0 and nothing where there is none yet.  Raises ``sqlite3.Error``."""
        for path in self.segments()[:-2:-1]:
            with closing(Segment(path)) as segment:
                return segment.head()
        return 0, b""

    def newest_before(self, began: float) -> float:
        """When the newest record came that was there at a moment, in Unix seconds; 0 where there was none yet.

        The clock may have been wrong before: what came since ``began`` is what has a time from then until now.
        Raises ``sqlite3.Error``.
        """
        query = "SELECT at_us FROM records WHERE at_us NOT BETWEEN ? AND ? ORDER BY number DESC LIMIT 1"
        for path in self.segments()[::-1]:
            with closing(Segment(path)) as segment:
                rows = segment.rows(query, int(began * 1e6), int(self._clock() * 1e6))
                if rows:
                    return float(rows[0][0]) / 1e6
        return 0.0

    def id(self) -> str:
        """What tells this chain from another; empty where there is none yet.  Raises ``sqlite3.Error``."""
        for path in self.segments()[:-2:-1]:
            with closing(Segment(path)) as segment:
                return segment.chain
        return ""

    def missing(self) -> int:
        """How many numbers of guests never came, without a word.  Raises ``sqlite3.Error``."""
        for path in self.segments()[:-2:-1]:
            with closing(Segment(path)) as segment:
                query = "SELECT ifnull(sum(last - first + 1), 0) FROM gaps WHERE why = ''"
                return int(segment.rows(query)[0][0])
        return 0

    def sweep(self) -> None:
        """Removes what processes left that were killed while they began a segment.  Raises ``OSError``."""
        for path in self.directory.iterdir():
            if path.name.startswith(".") and self._clock() - path.stat().st_mtime > _SCRATCH_MAX_S:
                path.unlink(missing_ok=True)

    def settle(self) -> None:
        """Makes sealed segments files of their own, without a log beside them, which read-only media can hold.

        One that somebody else has open is left for later.
        """
        for path in self.segments()[:-1]:
            if path in self._settled:
                continue
            # SQLite alone opens it: to close it elsewhere would end the locks that this process has on it
            uri = f"{path.absolute().as_uri()}?mode=rw"  # none is made where one was pruned meanwhile
            with contextlib.suppress(sqlite3.Error), closing(sqlite3.connect(uri, timeout=0, uri=True)) as db:
                if db.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",):
                    self._settled.add(path)

    def read(self, after: int, limit: int) -> list[Row]:
        """The records after a number, in order, at most so many.  Raises ``sqlite3.Error``."""
        found: list[Row] = []
        for path in self.after(after):
            with closing(Segment(path)) as segment:
                found += segment.read(after, limit - len(found))
            if len(found) >= limit:
                break
        return found

    def after(self, number: int) -> list[Path]:
        """The segments that can hold a record after a number, oldest first.  Raises ``sqlite3.Error``."""
        paths = self.segments()
        for index in range(len(paths) - 1, -1, -1):
            with closing(Segment(paths[index])) as segment:
                (first,) = segment.rows("SELECT min(number) FROM records")[0]
            if first is not None and first <= number + 1:
                return paths[index:]
        return paths

    def deliver(self, deliveries: Sequence[Delivery]) -> list[Kept]:
        """Appends what guests told; it is on the disk when this returns.  Raises ``sqlite3.Error``, ``OSError``."""

        def work(writer: Writer, at_us: int) -> list[Kept]:
            return [deliver(writer, delivery, at_us, self._earlier) for delivery in deliveries]

        return self._append(work)

    def add(self, entries: Sequence[Entry]) -> None:
        """Appends what the broker says itself.  Raises as ``deliver``."""

        def work(writer: Writer, at_us: int) -> None:
            for entry in entries:
                writer.add(entry, at_us)

        self._append(work)

    def change(self, work: Callable[[Writer, int], object]) -> None:
        """Has something done in a transaction of its own.  Raises as ``deliver``, and what ``work`` does."""
        with self._lock:
            mine = _Waiting(work)
            self._commit([mine])
        if mine.error is not None:
            raise mine.error

    def _append(self, work: Callable[[Writer, int], T]) -> T:
        mine = _Waiting(work)
        with self._queue_lock:
            self._queue.append(mine)
        with self._lock:  # whoever comes first does what all others wait for
            if not mine.done.is_set():
                with self._queue_lock:
                    taken, self._queue = self._queue, []
                self._commit(taken)
        if mine.error is not None:
            raise mine.error
        return mine.result  # type: ignore[return-value]  # the commit put it there

    def _commit(self, taken: list[_Waiting]) -> None:
        try:
            self._transact(taken)
        except BaseException as error:
            self._leave()  # whatever it was: the next one looks at the files anew
            for waiting in taken:
                waiting.error = error
            if not isinstance(error, Exception):
                raise
        finally:
            for segment in self._earlier_ones.values():
                segment.close()
            self._earlier_ones.clear()
            for waiting in taken:
                waiting.done.set()

    def _transact(self, taken: list[_Waiting]) -> None:
        deadline = time.monotonic() + BUSY_S
        while time.monotonic() < deadline:
            segment = self._open()
            day = self._day()
            with segment.writing() as writer:
                if not segment.sealed():
                    if day <= segment.name:  # a clock that went back reopens nothing
                        at_us = int(self._clock() * 1e6)
                        for waiting in taken:
                            waiting.result = waiting.work(writer, at_us)
                        return
                    writer.add(event("segment_sealed", self._clock(), next=day), int(self._clock() * 1e6))
                    writer.put("sealed", day)
            self._leave()
        raise sqlite3.OperationalError(f"{self.directory}: its newest segment is sealed, and no next one can be begun")

    def _open(self) -> Segment:
        """The segment to append to; begins the chain, or the segment that a sealed one names."""
        if self._current is not None and _is_there(self._current.path, self._inode):
            return self._current
        self._leave()
        private_directory(self.directory)
        paths = self.segments()
        if not paths:
            self._begin(self._day(), Start(os.urandom(16).hex(), None, 0, b""))
            paths = self.segments()
        path = paths[-1]
        with closing(Segment(path)) as segment:
            if following := segment.sealed():
                start = Start(segment.chain, segment.name, *segment.head(), segment.carried(), segment.meta("moved"))
                self._begin(following, start)
                path = self.directory / f"{following}.db"
        self._current, self._inode = Segment(path, writable=True), path.stat().st_ino
        return self._current

    def _begin(self, day: str, start: Start) -> None:
        try:
            create(self.directory / f"{day}.db", start, int(self._clock() * 1e6))
        except FileExistsError:  # another process was faster
            return
        log.info("the audit goes on in %s/%s.db", self.directory, day)

    def _leave(self) -> None:
        if self._current is not None:
            self._current.close()
            self._current = None

    def _day(self) -> str:
        now = datetime.fromtimestamp(self._clock(), UTC)
        return now.strftime("%Y-%m-%d")

    def _earlier(self, guest: str, stream: Stream, counter: int) -> Iterator[Row]:
        """What segments before the open one have under a number of a stream, the newest first."""
        paths = self.segments()
        for path in paths[-2 : -2 - _EARLIER_MAX : -1]:
            if path not in self._earlier_ones:
                self._earlier_ones[path] = Segment(path)
            yield from self._earlier_ones[path].of_counter(guest, stream, counter)


def _is_there(path: Path, inode: int) -> bool:
    try:
        return path.stat().st_ino == inode
    except FileNotFoundError:
        return False
