"""Records that the broker does not have yet, numbered, in order, within a bound that users share.

On disk where that works, in memory where not: while the directory cannot be written, what comes is kept in memory, at
most 16 MiB of it, and goes to the disk once that takes it.  Nothing is lost unnoticed: what is not kept is counted, and
told by a record of the event ``lost`` with the numbers that it would have had.

Methods wait for the disk.  The loop, for which an exec waits, calls none of them but ``is_full`` and ``status``,
which wait for nothing.
"""

import logging
import os
import threading
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from persona.record_codec import Record, Stream
from persona_guest.audit.counter import Counter
from persona_guest.audit.entries import (
    AGENT_ENDED,
    DAMAGED,
    QUEUE_FULL,
    SPOOL_FULL,
    Batch,
    Entry,
    entry_of,
    first_of,
    marker_of,
    read_entry,
)
from persona_guest.audit.room import Room
from persona_guest.audit.segments import MACHINE_ID, Framed, Segment, Segments
from persona_guest.audit.spool_format import Summary

log = logging.getLogger("persona.record")

MIB = 1024 * 1024
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MEMORY = 16 * MIB
_MARKER_S = 10.0  # between two markers: what is lost meanwhile is one of them
_SHORT = 256 * 1024  # bytes: a user who has less room left gets no more starts that could not be recorded


@dataclass(frozen=True, slots=True)
class Status:
    """What waits, in bytes and by its oldest record (Unix seconds); what was lost since the agent began, by why."""

    waiting: int
    bound: int
    oldest_at: float | None
    lost: dict[str, int]
    not_on_disk: str  # why; empty where all is well
    aside: list[str]


class Spool:
    """``directory`` = ``None``: in memory only, and ``counter`` likewise."""

    def __init__(
        self,
        directory: Path | None = None,
        counter: Path | None = None,
        bound: int = _MEMORY,
        *,
        machine_id: Path = MACHINE_ID,
        boot: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Touches no file yet: ``open`` does."""
        self._directory, self._counter_path, self._machine_id = directory, counter, machine_id
        self._boot = _boot_id() if boot is None else boot
        self._lock = threading.Lock()
        self._clock = clock
        self._memory: deque[tuple[Entry, bytes]] = deque()  # not on disk; with their frames
        self._in_memory = 0  # bytes of these
        self._held_back = False  # a batch of them is on its way: none of them goes to the disk meanwhile
        self._segments: Segments | None = None
        self._lost: Tally[str] = Tally()
        self._oldest_at: float | None = None
        self._explained: set[tuple[int, int]] = set()  # what markers say that an agent before this one left
        self._marker_at = -_MARKER_S
        self.not_on_disk = "" if directory is not None else "it has no directory"
        self._bound = bound
        self._segment_max = min(MIB, bound // 16)
        self._room = Room(bound - 2 * self._segment_max)
        self._counter = Counter(None, None, self._boot)
        self.stream = self._counter.now.stream

    def open(self) -> None:
        """Takes up what an agent before this one left, which may be some seconds' work; call it before all else.

        Raises nothing: without a disk it keeps records in memory, and says so.
        """
        with self._lock:
            if self._directory is not None:
                try:
                    self._segments = Segments(self._directory, self._machine_id)
                except OSError as error:
                    self._no_disk(str(error))
            machine = self._segments.machine if self._segments is not None else None
            stream = Stream(machine, self._boot) if machine is not None else None
            self._counter = Counter(self._counter_path, stream, self._boot)
            self.stream = self._counter.now.stream
            if self._segments is not None:
                self._restore(self._segments)
            self._explain_missing()

    # --- the recorder's thread --------------------------------------------------------------------

    def add(self, records: Iterable[Record], dropped: int = 0) -> None:
        """Numbers and keeps records; ``dropped`` more were lost before they came here.  Raises nothing."""
        with self._lock:
            given = self._counter.now.given
            kept: list[tuple[Entry, bytes]] = []
            lost = Tally(dict(self._counter.now.dropped))
            lost.update({QUEUE_FULL: dropped} if dropped else {})
            self._lost[QUEUE_FULL] += dropped
            for record in records:
                one = entry_of(replace(record, number=given + 1))
                user, grant = one[0].held
                if self._room.has(user, one[0].size, grant=grant, free=self._free()):
                    given += 1
                    self._keep(one, kept)
                else:
                    lost[SPOOL_FULL] += 1
                    self._lost[SPOOL_FULL] += 1
            if lost and self._clock() >= self._marker_at + _MARKER_S and self._room.used < self._bound:
                self._marker_at = self._clock()
                log.error("records are lost: %s", ", ".join(f"{count} {why}" for why, count in lost.items()))
                for why in list(lost):
                    marker = marker_of(given + 1, given + lost.pop(why), why)
                    given = marker.number
                    self._keep(entry_of(marker), kept)
            self._put(kept, given, tuple(lost.items()))
            self._write()

    def lose(self, first: int, last: int, why: str) -> None:
        """Marks numbers of this stream as lost that were given already."""
        with self._lock:
            self._lose(first, last, why)

    def sync(self) -> None:
        """Has the disk keep what was added.  Raises nothing."""
        with self._lock:
            if self._segments is None:
                return
        why = self._segments.sync(self._lock)
        if why:
            with self._lock:
                self._no_disk(why)

    def close(self) -> None:
        """Has the disk keep all that it takes; what is in memory only, the agent after this one tells as lost."""
        with self._lock:
            self._held_back = False
            self._write()
            if self._memory:
                log.warning("%d records are neither sent nor on disk; the journal has them", len(self._memory))
            elif self._segments is not None:
                self._segments.empty(self.stream, self._counter.now.given + 1)
        self.sync()
        with self._lock:
            if self._segments is not None:
                self._segments.rest()
            self._counter.close()

    # --- the sender's thread ----------------------------------------------------------------------

    def batch(self, count: int, size: int) -> Batch | None:
        """The oldest that wait, at most ``count`` and some ``size`` bytes; ``None`` where none do.

        Follow it by ``sent`` or ``put_back``.
        """
        with self._lock:
            found = self._from_disk(count, size) or self._from_memory(count, size)
            self._oldest_at = found.entries[0].value.get("at") if found is not None else None
            self._held_back = found is not None and found.segment is None
            return found

    def sent(self, batch: Batch) -> None:
        """The broker has these for good: they are forgotten."""
        with self._lock:
            for entry in batch.entries:
                self._room.give_back(entry.held[0], entry.size, grant=entry.held[1])
            last = batch.entries[-1].number
            if batch.segment is None:
                self._held_back = False
                for _ in batch.entries:
                    self._in_memory -= len(self._memory.popleft()[1])
            else:
                batch.segment.sent, batch.segment.sent_number = batch.end, last
                for entry in batch.entries:
                    batch.segment.bytes_of[entry.held] -= entry.size
            if batch.stream == self.stream:
                self._counter.note(settled=last)
            if self._segments is not None:
                self._segments.drop_sent()

    def put_back(self) -> None:
        """They were not sent."""
        with self._lock:
            self._held_back = False

    # --- any thread -------------------------------------------------------------------------------

    def is_full(self, user: str) -> bool:
        """Whether one more granted start of this user's may find no room.  Waits for nothing."""
        return not self._room.has(user, min(_SHORT, self._segment_max), grant=True, free=self._free())

    def status(self) -> Status:
        """How full it is.  Waits for nothing."""
        segments = self._segments
        aside = list(segments.aside) if segments is not None else []
        lost = {why: count for why, count in dict(self._lost).items() if count}
        return Status(self._room.used, self._bound, self._oldest_at, lost, self.not_on_disk, aside)

    # --- with the lock ----------------------------------------------------------------------------

    def _free(self) -> int | None:
        """Bytes that memory may still take, where that is all that there is."""
        return _MEMORY - self._in_memory if self.not_on_disk else None

    def _keep(self, one: tuple[Entry, bytes], kept: list[tuple[Entry, bytes]]) -> None:
        entry = one[0]
        self._room.take(entry.held[0], entry.size, grant=entry.held[1])
        kept.append(one)

    def _put(self, kept: list[tuple[Entry, bytes]], given: int, dropped: tuple[tuple[str, int], ...]) -> None:
        self._counter.note(given=given, dropped=dropped)  # first: no number is used twice
        self._memory.extend(kept)
        self._in_memory += sum(len(frame) for _, frame in kept)

    def _lose(self, first: int, last: int, why: str) -> None:
        marker = replace(marker_of(first, last, why), number=self._counter.now.given + 1)
        kept: list[tuple[Entry, bytes]] = []
        self._keep(entry_of(marker), kept)
        self._lost[why] += last - first + 1
        self._put(kept, marker.number, self._counter.now.dropped)

    def _write(self) -> None:
        """From memory to the disk, as far as it takes it."""
        if self._segments is None or self._held_back:
            return
        while self._memory:
            part: list[tuple[Entry, bytes]] = []
            size = 0
            for one in self._memory:
                if part and size + len(one[1]) > self._segment_max:
                    break
                part.append(one)
                size += len(one[1])
            records = [Framed(entry.number, frame, entry.held, entry.lost) for entry, frame in part]
            try:
                self._segments.append(self.stream, records, self._segment_max)
            except OSError as error:
                self._no_disk(str(error))
                return
            for _ in part:
                self._memory.popleft()
            self._in_memory -= size
            if self.not_on_disk:
                log.warning("records are written to the spool again")
                self.not_on_disk = ""

    def _no_disk(self, why: str) -> None:
        if not self.not_on_disk:
            log.error(
                "records cannot be written to the spool (%s); they are kept in memory until they can be sent", why
            )
        self.not_on_disk = why

    def _from_disk(self, count: int, size: int) -> Batch | None:
        if self._segments is None:
            return None
        self._segments.drop_sent()
        for segment in list(self._segments.all):
            if segment.sent >= segment.end:
                continue
            why = "it does not read as it was written"
            try:
                frames = self._segments.read(segment, count, size)
                entries = [read_entry(payload) for payload in frames.payloads]
            except (OSError, ValueError) as error:
                entries, why = [], str(error)
            if not entries:
                self._damaged(self._segments, segment, why)
                continue
            taken = first_of(entries, size)
            end = segment.sent + sum(entry.size for entry in taken)
            return Batch(segment.stream, tuple(taken), segment, end)
        return None

    def _from_memory(self, count: int, size: int) -> Batch | None:
        entries = [entry for entry, _ in list(self._memory)[:count]]
        return Batch(self.stream, tuple(first_of(entries, size)), None, 0) if entries else None

    def _damaged(self, segments: Segments, segment: Segment, why: str) -> None:
        for (user, grant), size in segment.bytes_of.items():
            self._room.give_back(user, size, grant=grant)
        segments.damaged(segment, why)
        if segment.stream == self.stream and segment.last > segment.sent_number:
            self._lose(segment.sent_number + 1, segment.last, DAMAGED)

    # --- at the beginning -------------------------------------------------------------------------

    def _restore(self, segments: Segments) -> None:
        now = self._counter.now
        given = now.given
        for segment, found in segments.restore(self.stream, now.settled):
            settled = now.settled if segment.stream == self.stream else 0
            if isinstance(found, Summary):
                self._take_up_summed(segment, found, settled)
            else:
                self._take_up(segment, found, settled)
            if segment.stream == self.stream:
                self._explained.update(segment.lost)
                given = max(given, segment.last)
        self._counter.note(given=given)

    def _take_up_summed(self, segment: Segment, summary: Summary, settled: int) -> None:
        segment.lost += summary.lost
        if summary.last <= settled:
            segment.sent, segment.sent_number = segment.end, summary.last
            return
        for (user, grant), size in summary.held:
            self._room.take(user, size, grant=grant)
            segment.bytes_of[user, grant] += size

    def _take_up(self, segment: Segment, payloads: Iterable[bytes], settled: int) -> None:
        for payload in payloads:
            try:
                entry = read_entry(payload)
            except ValueError as error:  # whole, and not what was written here: the rest is not touched
                log.error("%s: %s; it is kept when the others were sent", segment.path, error)
                segment.damaged = True
                break
            segment.last = entry.number
            segment.count(entry.held, entry.size, entry.lost)
            if entry.number <= settled:
                segment.sent, segment.sent_number = segment.sent + entry.size, entry.number
            else:
                self._room.take(entry.held[0], entry.size, grant=entry.held[1])
                segment.bytes_of[entry.held] += entry.size
        if segment.damaged:
            segment.end = segment.sent + sum(segment.bytes_of.values())

    def _explain_missing(self) -> None:
        """Says which numbers of this boot an agent before this one gave and did not write, or a bad disk took."""
        have: int | None = self._counter.now.settled if self._counter.is_known else None
        gaps = []
        for segment in self._segments.all if self._segments is not None else ():
            if segment.stream != self.stream:
                continue
            if have is not None and segment.sent_number > have:
                gaps.append((have + 1, segment.sent_number, DAMAGED))
            have = max(have or 0, segment.last)
        given = self._counter.now.given
        if have is not None and given > have:
            gaps.append((have + 1, given, AGENT_ENDED))
        for first, last, why in gaps:
            if (first, last) in self._explained:
                continue
            log.warning("records %d to %d of this boot are lost, %s: the broker will be told", first, last, why)
            self._lose(first, last, why)


def _boot_id() -> str:
    """This boot's own; where the kernel does not say it, one that no other agent has."""
    try:
        return BOOT_ID.read_text("ascii").strip().replace("-", "")
    except (OSError, UnicodeDecodeError):
        return os.urandom(16).hex()
