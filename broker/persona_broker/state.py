"""What a worker decides from: the snapshot and the outlook, each swapped by one assignment.

A worker looks at the record before every decision (microseconds) and rebuilds only what changed.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from persona_broker.policy.engine import Snapshot
from persona_broker.policy.outlook import Outlook, World, look
from persona_broker.store.sqlite import Store

SAMPLE_MAX_AGE_S = 15.0  # seven missed samples: the watcher is gone, not late
_OUTLOOK_MAX_AGE_S = 1.0  # hours begin and samples age without anybody writing


@dataclass(frozen=True, slots=True)
class View:
    """Everything that a decision needs, of one moment."""

    snapshot: Snapshot
    outlook: Outlook
    revoked: frozenset[str]
    generation: int
    guests: Mapping[str, str]  # by the hash of their token
    judged_at: float


class State:
    """One per process; ``current`` may be called from any thread."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._view = self._load(None)

    def current(self) -> View:
        """The view as of now.  Raises ``sqlite3.Error`` where the record cannot be read: no decision then."""
        view = self._view
        if self.store.changed() or time.time() - view.judged_at > _OUTLOOK_MAX_AGE_S:
            with self._lock:
                view = self._view = self._load(self._view)
        return view

    def _load(self, previous: View | None) -> View:
        generation = self.store.generation()
        if previous is not None and previous.generation == generation:
            snapshot, revoked = previous.snapshot, previous.revoked
        else:
            snapshot, generation = self.store.snapshot()
            revoked = self.store.revoked()
        now = time.time()
        world = World(self.store.sample(), self.store.latches(), now, SAMPLE_MAX_AGE_S)
        return View(
            snapshot, look(snapshot.conditions, world, generation), revoked, generation, self.store.tokens(), now
        )
