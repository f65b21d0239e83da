"""The record in one SQLite file (WAL): documents and versions, guests, sessions, decisions, what holds now.

Every process opens its own; ``changed`` tells cheaply whether another wrote.  The generation is
raised in the same transaction as the change that it announces.
"""

import hashlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona.codec import Record, encode_record
from persona.conditions import Threshold
from persona.decisions import Subject
from persona.documents import Document, Persona, Policy, parse_document, to_mapping
from persona_broker.policy.changes import Changes, Identity, compare, identities
from persona_broker.policy.engine import Snapshot, Versioned
from persona_broker.policy.outlook import Latches, Sample

RECORDS_KEPT = 200_000  # about 100 MB; the audit issue will stream them on
SESSIONS_KEPT = 4096  # of one guest: far more than are open, so the oldest is one that the guest forgot to end

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS documents (kind TEXT, name TEXT, version INTEGER, digest TEXT NOT NULL,
    body TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (kind, name, version)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS applied (position INTEGER PRIMARY KEY, kind TEXT, name TEXT, version INTEGER);
CREATE TABLE IF NOT EXISTS guests (name TEXT PRIMARY KEY, token_sha256 TEXT NOT NULL UNIQUE) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, guest TEXT NOT NULL, user TEXT NOT NULL,
    groups TEXT NOT NULL, service TEXT NOT NULL, remote TEXT NOT NULL, opened_at REAL NOT NULL,
    revoked INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records (id INTEGER PRIMARY KEY AUTOINCREMENT, guest TEXT NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS health (seq INTEGER PRIMARY KEY AUTOINCREMENT, guest TEXT NOT NULL UNIQUE, at REAL NOT NULL,
    report TEXT NOT NULL, past TEXT NOT NULL);
INSERT OR IGNORE INTO meta VALUES ('generation', '1'), ('records_lost', '0');
"""

_NEWEST_VERSIONS = "SELECT kind, name, max(version), digest FROM documents GROUP BY kind, name"  # digest of that row


@dataclass(frozen=True, slots=True)
class SessionRow:
    """A session that a guest opened and did not close yet."""

    id: str
    guest: str
    subject: Subject
    service: str
    remote: str
    opened_at: float
    revoked: bool


class Store:
    """One connection behind a lock.  Raises ``sqlite3.Error`` where the file cannot be used."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # before SQLite makes it: who may read it knows every guest's commands
            path.touch(mode=0o600)
            if os.geteuid() == 0:  # 'sudo persona-broker apply' must not keep the service's user out
                owner = path.parent.stat()
                os.chown(path, owner.st_uid, owner.st_gid)
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(_SCHEMA)
        self._parsed: dict[tuple[str, str, int], Document] = {}

    def close(self) -> None:
        """Ends the connection."""
        with self._lock:
            self._db.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it, or nothing where it raises."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Everything that is read within is of one moment."""
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._db.execute("COMMIT")

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a query finds."""
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def data_version(self) -> int:
        """Another number after each write of another connection (PRAGMA data_version; microseconds)."""
        return int(self.rows("PRAGMA data_version")[0][0])

    # --- generation and what holds now ------------------------------------------------------------

    def generation(self) -> int:
        """The number of the newest change that can change a decision."""
        return int(self.rows("SELECT value FROM meta WHERE key = 'generation'")[0][0])

    def raise_generation(self) -> int:
        """Announces a change made elsewhere (a condition that began or ceased to hold)."""
        with self.writing() as db:
            return _raise(db)

    def sample(self) -> Sample | None:
        """The host's last load sample."""
        value = self._meta("sample")
        return Sample(value["at"], value["load"], value["source"]) if value else None

    def latches(self) -> Latches:
        """The thresholds that count as exceeded."""
        return frozenset(Threshold(*item) for item in self._meta("latches") or ())

    def put_sample(self, sample: Sample, latches: Latches) -> None:
        """Replaces both at once."""
        state = {"at": sample.at, "load": dict(sample.load), "source": sample.source}
        held = sorted([latch.metric, latch.below, latch.again_below] for latch in latches)
        with self.writing() as db:
            _put(db, "sample", state)
            _put(db, "latches", held)

    def set_load(self) -> dict[str, float]:
        """What the operator set with ``load set``."""
        return dict(self._meta("load_set") or {})

    def put_set_load(self, load: Mapping[str, float]) -> None:
        """The load that the settable source will report."""
        with self.writing() as db:
            _put(db, "load_set", dict(load))

    def _meta(self, key: str) -> Any:
        rows = self.rows("SELECT value FROM meta WHERE key = ?", key)
        return json.loads(rows[0][0]) if rows else None

    # --- documents --------------------------------------------------------------------------------

    def apply(self, documents: Sequence[Document]) -> Changes:
        """Replaces the whole set in one transaction; a version is new only where the content is.

        The generation rises only where something changed: leases outlive an ``apply`` of the same.
        """
        now, after = time.time(), identities(documents)
        bodies = [json.dumps(to_mapping(document)) for document in documents]
        with self.writing() as db:
            changes = compare(self.applied(), after)
            if not changes:
                return changes
            db.execute("DELETE FROM applied")
            newest = {(kind, name): (version, key) for kind, name, version, key in db.execute(_NEWEST_VERSIONS)}
            for position, ((kind, name, key), body) in enumerate(zip(after, bodies, strict=True)):
                version, known = newest.get((kind, name), (0, None))
                if key != known:
                    version += 1
                    db.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?)", (kind, name, version, key, body, now))
                db.execute("INSERT INTO applied VALUES (?, ?, ?, ?)", (position, kind, name, version))
            _raise(db)
        return changes

    def applied(self) -> list[Identity]:
        """What is applied, in order; for comparison, without parsing it."""
        query = "SELECT kind, name, digest FROM applied JOIN documents USING (kind, name, version) ORDER BY position"
        return [(kind, name, key) for kind, name, key in self.rows(query)]

    def documents(self) -> list[tuple[Document, int]]:
        """The applied set in order, each with its version."""
        query = (
            "SELECT kind, name, version, d.body FROM applied a JOIN documents d USING (kind, name, version)"
            " ORDER BY a.position"
        )
        with self._lock:  # versions never change, so of a large set only what is new is parsed
            rows = [((kind, name, version), body) for kind, name, version, body in self.rows(query)]
            self._parsed = {key: self._parsed.get(key) or parse_document(json.loads(body)) for key, body in rows}
            return [(self._parsed[key], key[2]) for key, _ in rows]

    def versions(self, kind: str, name: str) -> list[tuple[int, Document]]:
        """Every version of a document, oldest first."""
        query = "SELECT version, body FROM documents WHERE kind = ? AND name = ? ORDER BY version"
        return [(version, parse_document(json.loads(body))) for version, body in self.rows(query, kind, name)]

    def snapshot(self) -> Snapshot:
        """The applied set as an index."""
        return make_snapshot(self.documents())

    # --- guests -----------------------------------------------------------------------------------

    def add_guest(self, name: str, token: str | None = None) -> str:
        """Registers a guest, or gives it a new token; returns the token, which is kept only as a hash."""
        token = token or secrets.token_urlsafe(32)
        with self.writing() as db:
            db.execute("INSERT OR REPLACE INTO guests VALUES (?, ?)", (name, hash_token(token)))
        return token

    def remove_guest(self, name: str) -> bool:
        """Whether there was one; its event streams end."""
        with self.writing() as db:
            found = db.execute("DELETE FROM guests WHERE name = ?", (name,)).rowcount > 0
            if found:
                db.execute("DELETE FROM health WHERE guest = ?", (name,))
                _raise(db)
            return found

    def guests(self) -> list[str]:
        """The names of all guests."""
        return [name for (name,) in self.rows("SELECT name FROM guests ORDER BY name")]

    def tokens(self) -> dict[str, str]:
        """Guests by the hash of their token."""
        return {key: name for name, key in self.rows("SELECT name, token_sha256 FROM guests")}

    # --- sessions and records ---------------------------------------------------------------------

    def open_session(self, session: SessionRow) -> bool:
        """False where another guest has a session of that name."""
        with self.writing() as db:
            row = db.execute("SELECT guest FROM sessions WHERE id = ?", (session.id,)).fetchone()
            if row is not None and row[0] != session.guest:
                return False
            db.execute(
                "INSERT OR IGNORE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, 0)",
                (
                    session.id,
                    session.guest,
                    session.subject.user,
                    json.dumps(session.subject.groups),
                    session.service,
                    session.remote,
                    session.opened_at,
                ),
            )
            db.execute(
                "DELETE FROM sessions WHERE id IN (SELECT id FROM sessions WHERE guest = ?"
                " ORDER BY revoked DESC, opened_at DESC LIMIT -1 OFFSET ?)",
                (session.guest, SESSIONS_KEPT),
            )
            return True

    def session(self, ident: str) -> SessionRow | None:
        """One open session."""
        return next(iter(self._sessions("WHERE id = ?", ident)), None)

    def sessions(self) -> list[SessionRow]:
        """All open sessions, oldest first."""
        return self._sessions("ORDER BY opened_at")

    def _sessions(self, where: str, *values: Any) -> list[SessionRow]:
        columns = "id, guest, user, groups, service, remote, opened_at, revoked"
        rows = self.rows(f"SELECT {columns} FROM sessions {where}", *values)  # noqa: S608 - constants; values are bound
        return [
            SessionRow(i, g, Subject(u, tuple(json.loads(names)), g), s, r, at, bool(revoked))
            for i, g, u, names, s, r, at, revoked in rows
        ]

    def end_session(self, ident: str, guest: str) -> bool:
        """Whether the guest had such a session."""
        with self.writing() as db:
            return db.execute("DELETE FROM sessions WHERE id = ? AND guest = ?", (ident, guest)).rowcount > 0

    def revoke_session(self, ident: str) -> int | None:
        """From now on everything that it asks is denied; the new generation, ``None`` without such a session."""
        with self.writing() as db:
            if not db.execute("UPDATE sessions SET revoked = 1 WHERE id = ?", (ident,)).rowcount:
                return None
            return _raise(db)

    def revoked(self) -> frozenset[str]:
        """The sessions that are denied everything."""
        return frozenset(ident for (ident,) in self.rows("SELECT id FROM sessions WHERE revoked = 1"))

    def add_records(self, guest: str, records: Iterable[Record], lost: int) -> None:
        """Appends; the oldest beyond RECORDS_KEPT go."""
        rows = [(guest, json.dumps(encode_record(record))) for record in records]
        with self.writing() as db:
            db.executemany("INSERT INTO records (guest, body) VALUES (?, ?)", rows)
            db.execute("DELETE FROM records WHERE id <= (SELECT max(id) FROM records) - ?", (RECORDS_KEPT,))
            if lost:
                db.execute("UPDATE meta SET value = value + ? WHERE key = 'records_lost'", (lost,))

    def records(self, after: int = 0, limit: int = 100) -> list[tuple[int, str, dict[str, Any]]]:
        """(number, guest, RECORD) after a number, oldest first; the newest ``limit`` for ``after = 0``."""
        if after:
            rows = self.rows("SELECT id, guest, body FROM records WHERE id > ? ORDER BY id LIMIT ?", after, limit)
        else:
            rows = self.rows("SELECT id, guest, body FROM records ORDER BY id DESC LIMIT ?", limit)[::-1]
        return [(ident, guest, json.loads(body)) for ident, guest, body in rows]

    def records_lost(self) -> int:
        """How many records guests could not keep."""
        return int(self._meta("records_lost") or 0)


def make_snapshot(documents: Iterable[tuple[Document, int]]) -> Snapshot:
    """An index over documents and their versions, policies in the order given."""
    documents = list(documents)
    personas = {d.name: Versioned(d, version) for d, version in documents if isinstance(d, Persona)}
    return Snapshot([d for d, _ in documents if isinstance(d, Policy)], personas)


def _raise(db: sqlite3.Connection) -> int:
    db.execute("UPDATE meta SET value = value + 1 WHERE key = 'generation'")
    return int(db.execute("SELECT value FROM meta WHERE key = 'generation'").fetchone()[0])


def _put(db: sqlite3.Connection, key: str, value: Any) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))


def hash_token(token: str) -> str:
    """What is kept of a token.  A look-up by hash gives timing nothing to tell of the token itself."""
    return hashlib.sha256(token.encode()).hexdigest()
