"""Deletes old days of the chain, each against a signed checkpoint that stays and says which records those were.

Only whole days go, and none with a record of a user or session that is held.  The checkpoints are kept, and the deed
is on the record, before the first file is deleted: where it is interrupted, the same command finishes it.
"""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from persona.problems import Fault, PersonaError
from persona_broker.audit import checkpoints, index
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.checkpoint import Checkpoint
from persona_broker.audit.core.events import event
from persona_broker.audit.core.format import genesis
from persona_broker.audit.core.loss import Loss
from persona_broker.audit.files import sync_directory
from persona_broker.audit.holds import Hold, holds, holds_in
from persona_broker.audit.keys import SigningKey
from persona_broker.audit.lookup import Lookup
from persona_broker.audit.segment import Segment
from persona_broker.audit.verify import follows, verify_segments
from persona_broker.store.interface import Author
from persona_broker.store.sqlite import SqliteStore

_TAMPERED = ("changed", "cut", "reordered", "broken")
_DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Day:
    """A segment that may go, or why it stays."""

    path: Path
    first: int
    last: int
    hash: str
    stays: str = ""


def plan(chain: Chain, before: str, held: Sequence[Hold], verified: int, only: str = "") -> list[Day]:
    """The days before a date, ``YYYY-MM-DD``; ``verified``: up to which record a signed checkpoint of before reaches.

    ``only``: this day alone.

    Raises ``sqlite3.Error``.
    """
    found = []
    for path in chain.segments():
        if path.stem >= before or path.stem != (only or path.stem):
            continue
        with closing(Segment(path)) as segment:
            (first,) = segment.rows("SELECT min(number) FROM records")[0]
            last, hashed = segment.head()
            sealed = segment.sealed()
        if not sealed:
            stays = "it is the newest"
        elif last > verified:
            stays = "no signed checkpoint reaches its end yet"
        else:
            stays = _held(path, held)
        found.append(Day(path, first, last, hashed.hex(), stays))
    return found


def _held(path: Path, held: Sequence[Hold]) -> str:
    if not held:
        return ""
    with closing(Lookup(path)) as entries:
        for hold in held:
            query = f"SELECT 1 FROM entries WHERE {hold.kind} = +CAST(? AS TEXT) LIMIT 1"  # noqa: S608 - one of KINDS
            if entries.rows(query, hold.name.encode("utf-8", "surrogatepass")):
                return f"it has records of the {hold.kind} {hold.name}, who is held"
    return ""


def choose(
    store: SqliteStore, chain: Chain, key: SigningKey, before: str, held: Sequence[Hold], only: str = ""
) -> list[Day]:
    """The days before a date; those that may go were looked at: they are whole, and fit what is around them.

    Raises ``PersonaError`` where one was tampered with: that is evidence, and all stay.  Also ``sqlite3.Error``.
    """
    right, _ = checkpoints.sorted_out(checkpoints.kept(store)[0], [key.public], "the database")
    mine = [item for item in right if item.chain == chain.id()]  # numbers of an earlier chain prove nothing of this one
    days = plan(chain, before, held, max((item.number for item in mine if not item.pruned_from), default=0), only)
    found = verify_segments([day.path for day in days if not day.stays])
    wrong = [item for item in found.findings if item.kind in _TAMPERED]
    if wrong:
        fix = "nothing was deleted; 'audit verify' names everything, and what was tampered with is evidence"
        raise PersonaError(Fault.CONFLICT, f"{wrong[0].segment}: {wrong[0].text}; {fix}")
    known = checkpoints.kept(store)[0]  # also those of keys that are not known here: what they contradict is evidence
    return [
        day if day.stays else replace(day, stays=_contradicted(chain, day, known) or _needed(day, found.losses, known))
        for day in days
    ]


def _needed(day: Day, losses: Sequence[Loss], known: Sequence[Checkpoint]) -> str:
    """Without the record that acknowledges a loss, the checkpoints that it is about are findings again."""
    for loss in losses:
        if day.first <= loss.number <= day.last and any(loss.covers(item.chain, item.number) for item in known):
            return f"it acknowledges that the chain {loss.lost} is gone, of which there are checkpoints"
    return ""


def _contradicted(chain: Chain, day: Day, known: Sequence[Checkpoint]) -> str:
    """What is against a day whose hashes are right by themselves; empty where it fits what is around it.

    Both days stay where one does not follow the other: nobody can tell which of the two was changed.
    """
    mine, paths = [item for item in known if item.chain == chain.id()], chain.segments()
    around = [
        *[path for path in paths if path < day.path][-1:],
        day.path,
        *[path for path in paths if path > day.path][:1],
    ]
    for earlier, later in pairwise(around):
        if found := _unlike(earlier, later):
            return found
    with closing(Segment(day.path)) as segment:
        previous = segment.meta("previous")
        if segment.chain != chain.id() or (day.first == 1 and previous != genesis(segment.chain).hex()):
            return "it is not of this chain, or not its beginning; it is evidence"
        for item in mine:
            if item.pruned_from and item.number == day.first - 1 and item.hash != previous:
                return "it does not follow what was pruned before it; it is evidence"
            if day.first <= item.number <= day.last:
                found_hashes = segment.rows("SELECT hash FROM records WHERE number = ?", item.number)
                if found_hashes != [(bytes.fromhex(item.hash),)]:
                    return f"record {item.number} had another hash when a checkpoint was made of it; it is evidence"
    return ""


def _unlike(earlier: Path, later: Path) -> str:
    """Whether a day contradicts the one before it; records that are missing between them contradict nothing."""
    with closing(Segment(earlier)) as one, closing(Segment(later)) as other:
        (number, hashed), first = one.head(), other.span()[0]
        if first is None or first > number + 1:
            return ""
        if first == number + 1 and other.meta("previous") == hashed.hex() and follows(other, first, hashed):
            return ""
    return f"{later.name} does not follow the last record of {earlier.name}; both are evidence"


def older(chain: Chain, keep_days: int, now: float) -> list[str]:
    """The names of the days that ended more than so many days before ``now``, in Unix seconds, oldest first."""
    before = _before(keep_days, now)
    return [path.stem for path in chain.segments() if path.stem < before]


def _before(keep_days: int, now: float) -> str:
    return datetime.fromtimestamp(now - keep_days * _DAY_S, UTC).strftime("%Y-%m-%d")


def prune_one(store: SqliteStore, chain: Chain, key: SigningKey, name: str, keep_days: int, now: float) -> Day | None:
    """Deletes one day as ``audit.keep_days`` asks, or says why it stays; ``None`` where it is not there any more.

    Raises as ``choose`` and ``prune``.
    """
    held, before = holds(store), _before(keep_days, now)
    days = choose(store, chain, key, before, held, only=name)
    author = Author("broker", f"audit.keep_days = {keep_days}")
    return next(iter(prune(store, chain, key, days, held, before, author)), None)


def prune(
    store: SqliteStore, chain: Chain, key: SigningKey, days: Sequence[Day], held: Sequence[Hold], before: str,
    author: Author,
) -> list[Day]:  # fmt: skip
    """Deletes the days that do not stay; all of them, as they are then.  ``held``: the holds by which they were chosen.

    A day that a hold touches which was set since stays.  Raises ``sqlite3.Error``, ``OSError``, ``PersonaError``.
    """
    with closing(Segment(chain.segments()[-1])) as segment:
        name = segment.chain
    looked = list(held)
    while True:
        goes = [day for day in days if not day.stays]
        now = int(time.time() * 1e6)
        signed = [key.sign(Checkpoint(name, day.last, day.hash, now, day.first, key.public.id)) for day in goes]
        with store.writing() as db:
            new = [hold for hold in holds_in(db) if hold not in looked]
            if not new:
                checkpoints.put_in(db, signed)
                break
        # outside of the transaction, which others wait for; then again, since another hold may be set meanwhile
        days = [day if day.stays else replace(day, stays=_held(day.path, new)) for day in days]
        looked += new
    if not goes:
        return list(days)
    said = [{"segment": day.path.stem, "first": day.first, "last": day.last, "hash": day.hash} for day in goes]
    chain.add(
        [event("audit_pruned", time.time(), author=author.name, message=author.message, before=before, days=said)]
    )
    for day in goes:
        index.remove(day.path)
        for end in ("-shm", "-wal", ""):
            day.path.with_name(day.path.name + end).unlink(missing_ok=True)
    sync_directory(chain.directory)
    return list(days)
