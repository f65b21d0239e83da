"""Reads the chain's files for ``core.verify``: in blocks, with progress, and whatever state they are in."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from persona_broker.audit.chain import Chain
from persona_broker.audit.core.checkpoint import Checkpoint
from persona_broker.audit.core.format import Stream
from persona_broker.audit.core.verify import Link, Opening, Verification
from persona_broker.audit.segment import Segment

_BLOCK = 2000  # records that are in memory at once
_LINKS = (
    "SELECT number, hash, CAST(salt || person AS BLOB), digest, CAST(number || char(10) || at_us || char(10) ||"
    " ifnull(guest, '') || char(10) || ifnull(machine, '') || char(10) || ifnull(boot, '') || char(10) ||"
    " ifnull(counter, '') || char(10) || facts AS BLOB), guest, stream, counter"
    " FROM records LEFT JOIN (SELECT id, machine, boot FROM streams) ON id = stream ORDER BY number"
)


def verify(
    chain: Chain, checkpoints: Iterable[Checkpoint], progress: Callable[[int, str], None] = lambda _done, _where: None
) -> Verification:
    """Walks all segments; ``checkpoints`` are those whose signatures are right.  Raises ``OSError``."""
    held = list(checkpoints)
    found = Verification(wanted={item.number: b"" for item in held})
    pruned = [item for item in held if item.pruned_from]
    for path in chain.segments():
        try:
            with closing(Segment(path)) as segment:
                _walk(segment, found, pruned, progress)
        except sqlite3.Error as error:
            found.note("broken", f"it cannot be read: {error}", path.name)
    found.finish(held)
    return found


def verify_segments(chain: Chain, paths: Sequence[Path]) -> Verification:
    """Walks some segments, each by itself: whether its records are what their hashes say.  Raises ``OSError``."""
    every = Verification()
    for path in paths:
        found = Verification()
        try:
            with closing(Segment(path)) as segment:
                (first,) = segment.rows("SELECT min(number) FROM records")[0]
                opening = _opening(segment)
                found.number, found.hash = (first or 1) - 1, opening.previous
                for links in _blocks(segment):
                    found.walk(opening, links)
        except sqlite3.Error as error:
            found.note("broken", f"it cannot be read: {error}", path.name)
        every.findings += found.findings
        every.records += found.records
    return every


def _blocks(segment: Segment) -> Iterator[list[Link]]:
    cursor = segment.cursor(_LINKS)
    while links := cursor.fetchmany(_BLOCK):
        yield links


def _walk(
    segment: Segment, found: Verification, pruned: Iterable[Checkpoint], progress: Callable[[int, str], None]
) -> None:
    first = segment.rows("SELECT min(number) FROM records")[0][0]
    if first is None:
        found.note("cut", "it has no records", segment.path.name)
        return
    opening = _opening(segment)
    found.begin(opening, first, pruned)
    for links in _blocks(segment):
        found.walk(opening, links)
        progress(found.records, segment.path.name)


def _opening(segment: Segment) -> Opening:
    streams = {
        ident: (guest, Stream(machine, boot))
        for ident, guest, machine, boot in segment.rows("SELECT id, guest, machine, boot FROM streams")
    }
    try:
        previous = bytes.fromhex(segment.meta("previous"))
    except ValueError:
        previous = b""
    carried = segment.meta("carried")
    return Opening(segment.name, segment.chain, previous, carried, streams)
