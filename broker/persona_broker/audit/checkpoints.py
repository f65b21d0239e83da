"""Checkpoints in the broker's database: made of the chain's newest record, kept, and read back."""

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing

from persona_broker.audit.chain import Chain
from persona_broker.audit.core.check import Finding
from persona_broker.audit.core.checkpoint import Checkpoint, parse
from persona_broker.audit.core.format import to_json
from persona_broker.audit.keys import PublicKey, SigningKey
from persona_broker.audit.segment import Segment
from persona_broker.store.sqlite import SqliteStore

_MINUTES_KEPT_S = 86400  # of a day every one, then the last of each day

_THIN = (
    "DELETE FROM audit_checkpoints WHERE pruned_from = 0 AND at_us < ? AND EXISTS (SELECT 1 FROM audit_checkpoints b"
    " WHERE b.chain = audit_checkpoints.chain AND b.pruned_from = 0 AND b.number > audit_checkpoints.number"
    " AND b.at_us / 86400000000 = audit_checkpoints.at_us / 86400000000)"
)


def make(chain: Chain, key: SigningKey, clock: Callable[[], float] = time.time) -> Checkpoint | None:
    """Signs a checkpoint of the newest record; ``None`` where the chain is empty.  Raises ``sqlite3.Error``."""
    paths = chain.segments()
    if not paths:
        return None
    with closing(Segment(paths[-1])) as segment:
        number, hashed = segment.head()
        name = segment.chain
    return key.sign(Checkpoint(name, number, hashed.hex(), int(clock() * 1e6), 0, key.public.id))


def put(store: SqliteStore, checkpoints: Iterable[Checkpoint]) -> None:
    """Keeps them; of those that are older than a day, the last of each day stay.  Raises ``sqlite3.Error``."""
    with store.writing() as db:
        put_in(db, checkpoints)


def put_in(db: sqlite3.Connection, checkpoints: Iterable[Checkpoint]) -> None:
    """The same, as part of a transaction.  Raises ``sqlite3.Error``."""
    for item in checkpoints:
        row = (item.chain, item.number, item.at_us, item.pruned_from, to_json(item.to_mapping()))
        db.execute("INSERT OR REPLACE INTO audit_checkpoints VALUES (?, ?, ?, ?, ?)", row)
        db.execute(_THIN, (item.at_us - _MINUTES_KEPT_S * 1_000_000,))


def newest(store: SqliteStore) -> Checkpoint | None:
    """The one of the highest number that can be read."""
    return next(iter(newest_of_each(store)), None)


def newest_of_each(store: SqliteStore) -> list[Checkpoint]:
    """Of each chain the one of the highest number, that of the highest of all first, of those that can be read."""
    query = "SELECT body, max(number) FROM audit_checkpoints WHERE pruned_from = 0 GROUP BY chain ORDER BY 2 DESC"
    found = []
    for body, _ in store.rows(query):
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            found.append(parse(json.loads(body)))
    return found


def made_after(store: SqliteStore, at_us: int) -> list[Checkpoint]:
    """Those that were made after a moment; what cannot be read is left out, ``kept`` tells of it."""
    found = []
    for (body,) in store.rows("SELECT body FROM audit_checkpoints WHERE at_us > ? ORDER BY at_us", at_us):
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            found.append(parse(json.loads(body)))
    return found


def kept(store: SqliteStore) -> tuple[list[Checkpoint], list[Finding]]:
    """All that are kept, and a finding for each that cannot be read."""
    found: list[Checkpoint] = []
    wrong: list[Finding] = []
    columns = "chain, number, at_us, pruned_from, body"
    for *named, body in store.rows(f"SELECT {columns} FROM audit_checkpoints ORDER BY number"):  # noqa: S608 - constants
        try:
            item = parse(json.loads(body))
        except (ValueError, TypeError, RecursionError) as error:
            text = f"a checkpoint in the database cannot be read: {error}"
            wrong.append(Finding("checkpoint", text, None, named[1]))
            continue
        if [item.chain, item.number, item.at_us, item.pruned_from] != named:
            wrong.append(Finding("checkpoint", "a checkpoint in the database was changed", None, named[1]))
        found.append(item)
    return found, wrong


def sorted_out(
    checkpoints: Iterable[Checkpoint], keys: Iterable[PublicKey], where: str
) -> tuple[list[Checkpoint], list[Finding]]:
    """Those whose signatures are right, and a finding for each other one."""
    by_id = {key.id: key for key in keys}
    right: list[Checkpoint] = []
    wrong: list[Finding] = []
    for item in checkpoints:
        key = by_id.get(item.key)
        if key is None:
            text = f"a checkpoint in {where} is signed with another key, {item.key}; 'audit verify --key' takes it"
            wrong.append(Finding("checkpoint", text, None, item.number))
        elif not key.verifies(item):
            text = f"a checkpoint in {where} is not what its signature says"
            wrong.append(Finding("checkpoint", text, None, item.number))
        else:
            right.append(item)
    return right, wrong
