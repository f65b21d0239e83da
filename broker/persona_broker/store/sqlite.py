"""The store in one SQLite file: documents and versions, guests, sessions, what holds now."""

from collections.abc import Mapping

from persona.conditions import Threshold
from persona_broker.policy.conditions import Latches, Sample
from persona_broker.store.database import put_meta
from persona_broker.store.documents import Documents
from persona_broker.store.health import Health
from persona_broker.store.hosts import Hosts
from persona_broker.store.interface import NOBODY, Author
from persona_broker.store.pending import note
from persona_broker.store.rollout import Rollout
from persona_broker.store.sessions import Sessions


class SqliteStore(Documents, Sessions, Health, Hosts, Rollout):
    """The first implementation of ``interface.Store``: all parts over one connection, and the host's load."""

    def sample(self) -> Sample | None:
        """The host's last load sample; none where it cannot be read."""
        return self.meta("sample", lambda value: Sample(value["at"] + 0.0, dict(value["load"]), value["source"]), None)

    def latches(self) -> Latches | None:
        """The thresholds that count as exceeded; ``None`` where they cannot be read."""
        none: Latches = frozenset()
        return self.meta("latches", lambda value: frozenset(Threshold(*item) for item in value), none)

    def put_sample(self, sample: Sample, latches: Latches) -> None:
        """Replaces both at once."""
        state = {"at": sample.at, "load": dict(sample.load), "source": sample.source}
        held = sorted([latch.metric, latch.below, latch.again_below] for latch in latches)
        with self.writing() as db:
            put_meta(db, "sample", state)
            put_meta(db, "latches", held)

    def set_load(self) -> dict[str, float]:
        """What the operator set with ``load set``."""
        return self.meta("load_set", lambda value: {str(key): value[key] + 0.0 for key in value}, {}) or {}

    def put_set_load(self, load: Mapping[str, float], author: Author = NOBODY) -> None:
        """The load that the settable source will report."""
        with self.writing() as db:
            put_meta(db, "load_set", dict(load))
            note(db, "load_set", author=author.name, load=dict(load))

    def add_lost(self, count: int) -> None:
        """Counts records that guests could not keep."""
        with self.writing() as db:
            db.execute("UPDATE meta SET value = value + ? WHERE key = 'records_lost'", (count,))

    def records_lost(self) -> int:
        """How many records guests could not keep."""
        return self.meta("records_lost", int, 0) or 0
