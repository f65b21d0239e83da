"""Reads the chain's files for ``core.verify``: in blocks, by several processes, and whatever state they are in."""

import gc
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from persona_broker.audit.chain import Chain
from persona_broker.audit.core.check import Checked, check, check_quickly
from persona_broker.audit.core.checkpoint import Checkpoint
from persona_broker.audit.core.format import SALT_BYTES, Stream
from persona_broker.audit.core.verify import Opening, Verification
from persona_broker.audit.keys import PublicKey
from persona_broker.audit.loss import is_signed
from persona_broker.audit.segment import Segment

Progress = Callable[[int, str], None]

_BLOCK = 250  # numbers of records that are looked at together: they fit into the CPU's cache
_PART = 25_000  # numbers that one process looks at before it takes others
_ALONE_MAX = 40_000  # records for which no other process is begun
_PROCESSES_MAX = 8
_LINKS = (
    "SELECT number, at_us, guest, stream, counter, facts, person, salt, digest, hash FROM records"
    " WHERE number BETWEEN ? AND ? ORDER BY number"
)
# Of numbers without a gap, those records of which ``check_quickly`` can tell.  What is less than x'' is no BLOB, and
# what is not is one: a comparison is cheaper than typeof().
_BARE = (
    "SELECT at_us, guest, stream, counter, facts, salt || person, digest, hash FROM records"  # noqa: S608 - constants
    " WHERE number BETWEEN ? AND ? AND facts < x'' AND hash >= x'' AND (guest < x'' OR guest IS NULL) AND"
    f" (person < x'' AND salt >= x'' AND length(salt) = {SALT_BYTES} AND digest IS NULL OR"
    " person IS NULL AND salt IS NULL AND digest >= x'') ORDER BY number"
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


def verify(
    chain: Chain, checkpoints: Iterable[Checkpoint], progress: Progress = _quiet, known: Sequence[PublicKey] = ()
) -> Verification:
    """Walks all segments; ``checkpoints`` are those whose signatures are right.  Raises ``OSError``.

    ``known``: the keys with which a loss may be acknowledged.
    """
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
    for log in chain.unread():
        text = "its newest records cannot be read where nothing can be written: verify a copy elsewhere"
        found.note("broken", text, log.name)
    right = [loss for loss in found.losses if is_signed(loss, found.chain, known)]
    for loss in found.losses:
        if loss not in right:
            text = "it acknowledges a loss, and no known key signed that; 'audit verify --key' takes another key"
            found.note("checkpoint", text, None, loss.number)
    found.finish(held, right)
    return found


def verify_segments(paths: Sequence[Path]) -> Verification:
    """Looks at some segments, each by itself: whether its records are what their hashes say.  Raises ``OSError``."""
    every = Verification()
    for path in paths:
        found = Verification()
        try:
            with closing(Segment(path)) as segment:
                opening = _opening(segment)
                found.number, found.hash = (segment.span()[0] or 1) - 1, opening.previous
                _take(segment, opening, found, frozenset(), None, _quiet)
        except sqlite3.Error as error:
            found.note("broken", f"it cannot be read: {error}", path.name)
        every.findings += found.findings
        every.records += found.records
        every.losses += found.losses
    return every


def follows(segment: Segment, first: int, previous: bytes) -> bool:
    """Whether the first record of a segment has the hash that it has after this one.  Raises ``sqlite3.Error``."""
    links = segment.rows(_LINKS, first, first)
    return not check(segment.path.name, links, {None: "\n"}, previous, first - 1, frozenset()).findings


def _pool(paths: Iterable[Path], stack: ExitStack) -> Executor | None:
    """Other processes, where there is much to look at and there are CPUs for it."""
    processes = min(len(os.sched_getaffinity(0)), _PROCESSES_MAX)
    count = 0
    for path in paths:
        try:
            with closing(Segment(path)) as segment:
                first, last = segment.span()
                count += last - (first or 0)
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
    first, _ = segment.span()
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
    parts = _parts(segment, wanted)
    for blocks in pool.map(_look, parts) if pool is not None else map(_look, parts):
        for checked in blocks:
            found.take(opening, checked)
        progress(found.records, segment.path.name)


def _parts(segment: Segment, wanted: frozenset[int]) -> Iterator[_Part]:
    """All records that are there now; where numbers are missing, also very many of them, no part is made of those."""
    first, last = segment.span()
    while first is not None and first <= last:
        end = min(first + _PART - 1, last)
        yield _Part(segment.path, first, end, frozenset(one for one in wanted if first <= one <= end))
        (first,) = segment.rows("SELECT min(number) FROM records WHERE number > ?", end)[0]


def _look(part: _Part) -> list[Checked]:
    """What is known of a part, block by block; may run in another process.  Raises ``sqlite3.Error``."""
    found = []
    with closing(Segment(part.path)) as segment:
        streams: dict[int | None, str] = {None: "\n"}
        for ident, machine, boot in segment.rows("SELECT id, machine, boot FROM streams"):
            streams[ident] = f"{machine}\n{boot}"
        in_bytes = {ident: text.encode("utf-8", "surrogatepass") for ident, text in streams.items()}
        number, previous = _before(segment, part.first)
        for first in range(part.first, part.last + 1, _BLOCK):
            last = min(first + _BLOCK - 1, part.last)
            checked = None
            if number == first - 1:
                bare = segment.rows_in_bytes(_BARE, first, last)
                if len(bare) == last - number:
                    checked = check_quickly(bare, in_bytes, previous, number, part.wanted)
            if checked is None:
                links = segment.rows(_LINKS, first, last)
                if not links:
                    continue  # the next block tells of all that are missing
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
