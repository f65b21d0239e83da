"""Which records an operator asks for: the newest, or those after a number, over all segments."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from persona_broker.audit.chain import Chain
from persona_broker.audit.core.format import Row, Stream, joined
from persona_broker.audit.lookup import Lookup, Part, Progress

_BLOCK = 2000  # records that are in memory at once


def _quiet(_done: int, _all: int) -> None:
    """For whom progress does not matter."""


# records that differ in these only are alike; they are all among the facts
_SAME_BUT_FOR = "json_remove(facts, '$.at', '$.session', '$.leased')"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records; ``None`` = whichever.  ``program`` is a path, or the last part of one."""

    user: str | None = None
    vm: str | None = None
    session: str | None = None
    program: str | None = None
    event: str | None = None
    decision: str | None = None
    reason: str | None = None
    persona: str | None = None
    since: float | None = None  # Unix seconds, by the guest's clock
    received_since: float | None = None  # the same by the broker's
    received_until: float | None = None
    denied: bool = False  # those of complain mode too, which stopped nothing
    distinct: bool = False  # of those that differ in time and session only, the newest
    guests_only: bool = True  # not what the broker says itself


@dataclass(frozen=True, slots=True)
class Found:
    """One record; ``count`` is how many there are like it, itself included."""

    row: Row
    record: dict[str, Any]
    count: int = 1

    @property
    def number(self) -> int:
        """Of the record."""
        return self.row.number

    @property
    def vm(self) -> str | None:
        """Whose record it is; ``None`` = the broker's own."""
        return self.row.guest


def newest(chain: Chain, wanted: Wanted, limit: int, progress: Progress = _quiet) -> tuple[list[Found], int]:
    """The newest ``limit`` records, oldest first, and the number of the newest that there is of any kind.

    Raises ``sqlite3.Error``.
    """
    last = 0
    found: list[Found] = []
    alike: dict[str, Found] = {}
    for path in chain.segments()[::-1]:
        with closing(Lookup(path, progress)) as entries:
            for part in entries.parts[::-1]:
                last = last or part.last()
                if wanted.distinct:
                    for one in _find(part, wanted, None, -1):
                        _count(alike, one)
                elif len(found) < limit:
                    found += _find(part, wanted, None, limit - len(found))
        if not wanted.distinct and len(found) >= limit:
            break
    if wanted.distinct:
        found = sorted(alike.values(), key=lambda one: -one.number)[:limit]
    return found[::-1], last


def later(chain: Chain, wanted: Wanted, after: int, limit: int) -> tuple[list[Found], int]:
    """The next ``limit`` records after a number, and the number after which the next are.  Raises ``sqlite3.Error``."""
    found: list[Found] = []
    last = after
    for path in chain.after(after):
        with closing(Lookup(path, after=after)) as entries:
            for part in entries.parts:
                found += _find(part, wanted, after, limit - len(found))
                if len(found) >= limit:
                    return found, found[-1].number
                last = max(last, part.last())
    return found, last


def each(chain: Chain, wanted: Wanted, progress: Progress = _quiet) -> Iterator[Found]:
    """All records, oldest first.  Raises ``sqlite3.Error``."""
    for path in chain.segments():
        with closing(Lookup(path, progress)) as entries:
            for part in entries.parts:
                after = 0
                while block := list(_find(part, wanted, after, _BLOCK)):
                    yield from block
                    after = block[-1].number


def _count(alike: dict[str, Found], one: Found) -> None:
    """Adds up those that are alike in several segments; the newest comes first."""
    key = json.dumps(
        [one.vm, {name: value for name, value in one.record.items() if name not in ("at", "session", "leased")}],
        sort_keys=True,
    )
    before = alike.get(key)
    alike[key] = one if before is None else Found(before.row, before.record, before.count + one.count)


def _find(part: Part, wanted: Wanted, after: int | None, limit: int) -> Iterator[Found]:
    query, values = query_of(wanted, after)
    for number, vm, at_us, facts, person, stream, counter, hashed, count in part.rows(query, *values, limit):
        try:
            record = joined(facts, person)
        except (ValueError, TypeError, RecursionError):
            continue  # 'audit verify' finds it
        machine, _, boot = (stream or "").partition(" ")
        key = Stream(machine, boot) if stream else None
        yield Found(Row(number, at_us, vm, key, counter, facts, person, hashed), record, count)


def query_of(wanted: Wanted, after: int | None) -> tuple[str, list[Any]]:
    """The query and all of its values but the last, how many are wanted: the first after a number, or the newest."""
    order = "DESC" if after is None else "ASC"
    terms: list[tuple[str, Any]] = []
    if wanted.guests_only:
        terms.append(("e.guest IS NOT NULL", None))
    if after is not None:  # and only then: a condition on the number would be preferred to every other index
        terms.append(("e.number > ?", after))
    for column, text in (("user", wanted.user), ("guest", wanted.vm), ("session", wanted.session)):
        if text is not None:
            terms.append((f"e.{column} = +CAST(? AS TEXT)", _bytes(text)))
    for column, text in (
        ("reason", wanted.reason),
        ("persona", wanted.persona),
        ("event", wanted.event),
        ("decision", wanted.decision),
    ):
        if text is not None:
            terms.append((f"e.{column} = ?", text))
    if wanted.since is not None:
        terms.append(("e.at >= ?", wanted.since))
    if wanted.received_since is not None:
        terms.append(("e.at_us >= ?", int(wanted.received_since * 1e6)))
    if wanted.received_until is not None:
        terms.append(("e.at_us < ?", int(wanted.received_until * 1e6)))
    if wanted.denied or wanted.reason is not None:
        terms.append(("e.decision = 'denied'", None))
    if wanted.program is not None and "/" in wanted.program:
        terms.append(("e.program = +CAST(? AS TEXT)", _bytes(wanted.program)))
    elif wanted.program is not None:
        name = _bytes("/" + wanted.program)
        end = f"substr(CAST(e.program AS BLOB), {-len(name)}) = ?"  # bytes: they may be no UTF-8
        terms.append((end, name))
    values = [value for _, value in terms if value is not None]
    where = " AND ".join(term for term, _ in terms) or "1"
    of = "(SELECT machine || ' ' || boot FROM segment.streams s WHERE s.id = r.stream)"
    rest = f"e.guest AS guest, e.at_us AS at_us, facts, person, {of}, counter, hash"
    tables = "entries e CROSS JOIN segment.records r ON r.number = e.number"
    if wanted.distinct:
        like = f"max(e.number) AS number, {rest}, count(*) FROM {tables}"
        grouped = f"{like} WHERE {where} GROUP BY e.guest, {_SAME_BUT_FOR}, person"
        query = f"SELECT {grouped} ORDER BY 1 {order} LIMIT ?"  # the body is that of the newest: it goes with max()
    else:
        query = f"SELECT e.number AS number, {rest}, 1 FROM {tables} WHERE {where} ORDER BY e.number {order} LIMIT ?"  # noqa: S608 - constants; values are bound
    return query, values


def _bytes(text: str) -> bytes:
    """As SQLite has the strings of JSON, those that are not UTF-8 included."""
    return text.encode("utf-8", "surrogatepass")
