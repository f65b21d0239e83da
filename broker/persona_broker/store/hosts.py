"""The hosts as ``persona-host`` saw them last, one row each, and which guest is which of their domains."""

import json
import logging
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from persona.conditions import Threshold
from persona.problems import Fault, PersonaError
from persona_broker.host.core.readings import DomainState
from persona_broker.host.core.sample import HostSample, decode, encode
from persona_broker.policy.conditions import Latches, Sample
from persona_broker.policy.host_load import HostState
from persona_broker.store.database import Database, put_meta, raise_generation
from persona_broker.store.interface import NOBODY, Author, Binding, HostRow, Store
from persona_broker.store.pending import note

log = logging.getLogger("persona.record")

_HAS_PROCESS = (DomainState.RUNNING, DomainState.PAUSED, DomainState.OTHER)
_NARROW = "generation_narrow"  # [G, S]: generation G concerned some guests only; S is the newest that concerns all


class Hosts(Database):
    """The part of the database that has what hypervisors say."""

    def put_hosts(self, samples: Iterable[tuple[HostSample, Latches]]) -> None:
        """Replaces the samples of these hosts, and their latches with them."""
        rows = [(sample.host, sample.at, json.dumps(encode(sample)), _text(latches)) for sample, latches in samples]
        with self.writing() as db:
            db.executemany("INSERT OR REPLACE INTO hosts (name, at, sample, latches) VALUES (?, ?, ?, ?)", rows)

    def keep_hosts(self, names: Iterable[str]) -> None:
        """Deletes the samples of all hosts but these."""
        gone = set(self.host_names()) - set(names)
        if gone:
            with self.writing() as db:
                db.executemany("DELETE FROM hosts WHERE name = ?", [(name,) for name in gone])

    def hosts_after(self, number: int) -> list[HostRow]:
        """Those that were put after the one of this number, in order."""
        query = "SELECT seq, name, sample, latches FROM hosts WHERE seq > ? ORDER BY seq"
        return [HostRow(*row) for row in self.rows(query, number)]

    def host_names(self) -> list[str]:
        """All hosts that have a sample."""
        return [name for (name,) in self.rows("SELECT name FROM hosts ORDER BY name")]

    def bindings(self) -> dict[str, Binding]:
        """By guest, of those that are bound to a domain."""
        rows = self.rows("SELECT guest, uuid, generation FROM bindings ORDER BY guest")
        return {guest: Binding(uuid, generation) for guest, uuid, generation in rows}

    def bind(self, guest: str, uuid: str, author: Author = NOBODY) -> None:
        """Binds a guest to a domain.  Raises ``PersonaError``: no such guest, or another guest has the domain."""
        with self.writing() as db:
            if db.execute("SELECT 1 FROM guests WHERE name = ?", (guest,)).fetchone() is None:
                raise PersonaError(Fault.NOT_FOUND, f"there is no guest {guest!r}")
            other = db.execute("SELECT guest FROM bindings WHERE uuid = ? AND guest != ?", (uuid, guest)).fetchone()
            if other is not None:
                fix = f"'persona-broker guest unbind {other[0]}' frees it"
                raise PersonaError(Fault.CONFLICT, f"guest {other[0]} is bound to domain {uuid} already; {fix}")
            if db.execute("SELECT 1 FROM bindings WHERE guest = ? AND uuid = ?", (guest, uuid)).fetchone() is not None:
                return
            generation = raise_generation(db)
            db.execute("INSERT OR REPLACE INTO bindings VALUES (?, ?, ?)", (guest, uuid, generation))
            note(db, "guest_bound", author=author.name, vm=guest, uuid=uuid)

    def unbind(self, guest: str, author: Author = NOBODY) -> bool:
        """Whether it was bound."""
        with self.writing() as db:
            found = db.execute("DELETE FROM bindings WHERE guest = ? RETURNING uuid", (guest,)).fetchall()
            for (uuid,) in found:
                raise_generation(db)
                note(db, "guest_unbound", author=author.name, vm=guest, uuid=uuid)
            return bool(found)

    def raise_generation_for(self, guests: Iterable[str]) -> int:
        """Announces a change that concerns these guests alone; the new generation."""
        with self.writing() as db:
            shared = _shared(db)
            generation = raise_generation(db)
            put_meta(db, _NARROW, [generation, shared])
            concerned = [(generation, guest) for guest in guests]
            db.executemany("UPDATE bindings SET generation = ? WHERE guest = ?", concerned)
            return generation

    def shared_generation(self) -> int:
        """The newest generation that concerns every guest."""
        with self.reading():
            return _shared(self._db)


def _shared(db: sqlite3.Connection) -> int:
    """Whoever raises the generation otherwise, a restore and an older broker too, concerns every guest by that."""
    (value,) = db.execute("SELECT value FROM meta WHERE key = 'generation'").fetchone()
    row = db.execute("SELECT value FROM meta WHERE key = ?", (_NARROW,)).fetchone()
    generation = int(value)
    try:
        narrow, shared = json.loads(row[0]) if row is not None else (0, 0)
    except (ValueError, TypeError):  # not known: as if it concerned everybody
        return generation
    return shared if narrow == generation and isinstance(shared, int) and shared < generation else generation


def _text(latches: Latches) -> str:
    return json.dumps(sorted([latch.metric, latch.below, latch.again_below] for latch in latches))


@dataclass(frozen=True, slots=True)
class SeenHost:
    """A host's newest sample, and what conditions are judged from."""

    sample: HostSample
    state: HostState


class SeenHosts:
    """All hosts, of which each look reads only those that are new.  One per reader, not for two threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._number = 0
        self._seen: Mapping[str, SeenHost] = {}
        self._states: Mapping[str, HostState] = {}
        self.unreadable: set[str] = set()  # hosts that have a sample which cannot be read

    def look(self) -> Mapping[str, HostState]:
        """By host, what conditions are judged from; the same object while nothing is new."""
        rows = self._store.hosts_after(self._number)
        gone = self._seen.keys() - self._store.host_names() if self._seen else frozenset()
        if rows or gone:
            seen = {name: host for name, host in self._seen.items() if name not in gone}
            for row in rows:
                self._number = row.number
                try:
                    seen[row.name] = _seen(row)
                    self.unreadable.discard(row.name)
                except (PersonaError, ValueError, TypeError, RecursionError) as error:  # another version wrote it
                    log.error("the sample of host %s cannot be read: %s", row.name, error)
                    seen.pop(row.name, None)
                    self.unreadable.add(row.name)
            self._seen = seen
            self._states = {name: host.state for name, host in seen.items()}
        return self._states

    @property
    def seen(self) -> Mapping[str, SeenHost]:
        """What ``look`` found last, whole."""
        return self._seen


def _seen(row: HostRow) -> SeenHost:
    sample = decode(json.loads(row.sample))
    try:
        latches: Latches | None = frozenset(Threshold(*item) for item in json.loads(row.latches))
    except (ValueError, TypeError) as error:
        log.error("what host %s had exceeded cannot be read, and no load is below anything: %s", row.name, error)
        latches = None
    load = Sample(sample.at, sample.load, sample.host)
    runs = {domain.uuid: domain.state in _HAS_PROCESS for domain in sample.domains}
    return SeenHost(sample, HostState(sample.host, load, latches, sample.domains_at, runs))
