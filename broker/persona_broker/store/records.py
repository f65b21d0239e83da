"""What guests decided, searched: which records an operator asked for, newest first, by indexes of their fields."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from persona_broker.store.database import Database
from persona_broker.store.schema import RECORD_FIELD

_SAME_BUT_FOR = "json_remove(body, '$.at', '$.session', '$.leased')"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records; ``None`` = whichever.  ``program`` is a path, or the last part of one."""

    user: str | None = None
    vm: str | None = None
    program: str | None = None
    reason: str | None = None
    since: float | None = None  # Unix seconds, by the guest's clock
    denied: bool = False  # those of complain mode too, which stopped nothing
    distinct: bool = False  # of those that differ in time and session only, the newest


@dataclass(frozen=True, slots=True)
class Found:
    """One record; ``count`` is how many there are like it, itself included."""

    number: int
    vm: str
    record: dict[str, Any]
    count: int = 1


def newest(store: Database, wanted: Wanted, limit: int) -> tuple[list[Found], int]:
    """The newest ``limit`` records, oldest first, and the number of the newest that there is of any kind.

    Raises ``sqlite3.Error``.
    """
    with store.reading():
        last = _last(store)
        return list(_find(store, wanted, None, limit))[::-1], last


def later(store: Database, wanted: Wanted, after: int, limit: int) -> tuple[list[Found], int]:
    """The next ``limit`` records after a number, and the number after which the next are.  Raises ``sqlite3.Error``."""
    with store.reading():
        last = _last(store)
        found = list(_find(store, wanted, after, limit))
    return found, found[-1].number if len(found) == limit else max(last, after)


def _last(store: Database) -> int:
    return int(store.rows("SELECT ifnull(max(id), 0) FROM records")[0][0])


def _find(store: Database, wanted: Wanted, after: int | None, limit: int) -> Iterator[Found]:
    query, values = query_of(wanted, after)
    for number, vm, body, count in store.rows(query, *values, limit):
        record = json.loads(body)
        if isinstance(record, dict):
            yield Found(number, vm, record, count)


def query_of(wanted: Wanted, after: int | None) -> tuple[str, list[Any]]:
    """The query and all of its values but the last, how many are wanted: the first after a number, or the newest."""
    order = "DESC" if after is None else "ASC"
    terms: list[tuple[str, Any]] = [("json_valid(body)", None)]
    if after is not None:  # and only then: a condition on the number would be preferred to every other index
        terms.append(("id > ?", after))
    if wanted.user is not None:
        terms.append((f"{_field('user')} = +CAST(? AS TEXT)", _bytes(wanted.user)))
    if wanted.vm is not None:
        terms.append(("guest = +CAST(? AS TEXT)", _bytes(wanted.vm)))
    if wanted.reason is not None:
        terms.append((f"{_field('reason')} = ?", wanted.reason))
    if wanted.since is not None:
        terms.append((f"{_field('at')} >= ?", wanted.since))
    if wanted.denied or wanted.reason is not None:
        terms.append((f"{_field('decision')} = 'denied'", None))
    if wanted.program is not None and "/" in wanted.program:
        terms.append((f"{_field('program')} = +CAST(? AS TEXT)", _bytes(wanted.program)))
    elif wanted.program is not None:
        name = _bytes("/" + wanted.program)
        end = f"substr(CAST({_field('program')} AS BLOB), {-len(name)}) = ?"  # bytes: they may be no UTF-8
        terms.append((end, name))
    values = [value for _, value in terms if value is not None]
    where = " AND ".join(term for term, _ in terms)
    if wanted.distinct:
        grouped = f"max(id) AS id, guest, body, count(*) FROM records WHERE {where} GROUP BY guest, {_SAME_BUT_FOR}"
        query = f"SELECT {grouped} ORDER BY 1 {order} LIMIT ?"  # the body is that of the newest: it goes with max()
    else:
        query = f"SELECT id, guest, body, 1 FROM records WHERE {where} ORDER BY id {order} LIMIT ?"  # noqa: S608 - constants; values are bound
    return query, values


def _field(name: str) -> str:
    return RECORD_FIELD.format(name)


def _bytes(text: str) -> bytes:
    """As SQLite has the strings of JSON, those that are not UTF-8 included."""
    return text.encode("utf-8", "surrogatepass")
