"""The beginning of a segment: its tables, what it knows from the one before, and its first record."""

import hashlib
import json
import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from persona_broker.audit.core.events import event
from persona_broker.audit.core.format import SALT_BYTES, genesis, link, message, person_digest
from persona_broker.audit.files import give, sync_directory

FORMAT = 1  # PRAGMA user_version
_TABLES = (
    "CREATE TABLE records (number INTEGER PRIMARY KEY, at_us INTEGER NOT NULL, guest TEXT, stream INTEGER,"
    " counter INTEGER, facts TEXT NOT NULL, person TEXT, salt BLOB, digest BLOB, hash BLOB NOT NULL)",
    "CREATE INDEX records_counter ON records (stream, counter) WHERE stream IS NOT NULL",
    "CREATE TABLE streams (id INTEGER PRIMARY KEY, guest TEXT NOT NULL, machine TEXT NOT NULL, boot TEXT NOT NULL,"
    " last INTEGER NOT NULL, conflicts INTEGER NOT NULL DEFAULT 0, UNIQUE (guest, machine, boot))",
    "CREATE TABLE gaps (stream INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, why TEXT NOT NULL,"
    " PRIMARY KEY (stream, first)) WITHOUT ROWID",
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
)


@dataclass(frozen=True, slots=True)
class Start:
    """What a segment begins with: the state of the chain at the end of the one before."""

    chain: str
    previous: str | None  # the segment before
    number: int  # of the last record there
    hash: bytes
    carried: str = "[]"  # streams and their gaps, JSON
    moved: str = "[]"  # what was taken over from the database last, JSON


def create(path: Path, start: Start, at_us: int) -> None:
    """Makes a segment with its first record, whole or not at all.

    Raises ``FileExistsError`` where another process was faster, ``OSError``, ``sqlite3.Error``.
    """
    scratch = path.with_name(f".{path.stem}.{os.getpid()}.{os.urandom(4).hex()}")
    scratch.touch(mode=0o600)
    give(scratch)
    try:
        with closing(sqlite3.connect(scratch, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE")
            for table in _TABLES:
                db.execute(table)
            db.execute(f"PRAGMA user_version = {FORMAT}")
            _fill(db, path, start, at_us)
            db.execute("COMMIT")
        with closing(sqlite3.connect(scratch)) as db:  # closing the last connection left nothing beside the file
            db.execute("SELECT count(*) FROM records")
        os.link(scratch, path)
        sync_directory(path.parent)
    finally:
        for left in path.parent.iterdir():
            if left.name.startswith(scratch.name):
                left.unlink(missing_ok=True)


def _fill(db: sqlite3.Connection, path: Path, start: Start, at_us: int) -> None:
    streams = json.loads(start.carried)
    for ident, (guest, machine, boot, last, conflicts, gaps) in enumerate(streams, 1):
        db.execute("INSERT INTO streams VALUES (?, ?, ?, ?, ?, ?)", (ident, guest, machine, boot, last, conflicts))
        db.executemany("INSERT INTO gaps VALUES (?, ?, ?, ?)", [(ident, *gap) for gap in gaps])
    said = event(
        "segment_opened",
        at_us / 1e6,
        segment=path.stem,
        chain=start.chain,
        previous=start.previous,
        carried=hashlib.sha256(start.carried.encode()).hexdigest(),
    )
    salt = os.urandom(SALT_BYTES)
    number, previous = start.number + 1, start.hash if start.number else genesis(start.chain)
    hashed = link(previous, person_digest(salt, said.person), message(number, at_us, None, None, None, said.facts))
    row = (number, at_us, None, None, None, said.facts, said.person, salt, None, hashed)
    db.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    meta = {
        "chain": start.chain,
        "previous": previous.hex(),
        "carried": start.carried,
        "moved": start.moved,
        "sealed": "",
    }
    db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
