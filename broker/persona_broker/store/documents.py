"""Documents: which are applied, what an ``apply`` would change and changes, and what there was at any revision."""

import logging
import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import Any

from persona.documents import Document
from persona.problems import Fault, PersonaError
from persona_broker.policy.diff import Identity, compare
from persona_broker.policy.merge import WHOLE, How, Stored, key_of, merge
from persona_broker.policy.origin import NOWHERE, Origin
from persona_broker.policy.snapshot import Snapshot
from persona_broker.policy.unreadable import Unreadable
from persona_broker.store import change_sets
from persona_broker.store.database import Access, Database, raise_generation, read_only
from persona_broker.store.interface import Author, Changed, ChangeSet, Origins, Plan, Text
from persona_broker.store.schema import version_of
from persona_broker.store.stored_text import is_intact, make_snapshot, read, text_of

log = logging.getLogger("persona.record")

# how personas that use command sets came about is a row of its own, which an older broker does not look at
_TEXTS = "documents d LEFT JOIN expansions e USING (kind, name, version)"
_NEWEST = (
    f"SELECT version, d.digest, d.body, e.body FROM {_TEXTS}"  # noqa: S608 - constants
    " WHERE kind = ? AND name = ? ORDER BY version DESC LIMIT 1"
)
# a document whose own row is gone is applied all the same: its text cannot be read
_APPLIED = (
    "SELECT kind, name, version, d.digest, d.body, e.body FROM applied a LEFT JOIN documents d"
    " USING (kind, name, version) LEFT JOIN expansions e USING (kind, name, version) ORDER BY a.position"
)


class Documents(Database):
    """The part of the database that decisions are made from, with its history."""

    def __init__(self, path: Path, access: Access = Access.WRITE) -> None:
        super().__init__(path, access)
        self._parsed: dict[tuple[str, str, int], Document] = {}
        self._told: set[Unreadable] = set()  # each is logged once

    # --- changes ------------------------------------------------------------------------------------

    def plan(self, documents: Sequence[Stored], how: How = WHOLE, origins: Origins = MappingProxyType({})) -> Plan:
        """What applying these would do.  A document whose stored text cannot be read is changed by the same one.

        One that is given as unreadable stays as it is: it must be applied.  ``origins`` are those of the documents.

        Raises ``PersonaError`` for what cannot be applied.
        """
        with self.reading():
            revision = change_sets.revision(self._db)
            rows = self.rows(_APPLIED)
            before = [document for document, _ in self._parse(rows)]
            known = change_sets.origins_at(self._db, revision)
        after = merge(before, documents, how)
        kept = set(map(id, before))
        written = [document for document in after if not isinstance(document, Unreadable) and id(document) not in kept]
        texts = {key_of(document): text_of(document) for document in written}
        old: list[Identity] = []
        new = {(kind, name): str(key) for kind, name, _version, key, *_ in rows}
        for kind, name, _version, key, *stored in rows:
            text = texts.get((kind, name))
            broken = text is not None and key == text.digest and not is_intact((kind, name), (key, *stored), text)
            old.append((kind, name, "cannot be read" if broken else str(key)))
        new |= {key: text.digest for key, text in texts.items()}
        changes = compare(old, [(*key_of(document), new[key_of(document)]) for document in after])
        found = {key: origins.get(key, NOWHERE) for key in map(key_of, documents)}
        moved = {key: origin for key, origin in found.items() if origin != known.get(key, NOWHERE)}
        return Plan(revision, tuple(before), tuple(after), changes, texts, moved)

    def carry_out(self, plan: Plan, author: Author) -> Changed:
        """Does what a plan says, in one transaction; a version is new only where the content is.

        Generation and revision rise only where something changed: leases outlive an ``apply`` of the same, also one
        of documents that moved within their files.  Raises ``PersonaError`` where another revision holds than the one
        that the plan was made for: nobody has seen what it would do then.
        """
        with self.writing() as db:
            if not change_sets.is_behind(db):
                self.refuse_another(change_sets.revision(db), plan.revision)
                return _write(db, plan, author)
            change_sets.catch_up(db)  # and nothing else: the refusal names its revision
        self.refuse_another(self.revision(), plan.revision)
        return self.carry_out(plan, author)

    def change(
        self, documents: Sequence[Stored], how: How, author: Author, origins: Origins = MappingProxyType({})
    ) -> Changed:
        """Plans and does it at once, whatever revision holds.  Raises ``PersonaError``."""
        with self.writing() as db:
            change_sets.catch_up(db)
            return _write(db, self.plan(documents, how, origins), author)

    def refuse_another(self, revision: int, wanted: int) -> None:
        """Raises ``PersonaError``, with who was faster, where ``revision`` is not the one that was ``wanted``."""
        if revision != wanted:
            with self.reading():
                raise PersonaError(Fault.CONFLICT, change_sets.overtaken(self._db, wanted))

    def is_behind(self) -> bool:
        """Whether a broker that keeps no change-sets applied something since the newest one."""
        with self.reading():
            return change_sets.is_behind(self._db)

    def catch_up(self) -> None:
        """Writes down as a change-set what such a broker applied; without one, it writes nothing."""
        if self.is_behind():
            with self.writing() as db:
                change_sets.catch_up(db)

    # --- history ------------------------------------------------------------------------------------

    def revision(self) -> int:
        """The number of the newest change-set; 0 = there is none."""
        with self.reading():
            return change_sets.revision(self._db)

    def history(self, limit: int, name: str | None = None) -> list[ChangeSet]:
        """The newest change-sets first; with ``name`` those that changed a document of that name."""
        with self.reading():
            return change_sets.newest(self._db, limit, name)

    def change_set(self, revision: int) -> ChangeSet | None:
        """The one of a revision."""
        with self.reading():
            return change_sets.one(self._db, revision)

    def change_set_after(self, revision: int) -> ChangeSet | None:
        """The one that came next."""
        with self.reading():
            return change_sets.after(self._db, revision)

    def documents_at(self, revision: int) -> list[tuple[Document | Unreadable, int]]:
        """What was applied at a revision, policies last and in order, each with its version.

        Raises ``PersonaError`` where there is no such revision.
        """
        with self.reading():
            if revision > (newest := change_sets.revision(self._db)):
                raise PersonaError(Fault.NOT_FOUND, f"there is no revision {revision}; the newest is {newest}")
            rank = {name: number for number, name in enumerate(change_sets.policies_at(self._db, revision))}
            versions = sorted(
                change_sets.versions_at(self._db, revision).items(),
                key=lambda item: (item[0][0] == "Policy", rank.get(item[0][1], 0), item[0]),
            )
            return [(self._version(*key, version), version) for key, version in versions]

    def _version(self, kind: str, name: str, version: int) -> Document | Unreadable:
        found = self.version(kind, name, version)
        return found[1] if found is not None else read(kind, name, version, None, None, None)

    def count(self) -> int:
        """How many documents are applied."""
        return int(self.rows("SELECT count(*) FROM applied")[0][0])

    # --- what is applied ----------------------------------------------------------------------------

    def documents(self) -> list[tuple[Document | Unreadable, int]]:
        """The applied set in order, each with its version.  Those that cannot be read are logged once."""
        return self._parse(self.rows(_APPLIED))

    def _parse(self, rows: list[tuple[Any, ...]]) -> list[tuple[Document | Unreadable, int]]:
        with self._lock:  # versions never change, so of a large set only what is new is parsed
            parsed: dict[tuple[str, str, int], Document | Unreadable] = {}
            for row in rows:
                parsed[row[:3]] = self._parsed.get(row[:3]) or read(*row)
            self._parsed = {key: item for key, item in parsed.items() if not isinstance(item, Unreadable)}
            self._tell(item for item in parsed.values() if isinstance(item, Unreadable))
            return [(parsed[row[:3]], row[2]) for row in rows]

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
        query = f"SELECT version, d.digest, d.body, e.body FROM {_TEXTS} WHERE kind = ? AND name = ?"  # noqa: S608 - constants
        where = "AND version = ifnull(?, version) ORDER BY version DESC LIMIT 1"
        for number, *stored in self.rows(f"{query} {where}", kind, name, version):
            return number, read(kind, name, number, *stored)
        return None

    def snapshot(self) -> Snapshot:
        """The applied set as an index."""
        with self.reading():
            return make_snapshot(self.documents(), self.origins())

    def origins(self, revision: int | None = None) -> dict[tuple[str, str], Origin]:
        """Where the documents of a revision, by default the newest, are written, by kind and name; of those known."""
        with self.reading():
            number = change_sets.revision(self._db) if revision is None else revision
            return change_sets.origins_at(self._db, number)

    def origin_of(self, kind: str, name: str, version: int) -> Origin:
        """Where a version of a document was written when it was last applied."""
        with self.reading():
            number = change_sets.since(self._db, kind, name, version)
            return change_sets.origin_of(self._db, kind, name, number)


def applied_texts(path: Path) -> list[tuple[str, str, int, str | None]]:
    """What ``Documents.texts`` returns, of a database of any version, also one that is to be migrated.

    Raises ``sqlite3.Error``.
    """
    with closing(read_only(path)) as db:
        version_of(db)
        query = "SELECT kind, name, version, d.body FROM applied LEFT JOIN documents d USING (kind, name, version)"
        return db.execute(f"{query} ORDER BY position").fetchall()


def _write(db: sqlite3.Connection, plan: Plan, author: Author) -> Changed:
    """The documents, what is applied, the change-set with the origins, and the generation."""
    if plan.changes:
        _write_documents(db, plan, author, raise_generation(db))
    change_sets.put_origins(db, plan.moved)
    return Changed(change_sets.revision(db), plan.changes)


def _write_documents(db: sqlite3.Connection, plan: Plan, author: Author, generation: int) -> None:
    used, now = change_sets.applied(db), time.time()
    floor = db.execute("SELECT coalesce(max(value), 0) FROM meta WHERE key = 'version_floor'").fetchone()[0]
    old = {position: row for position, *row in db.execute("SELECT position, kind, name, version FROM applied")}
    new: list[list[str | int]] = []
    for document in plan.after:
        key = key_of(document)
        text = plan.texts.get(key)
        new.append(
            [*key, used[key] if text is None else _stored(db, key, text, max(used.get(key, 0), int(floor)), now)]
        )
    moved = [(position, *row) for position, row in enumerate(new) if old.get(position) != row]
    db.executemany("INSERT OR REPLACE INTO applied VALUES (?, ?, ?, ?)", moved)
    db.execute("DELETE FROM applied WHERE position >= ?", (len(new),))
    change_sets.add(db, used, author, generation)


def _stored(db: sqlite3.Connection, key: tuple[str, str], text: Text, used: int, now: float) -> int:
    """The version of a text: the newest one where that is the same, else one above ``used`` that is stored now."""
    version, *stored = db.execute(_NEWEST, key).fetchone() or (0, None, None, None)
    if is_intact(key, stored, text):
        return int(version)
    version = max(version, used) + 1  # a number is never used twice
    db.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?)", (*key, version, text.digest, text.body, now))
    db.execute("DELETE FROM expansions WHERE kind = ? AND name = ? AND version = ?", (*key, version))
    if text.expansion is not None:
        db.execute("INSERT INTO expansions VALUES (?, ?, ?, ?)", (*key, version, text.expansion))
    return version
