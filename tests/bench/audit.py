"""The audit: appending beside a bare hash-and-insert loop, verifying beside bare hashing, of the same records."""

import hashlib
import json
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path

from persona_broker.audit.chain import Chain
from persona_broker.audit.core.format import Row as Record
from persona_broker.audit.core.format import Stream, message, split
from persona_broker.audit.delivery import Delivery
from persona_broker.audit.verify import verify

from tests.bench.row import Missing, Row, measured, pairs

BATCH = 500  # records of one call, as many as a guest may send
BATCHES = 20
VERIFIED = 200_000
STREAM = Stream("a" * 32, "b" * 32)


def record(number: int) -> dict[str, object]:
    """A program start as a guest reports it."""
    return {
        "at": 1_790_000_000.25 + number, "session": f"s-{number % 50:04x}", "user": f"user{number % 200}",
        "program": "/usr/bin/ls", "argv": ["ls", "-l", f"/srv/data/{number}"], "decision": "granted", "reason": None,
        "persona": "DataAnalyst", "persona_version": 3, "policy": "analysts-by-day", "event": "exec", "leased": True,
        "complain": False,
    }  # fmt: skip


def appending() -> Row:
    """Records a second with 500 in a commit that waits for the disk; the peer hashes and inserts the same, no more."""
    with tempfile.TemporaryDirectory(prefix="persona-bench-") as directory, ExitStack() as stack:
        chain = stack.enter_context(closing(Chain(Path(directory) / "audit")))
        bare = stack.enter_context(closing(_bare(Path(directory) / "bare")))
        value, peer, ratio = pairs(_chained(chain), _inserted(bare))
    return Row("audit.records_per_s", value, "1/s", "hash and insert", peer, ratio, "> 0.5")


def _chained(chain: Chain) -> Callable[[], float]:
    records, counters = [record(number) for number in range(BATCH)], count(1)

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(BATCHES):
            entries = [split(item, next(counters)) for item in records]
            chain.deliver([Delivery("vm-1", entries, STREAM)])
        return BATCH * BATCHES / (time.perf_counter() - began)

    return measure


def _inserted(bare: sqlite3.Connection) -> Callable[[], float]:
    records = [record(number) for number in range(BATCH)]

    def measure() -> float:
        hashed = b"\0" * 32
        began = time.perf_counter()
        for _ in range(BATCHES):
            hashed = _insert(bare, records, hashed)
        return BATCH * BATCHES / (time.perf_counter() - began)

    return measure


def _insert(bare: sqlite3.Connection, records: list[dict[str, object]], hashed: bytes) -> bytes:
    rows = []
    for item in records:
        body = json.dumps(item)
        hashed = hashlib.sha256(hashed + body.encode()).digest()
        rows.append((body, hashed))
    bare.execute("BEGIN IMMEDIATE")
    bare.executemany("INSERT INTO records (body, hash) VALUES (?, ?)", rows)
    bare.execute("COMMIT")
    return hashed


def _bare(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE records (number INTEGER PRIMARY KEY, body TEXT, hash BLOB)")
    return db


def verifying() -> Iterator[Row]:
    """Records verified a second; one peer reads and hashes as many bare ones, the other hashes the same in memory."""
    with tempfile.TemporaryDirectory(prefix="persona-bench-") as directory, ExitStack() as stack:
        chain = stack.enter_context(closing(Chain(Path(directory) / "audit")))
        for first in range(1, VERIFIED, BATCH):
            entries = [split(record(number), number) for number in range(first, first + BATCH)]
            chain.deliver([Delivery("vm-1", entries, STREAM)])
        bare = stack.enter_context(closing(_bare(Path(directory) / "bare")))
        for first in range(1, VERIFIED, BATCH):
            _insert(bare, [record(number) for number in range(first, first + BATCH)], bytes(32))
        value, peer, ratio = pairs(_verified(chain), _read(bare), 5)
        yield Row("audit.verify", value, "1/s", "read and hash", peer, ratio, f"> 0.5, {_cpus()} CPUs against one")
        value, peer, ratio = pairs(_verified(chain), _hashed(chain), 5)
        yield Row("audit.verify_memory", value, "1/s", "hashing in memory", peer, ratio, "told only")


def _read(bare: sqlite3.Connection) -> Callable[[], float]:
    def measure() -> float:
        sha256, hashed = hashlib.sha256, bytes(32)
        began = time.perf_counter()
        for _number, body, _hash in bare.execute("SELECT number, body, hash FROM records ORDER BY number"):
            hashed = sha256(hashed + body.encode()).digest()
        return VERIFIED / (time.perf_counter() - began)

    return measure


def _verified(chain: Chain) -> Callable[[], float]:
    def measure() -> float:
        began = time.perf_counter()
        found = verify(chain, ())
        if found.findings:
            raise RuntimeError(found.findings[0].text)
        return found.records / (time.perf_counter() - began)

    return measure


def _hashed(chain: Chain) -> Callable[[], float]:
    bare = [(bytes(16) + (row.person or "").encode(), _said(row)) for row in chain.read(0, VERIFIED)]

    def measure() -> float:
        sha256, previous = hashlib.sha256, bytes(32)
        began = time.perf_counter()
        for salted, said in bare:
            previous = sha256(previous + sha256(salted).digest() + said).digest()
        return len(bare) / (time.perf_counter() - began)

    return measure


def _said(row: Record) -> bytes:
    return message(row.number, row.at_us, row.guest, row.stream, row.counter, row.facts)


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def rows() -> Iterator[Row | Missing]:
    """audit.*"""
    return measured(("audit.records_per_s", appending), ("audit.verify, audit.verify_memory", verifying))
