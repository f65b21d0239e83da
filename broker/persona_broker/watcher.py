"""Samples the load, keeps the latches, and raises the generation when a condition changes its mind.

One thread of the events process; the only writer of samples.  When it dies, samples age and every
condition on load becomes unknown, which is not below anything.
"""

import logging
import sqlite3
import threading
import time

from persona_broker.host.load import LoadSource
from persona_broker.policy.engine import Snapshot
from persona_broker.policy.outlook import Sample, World, latch, look
from persona_broker.state import SAMPLE_MAX_AGE_S
from persona_broker.store.sqlite import Store

log = logging.getLogger("persona.watcher")

_SAMPLE_EVERY_S = 2.0
_LOOK_EVERY_S = 0.02  # how soon a change made by another process is pushed


class Watcher:
    """``generation`` and ``changed`` are for the streams of the same process."""

    def __init__(self, store: Store, source: LoadSource) -> None:
        self.changed = threading.Condition()
        self.generation = store.generation()
        self._store = store
        self._source = source
        self._unmet: frozenset[str] | None = None
        self._snapshot: Snapshot = store.snapshot()[0]
        self._sampled_at = 0.0

    def run(self) -> None:
        """For ever; an error of the record is logged and the next round tries again."""
        while True:
            try:
                self.look()
            except sqlite3.Error as error:
                log.error("the record cannot be used: %s", error)
                time.sleep(1)
            time.sleep(_LOOK_EVERY_S)

    def look(self) -> None:
        """One round: samples where it is time to, and announces what changed.  Raises ``sqlite3.Error``."""
        changed = self._store.changed()
        now = time.time()
        if not changed and now - self._sampled_at < _SAMPLE_EVERY_S:
            return
        generation = self._store.generation()
        if generation != self.generation:
            self._snapshot = self._store.snapshot()[0]
        thresholds = {t for when in self._snapshot.conditions.values() for t in when.host_load}
        load = dict(self._source.read())
        previous = self._store.sample()
        if now - self._sampled_at >= _SAMPLE_EVERY_S or previous is None or previous.load != load:
            sample = Sample(now, load, self._source.name)
            latches = latch(self._store.latches(), thresholds, sample)
            self._store.put_sample(sample, latches)
            self._sampled_at = now
        else:
            sample, latches = previous, self._store.latches()
        outlook = look(self._snapshot.conditions, World(sample, latches, now, SAMPLE_MAX_AGE_S), generation)
        unmet = frozenset(outlook.unmet)
        if self._unmet is not None and unmet != self._unmet:
            log.info("conditions changed; not met now: %s", ", ".join(sorted(unmet)) or "none")
            generation = self._store.raise_generation()
        self._unmet = unmet
        if generation != self.generation:
            with self.changed:
                self.generation = generation
                self.changed.notify_all()
