"""The audit that a command works on, and how far it is with what takes a while."""

import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

from persona_broker.audit.chain import Chain
from persona_broker.audit.files import beside
from persona_broker.audit.inbox import take_over, waiting
from persona_broker.cli.store import existing, for_reading, plural
from persona_broker.settings import Settings
from persona_broker.store.database import unread_log
from persona_broker.store.sqlite import SqliteStore

_QUIET_S = 1.0  # what is done sooner says nothing
_EVERY_S = 0.2
_AT_ONCE = 1000  # records: some hundredths of a second


class Bar:
    """One line on the terminal that is written over, for what takes more than a second; nothing elsewhere."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._next_at = time.monotonic() + _QUIET_S
        self._shown = False

    def show(self, done: int, where: object = "") -> None:
        """So much is done."""
        if time.monotonic() < self._next_at or not sys.stderr.isatty():
            return
        self._next_at = time.monotonic() + _EVERY_S
        self._shown = True
        of = f" of {where:,}" if isinstance(where, int) else f" {where}"
        print(f"\r\x1b[K{self._what} {done:,}{of}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Takes the line away."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def opened(settings: Settings) -> Chain:
    """The chain, for what only reads; its database need not be there.  Raises ``StoreError``, ``OSError``."""
    store, chain = opened_for_audit(settings)
    if store is not None:
        store.close()
    return chain


def opened_for_audit(settings: Settings) -> tuple[SqliteStore | None, Chain]:
    """The chain, and its database, ``None`` where somebody has a copy of the audit alone; that is said."""
    db = Path(settings.db)
    chain = Chain(beside(db))
    log = unread_log(db)
    if (log is not None or not db.exists()) and chain.segments():
        why = f"there is no database {db}" if log is None else f"{log} cannot be read where nothing can be written"
        what = "what waits in the database, and its checkpoints, are not looked at"
        print(f"persona-broker: {why}: {what}", file=sys.stderr)
        _say_unread(chain)
        return None, chain
    return opened_both(settings)


def _say_unread(chain: Chain) -> None:
    for log in chain.unread():
        fix = "copy the whole directory to where you can write to see them"
        print(f"persona-broker: {log} has newer records, which cannot be read here; {fix}", file=sys.stderr)


def opened_both(settings: Settings) -> tuple[SqliteStore, Chain]:
    """The same, and the database.  Says on standard error what is not in the chain yet."""
    store = for_reading(settings)
    if count := waiting(store):
        fix = "the service moves them within a second; where it does not run, 'persona-broker migrate' does"
        what = f"{plural(count, 'record')} waiting in the database, and not in the audit yet"
        print(f"persona-broker: {what}: {fix}", file=sys.stderr)
    chain = Chain(beside(Path(settings.db)))
    _say_unread(chain)
    return store, chain


def changeable(settings: Settings) -> tuple[SqliteStore, Chain]:
    """Both, for what writes, with everything in the chain that waited for it where that can be.  Raises ``OSError``."""
    store = existing(settings)
    chain = Chain(beside(Path(settings.db)))
    bar = Bar("moved into the audit")
    try:
        take_over(store, chain, bar.show)
    except (sqlite3.Error, OSError) as error:
        print(f"persona-broker: what waits in the database does not get into the audit: {error}", file=sys.stderr)
    bar.end()
    return store, chain


def hand_over(store: SqliteStore, settings: Settings) -> None:
    """Puts what a command did into the chain before it ends, also where no service runs.

    What cannot get there now stays in the database, and is said; so does much that waits, as after an upgrade.
    """
    if not 0 < waiting(store) <= _AT_ONCE:
        return
    try:
        with closing(Chain(beside(Path(settings.db)))) as chain:
            take_over(store, chain)
    except (sqlite3.Error, OSError) as error:
        why = f"the audit cannot take it: {error}"
        print(f"persona-broker: done, but it waits in the database, for {why}", file=sys.stderr)
