"""Reads the chain's files for ``core.verify``: in blocks, by several processes, and whatever state they are in."""

import gc
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from persona_broker.audit.chain import Chain
from persona_broker.audit.core.check import Checked, check
from persona_broker.audit.core.checkpoint import Checkpoint
from persona_broker.audit.core.format import Stream
from persona_broker.audit.core.verify import Opening, Verification
from persona_broker.audit.segment import Segment

Progress = Callable[[int, str], None]

_BLOCK = 2000  # records that are in memory at once
_PART = 25_000  # numbers that one process looks at before it takes others
_ALONE_MAX = 40_000  # records for which no other process is begun
_PROCESSES_MAX = 8
_LINKS = (
    "SELECT number, at_us, guest, stream, counter, facts, person, salt, digest, hash FROM records"
    " WHERE number BETWEEN ? AND ? ORDER BY number"
)


@dataclass(frozen=True, slots=True)
class _Part:
    """Records of one segment, and the numbers of which checkpoints tell."""

    path: Path
    first: int
    last: int
    wanted: frozenset[int]


def _quiet(_done: int, _where: str) -> None:
    pass


def verify(chain: Chain, checkpoints: Iterable[Checkpoint], progress: Progress = _quiet) -> Verification:
    """Walks all segments; ``checkpoints`` are those whose signatures are right.  Raises ``OSError``."""
    held = list(checkpoints)
    found = Verification()
    wanted = frozenset(item.number for item in held)
    pruned = [item for item in held if item.pruned_from]
    done: list[Path] = []
    with ExitStack() as stack:
        pool = _pool(chain.segments(), stack)
        while new := [path for path in chain.segments() if path not in done]:  # a day may end meanwhile
            for path in new:
                try:
                    with closing(Segment(path)) as segment:
                        _walk(segment, found, pruned, wanted, pool, progress)
                except sqlite3.Error as error:
                    found.note("broken", f"it cannot be read: {error}", path.name)
            done += new
    found.finish(held)
    return found


def verify_segments(paths: Sequence[Path]) -> Verification:
    """Looks at some segments, each by itself: whether its records are what their hashes say.  Raises ``OSError``."""
    every = Verification()
    for path in paths:
        found = Verification()
        try:
            with closing(Segment(path)) as segment:
                (first,) = segment.rows("SELECT min(number) FROM records")[0]
                opening = _opening(segment)
                found.number, found.hash = (first or 1) - 1, opening.previous
                _take(segment, opening, found, frozenset(), None, _quiet)
        except sqlite3.Error as error:
            found.note("broken", f"it cannot be read: {error}", path.name)
        every.findings += found.findings
        every.records += found.records
    return every


def _pool(paths: Iterable[Path], stack: ExitStack) -> Executor | None:
    """Other processes, where there is much to look at and there are CPUs for it."""
    processes = min(len(os.sched_getaffinity(0)), _PROCESSES_MAX)
    count = 0
    for path in paths:
        try:
            with closing(Segment(path)) as segment:
                first, last = segment.rows("SELECT min(number), max(number) FROM records")[0]
                count += (last or 0) - (first or 0)
        except sqlite3.Error:
            continue  # it is told of where it is read
    if processes < 2 or count <= _ALONE_MAX:
        return None
    return stack.enter_context(ProcessPoolExecutor(processes, get_context("fork"), gc.disable))


def _walk(
    segment: Segment,
    found: Verification,
    pruned: Iterable[Checkpoint],
    wanted: frozenset[int],
    pool: Executor | None,
    progress: Progress,
) -> None:
    (first,) = segment.rows("SELECT min(number) FROM records")[0]
    if first is None:
        found.note("cut", "it has no records", segment.path.name)
        return
    opening = _opening(segment)
    found.begin(opening, first, pruned)
    _take(segment, opening, found, wanted, pool, progress)


def _take(
    segment: Segment,
    opening: Opening,
    found: Verification,
    wanted: frozenset[int],
    pool: Executor | None,
    progress: Progress,
) -> None:
    first, last = segment.rows("SELECT min(number), max(number) FROM records")[0]
    starts = range(first, last + 1, _PART)
    parts = [_Part(segment.path, start, min(start + _PART - 1, last), wanted) for start in starts]
    for blocks in pool.map(_look, parts) if pool is not None else map(_look, parts):
        for checked in blocks:
            found.take(opening, checked)
        progress(found.records, segment.path.name)


def _look(part: _Part) -> list[Checked]:
    """What is known of a part, block by block; may run in another process.  Raises ``sqlite3.Error``."""
    found = []
    with closing(Segment(part.path)) as segment:
        streams: dict[int | None, str] = {None: "\n"}
        for ident, machine, boot in segment.rows("SELECT id, machine, boot FROM streams"):
            streams[ident] = f"{machine}\n{boot}"
        number, previous = _before(segment, part.first)
        cursor = segment.cursor(_LINKS, part.first, part.last)
        while links := cursor.fetchmany(_BLOCK):
            checked = check(part.path.name, links, streams, previous, number, part.wanted)
            number, previous = checked.number, checked.hash
            found.append(checked)
    return found


def _before(segment: Segment, first: int) -> tuple[int, bytes]:
    """Number and hash of the record before."""
    rows = segment.rows("SELECT number, hash FROM records WHERE number < ? ORDER BY number DESC LIMIT 1", first)
    if not rows:
        return first - 1, _opening(segment).previous
    return int(rows[0][0]), rows[0][1] if isinstance(rows[0][1], bytes) else b""


def _opening(segment: Segment) -> Opening:
    streams = {
        ident: (guest, Stream(machine, boot))
        for ident, guest, machine, boot in segment.rows("SELECT id, guest, machine, boot FROM streams")
    }
    try:
        previous = bytes.fromhex(segment.meta("previous"))
    except ValueError:
        previous = b""
    return Opening(segment.name, segment.chain, previous, segment.meta("carried"), streams)
