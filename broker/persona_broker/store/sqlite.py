"""The database in one SQLite file (WAL): documents and versions, guests, sessions, decisions, what holds now.

Every process opens its own; ``data_version`` tells cheaply whether another wrote.  The generation is
raised in the same transaction as the change that it announces.
"""

import hashlib
import json
import logging
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from persona.canonical import digest, to_mapping
from persona.codec import Record, encode_record
from persona.conditions import Threshold
from persona.decisions import Subject
from persona.documents import Document, Persona, Policy
from persona.problems import Fault, PersonaError
from persona_broker.policy.conditions import Latches, Sample
from persona_broker.policy.diff import Changes, Identity, compare
from persona_broker.policy.merge import WHOLE, How, Stored, key_of, merge
from persona_broker.policy.snapshot import Snapshot, Versioned
from persona_broker.policy.unreadable import Unreadable, expansion_mapping, read_stored
from persona_broker.store import change_sets
from persona_broker.store.change_sets import NOBODY, Author, ChangeSet
from persona_broker.store.schema import migrate

log = logging.getLogger("persona.record")

RECORDS_KEPT = 200_000  # about 100 MB; the audit issue will stream them on
SESSIONS_KEPT = 4096  # of one guest: far more than are open, so the oldest is one that the guest forgot to end

_SKIPPED_MAX = 1000  # rows that cannot be read of which the log tells
T = TypeVar("T")

# how personas that use command sets came about is a row of its own, which an older broker does not look at
_NEWEST_VERSIONS = (
    "SELECT kind, name, version, d.digest, d.body, e.body FROM"
    " (SELECT kind, name, max(version) AS version FROM documents GROUP BY kind, name)"
    " JOIN documents d USING (kind, name, version) LEFT JOIN expansions e USING (kind, name, version)"
)
# a document whose own row is gone is applied all the same: its text cannot be read
_APPLIED = (
    "SELECT kind, name, version, d.digest, d.body, e.body FROM applied a LEFT JOIN documents d"
    " USING (kind, name, version) LEFT JOIN expansions e USING (kind, name, version) ORDER BY a.position"
)


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
    ending: bool = False  # what runs in it is asked to end as well


@dataclass(frozen=True, slots=True)
class Plan:
    """The applied documents before and after an ``apply``, and what it changes; ``revision`` holds before it."""

    revision: int
    before: tuple[Stored, ...]
    after: tuple[Stored, ...]
    changes: Changes


@dataclass(frozen=True, slots=True)
class Changed:
    """What an ``apply`` did, and the revision that holds now."""

    revision: int
    changes: Changes


class Store:
    """One connection behind a lock.  Raises ``sqlite3.Error`` where the file cannot be used or is a newer broker's."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # before SQLite makes it: who may read it knows every guest's commands
            path.touch(mode=0o600)
            if os.geteuid() == 0:  # 'sudo persona-broker apply' must not keep the service's user out
                owner = path.parent.stat()
                os.chown(path, owner.st_uid, owner.st_gid)
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            migrate(self._db)
        except BaseException:
            self._db.close()
            raise
        self._parsed: dict[tuple[str, str, int], Document] = {}
        self._told: set[Unreadable] = set()  # each is logged once
        self._skipped: set[str] = set()  # the same

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
                if self._db.in_transaction:  # with a full disk, SQLite has rolled it back itself
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
        """The host's last load sample; none where it cannot be read."""
        return self._meta("sample", lambda value: Sample(value["at"] + 0.0, dict(value["load"]), value["source"]), None)

    def latches(self) -> Latches | None:
        """The thresholds that count as exceeded; ``None`` where they cannot be read."""
        none: Latches = frozenset()
        return self._meta("latches", lambda value: frozenset(Threshold(*item) for item in value), none)

    def put_sample(self, sample: Sample, latches: Latches) -> None:
        """Replaces both at once."""
        state = {"at": sample.at, "load": dict(sample.load), "source": sample.source}
        held = sorted([latch.metric, latch.below, latch.again_below] for latch in latches)
        with self.writing() as db:
            _put(db, "sample", state)
            _put(db, "latches", held)

    def set_load(self) -> dict[str, float]:
        """What the operator set with ``load set``."""
        return self._meta("load_set", lambda value: {str(key): value[key] + 0.0 for key in value}, {}) or {}

    def put_set_load(self, load: Mapping[str, float]) -> None:
        """The load that the settable source will report."""
        with self.writing() as db:
            _put(db, "load_set", dict(load))

    def _meta(self, key: str, parse: Callable[[Any], T], default: T) -> T | None:
        """What is kept under a key; ``default`` where nothing is, ``None`` where it cannot be read."""
        rows = self.rows("SELECT value FROM meta WHERE key = ?", key)
        if not rows:
            return default
        try:
            return parse(json.loads(rows[0][0]))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            self._skip(f"meta {key}", error)
            return None

    def _skip(self, what: str, error: Exception) -> None:
        if what not in self._skipped and len(self._skipped) < _SKIPPED_MAX:
            self._skipped.add(what)
            log.error("%s cannot be read and does not count: %r", what, error)

    # --- documents --------------------------------------------------------------------------------

    def apply(self, documents: Sequence[Document], how: How = WHOLE) -> Changes:
        """``change`` by nobody in particular."""
        return self.change(documents, how, NOBODY).changes

    def change(self, documents: Sequence[Stored], how: How, author: Author, if_revision: int | None = None) -> Changed:
        """Does what ``plan`` says, in one transaction; a version is new only where the content is.

        Generation and revision rise only where something changed: leases outlive an ``apply`` of the same.  Raises
        ``PersonaError``, also where another revision than ``if_revision`` holds: it is not what somebody has looked at.
        """
        self.catch_up()  # apart from what may be refused: a refusal names the revision
        with self.writing() as db:
            change_sets.catch_up(db)
            plan = self.plan(documents, how)
            if if_revision is not None:
                self.refuse_another(plan.revision, if_revision)
            if not plan.changes:
                return Changed(plan.revision, plan.changes)
            used = change_sets.applied(db)
            db.execute("DELETE FROM applied")
            newest = {(kind, name): rest for kind, name, *rest in db.execute(_NEWEST_VERSIONS)}
            kept, now = set(map(id, plan.before)), time.time()
            for position, document in enumerate(plan.after):
                kind, name = key_of(document)
                if isinstance(document, Unreadable) or id(document) in kept:
                    version = used[kind, name]
                else:
                    key, (body, expansion) = digest(document), _texts(document)
                    version, known, *stored = newest.get((kind, name), (0, None, None, None))
                    if key != known or not _intact(kind, name, key, tuple(stored), (body, expansion)):
                        version = max(version, used.get((kind, name), 0)) + 1  # a number is never used twice
                        values = (kind, name, version, key, body, now)
                        db.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?)", values)
                        row = (kind, name, version)
                        db.execute("DELETE FROM expansions WHERE kind = ? AND name = ? AND version = ?", row)
                        if expansion is not None:
                            db.execute("INSERT INTO expansions VALUES (?, ?, ?, ?)", (*row, expansion))
                db.execute("INSERT INTO applied VALUES (?, ?, ?, ?)", (position, kind, name, version))
            change_sets.add(db, used, author)
            _raise(db)
            return Changed(plan.revision + 1, plan.changes)

    def refuse_another(self, revision: int, wanted: int) -> None:
        """Raises ``PersonaError``, with who was faster, where ``revision`` is not the one that was ``wanted``."""
        if revision != wanted:
            with self.reading():
                raise PersonaError(Fault.CONFLICT, change_sets.overtaken(self._db, wanted))

    def catch_up(self) -> None:
        """Writes down as a change-set what a broker applied that keeps none; without one, it writes nothing."""
        with self.reading():
            behind = change_sets.is_behind(self._db)
        if behind:
            with self.writing() as db:
                change_sets.catch_up(db)

    def revision(self) -> int:
        """The number of the newest change-set; 0 = there is none."""
        with self.reading():
            return change_sets.revision(self._db)

    def history(self, limit: int, name: str | None = None) -> list[ChangeSet]:
        """The newest change-sets first; with ``name`` those that changed a document of that name."""
        with self.reading():
            return change_sets.newest(self._db, limit, name)

    def documents_at(self, revision: int) -> list[tuple[Document | Unreadable, int]]:
        """What was applied at a revision, policies last and in order, each with its version.

        Raises ``PersonaError`` where there is no such revision.
        """
        with self.reading():
            if revision > (newest := change_sets.revision(self._db)):
                raise PersonaError(Fault.NOT_FOUND, f"there is no revision {revision}; the newest is {newest}")
            place = {name: number for number, name in enumerate(change_sets.policies_at(self._db, revision))}
            versions = sorted(
                change_sets.versions_at(self._db, revision).items(),
                key=lambda item: (item[0][0] == "Policy", place.get(item[0][1], 0), item[0]),
            )
            return [(self._version(*key, version), version) for key, version in versions]

    def _version(self, kind: str, name: str, version: int) -> Document | Unreadable:
        found = self.version(kind, name, version)
        return found[1] if found is not None else _read(kind, name, version, None, None)

    def count(self) -> int:
        """How many documents are applied."""
        return int(self.rows("SELECT count(*) FROM applied")[0][0])

    def plan(self, documents: Sequence[Stored], how: How = WHOLE) -> Plan:
        """What ``apply`` would do.  A document whose stored text cannot be read is changed by the same one.

        One that is given as unreadable stays as it is: it must be applied.

        Raises ``PersonaError`` for what ``apply`` would refuse.
        """
        with self.reading():
            revision = change_sets.revision(self._db)
            before = [document for document, _ in self.documents()]
            rows = self.rows(_APPLIED)
        after = merge(before, documents, how)
        kept = set(map(id, before))
        written = [document for document in after if not isinstance(document, Unreadable) and id(document) not in kept]
        given = {key_of(document): (digest(document), _texts(document)) for document in written}
        old: list[Identity] = []
        new = {(kind, name): str(key) for kind, name, _version, key, *_ in rows}
        for kind, name, _version, key, *stored in rows:
            wanted, texts = given.get((kind, name), ("", ("", None)))
            broken = key == wanted and not _intact(kind, name, key, tuple(stored), texts)
            old.append((kind, name, "cannot be read" if broken else str(key)))
        new |= {key: wanted for key, (wanted, _) in given.items()}
        changes = compare(old, [(*key_of(document), new[key_of(document)]) for document in after])
        return Plan(revision, tuple(before), tuple(after), changes)

    def documents(self) -> list[tuple[Document | Unreadable, int]]:
        """The applied set in order, each with its version.  Those that cannot be read are logged once."""
        with self._lock:  # versions never change, so of a large set only what is new is parsed
            found = [(kind, name, version, texts) for kind, name, version, _digest, *texts in self.rows(_APPLIED)]
            parsed: dict[tuple[str, str, int], Document | Unreadable] = {}
            for kind, name, version, texts in found:
                key = kind, name, version
                parsed[key] = self._parsed.get(key) or _read(kind, name, version, *texts)
            self._parsed = {key: item for key, item in parsed.items() if not isinstance(item, Unreadable)}
            self._tell(item for item in parsed.values() if isinstance(item, Unreadable))
            return [(parsed[kind, name, version], version) for kind, name, version, _ in found]

    def texts(self) -> list[tuple[str, str, int, str | None]]:
        """The applied set as it is stored: kind, name, version and JSON, ``None`` where that is gone."""
        return [(kind, name, version, body) for kind, name, version, _digest, body, _expansion in self.rows(_APPLIED)]

    def text(self, kind: str, name: str, version: int) -> str | None:
        """The JSON of one version as it is stored; ``None`` where it is gone."""
        rows = self.rows("SELECT body FROM documents WHERE kind = ? AND name = ? AND version = ?", kind, name, version)
        return str(rows[0][0]) if rows else None

    def _tell(self, unreadable: Iterable[Unreadable]) -> None:
        now = set(unreadable)
        for item in now - self._told:
            log.error("%s; it grants nothing until it is applied anew", item)
        for item in self._told - now:
            log.warning("%s %s is read again, or not applied any more", item.kind, item.name)
        self._told = now

    def version(self, kind: str, name: str, version: int | None = None) -> tuple[int, Document | Unreadable] | None:
        """One version of a document, by default the newest; ``None`` where there is none."""
        tables = "documents d LEFT JOIN expansions e USING (kind, name, version)"
        query = f"SELECT version, d.body, e.body FROM {tables} WHERE kind = ? AND name = ?"  # noqa: S608 - constants
        where = "AND version = ifnull(?, version) ORDER BY version DESC LIMIT 1"
        for number, body, expansion in self.rows(f"{query} {where}", kind, name, version):
            return number, _read(kind, name, number, body, expansion)
        return None

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
                db.execute("DELETE FROM sessions WHERE guest = ?", (name,))  # nobody is left to say that they ended
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
        columns = "id, guest, user, groups, service, remote, opened_at, revoked, id IN (SELECT id FROM ending)"
        rows = self.rows(f"SELECT {columns} FROM sessions {where}", *values)  # noqa: S608 - constants; values are bound
        found = []
        for i, g, u, names, s, r, at, revoked, ending in rows:
            try:
                groups = tuple(map(str, json.loads(names)))
            except (ValueError, TypeError, RecursionError) as error:
                self._skip(f"session {i}", error)  # its guest is answered as if there were none, and opens another
                continue
            found.append(SessionRow(i, g, Subject(u, groups, g), s, r, at, bool(revoked), bool(ending)))
        return found

    def end_session(self, ident: str, guest: str) -> bool:
        """Whether the guest had such a session."""
        with self.writing() as db:
            return db.execute("DELETE FROM sessions WHERE id = ? AND guest = ?", (ident, guest)).rowcount > 0

    def end_all_but(self, guest: str, alive: Iterable[str], opened_before: float) -> int:
        """Ends what a guest opened before a moment and does not have any more; how many those were."""
        with self.writing() as db:
            old = db.execute("SELECT id FROM sessions WHERE guest = ? AND opened_at < ?", (guest, opened_before))
            gone = {ident for (ident,) in old} - set(alive)
            db.executemany("DELETE FROM sessions WHERE id = ?", [(ident,) for ident in gone])
        return len(gone)

    def end_strays(self) -> int:
        """Ends the sessions of guests that are not registered; how many those were."""
        with self.writing() as db:
            return db.execute("DELETE FROM sessions WHERE guest NOT IN (SELECT name FROM guests)").rowcount

    def revoke(self, who: str, guest: str | None = None, *, end: bool = False) -> list[SessionRow]:
        """The session of this id, and all of a user of this name, are denied everything from now on; which those are.

        Only those of ``guest``, where it is given.  ``end``: what runs in them is asked to end, too.
        """
        where, values = "WHERE ? IN (id, user) AND guest = ifnull(?, guest)", (who, guest)
        with self.writing() as db:
            columns = "id, guest, user, service, remote, opened_at"
            rows = db.execute(f"SELECT {columns} FROM sessions {where} ORDER BY opened_at", values)  # noqa: S608 - as above
            # their groups matter to nobody now, and may be what cannot be read of them
            found = [SessionRow(i, g, Subject(u, (), g), s, r, at, True, end) for i, g, u, s, r, at in rows]
            db.execute(f"UPDATE sessions SET revoked = 1 {where}", values)  # noqa: S608 - as above
            if end:
                db.execute(f"INSERT OR IGNORE INTO ending SELECT id FROM sessions {where}", values)  # noqa: S608 - as above
            if found:
                _raise(db)
        return found

    def revoked(self) -> frozenset[str]:
        """The sessions that are denied everything."""
        return frozenset(ident for (ident,) in self.rows("SELECT id FROM sessions WHERE revoked = 1"))

    def ending(self) -> frozenset[str]:
        """Those of them in which what runs is asked to end."""
        return frozenset(ident for (ident,) in self.rows("SELECT id FROM ending"))

    def add_records(self, guest: str, records: Iterable[Record], lost: int) -> None:
        """Appends; the oldest beyond RECORDS_KEPT go."""
        rows = [(guest, json.dumps(encode_record(record))) for record in records]
        with self.writing() as db:
            db.executemany("INSERT INTO records (guest, body) VALUES (?, ?)", rows)
            db.execute("DELETE FROM records WHERE id <= (SELECT max(id) FROM records) - ?", (RECORDS_KEPT,))
            if lost:
                db.execute("UPDATE meta SET value = value + ? WHERE key = 'records_lost'", (lost,))

    def records_lost(self) -> int:
        """How many records guests could not keep."""
        return self._meta("records_lost", int, 0) or 0


def make_snapshot(documents: Iterable[tuple[Document | Unreadable, int]]) -> Snapshot:
    """An index over documents and their versions, policies in the order given."""
    documents = list(documents)
    personas = {d.name: Versioned(d, version) for d, version in documents if isinstance(d, Persona)}
    known = (d.policy if isinstance(d, Unreadable) else d for d, _ in documents)
    unreadable = [d for d, _ in documents if isinstance(d, Unreadable)]
    return Snapshot([d for d in known if isinstance(d, Policy)], personas, unreadable)


_Texts = tuple[str, str | None]  # of a document and of its expansion


def _texts(document: Document) -> _Texts:
    expansion = expansion_mapping(document)
    return json.dumps(to_mapping(document)), None if expansion is None else json.dumps(expansion)


def _read(kind: str, name: str, version: int, body: Any, expansion: Any) -> Document | Unreadable:
    def load() -> Any:
        if body is None:
            raise ValueError("its text is not there")
        return json.loads(body)

    return read_stored(kind, name, version, load, None if expansion is None else lambda: json.loads(expansion))


def _intact(kind: str, name: str, key: str, stored: tuple[Any, ...], texts: _Texts) -> bool:
    """Whether what is stored can be read and is the document of this digest, whose texts would be ``texts``."""
    if stored == texts:
        return True  # as nearly always, and a thousand times faster
    document = _read(kind, name, 0, *stored)
    return not isinstance(document, Unreadable) and digest(document) == key


def _raise(db: sqlite3.Connection) -> int:
    db.execute("UPDATE meta SET value = value + 1 WHERE key = 'generation'")
    return int(db.execute("SELECT value FROM meta WHERE key = 'generation'").fetchone()[0])


def _put(db: sqlite3.Connection, key: str, value: Any) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))


def hash_token(token: str) -> str:
    """What is kept of a token.  A look-up by hash gives timing nothing to tell of the token itself."""
    return hashlib.sha256(token.encode()).hexdigest()
