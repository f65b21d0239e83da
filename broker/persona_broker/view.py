"""What a worker decides from: the snapshot and the condition state, each swapped by one assignment.

A worker looks at the database before it decides and rebuilds only what changed.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from persona_broker.coverage import Ages, Gap, gaps
from persona_broker.policy.conditions import ConditionInputs, ConditionState, Sample, look
from persona_broker.policy.host_load import HostJudge
from persona_broker.policy.snapshot import Snapshot
from persona_broker.policy.vm_health import MAX_AGE_S, HealthJudge, Reported
from persona_broker.store.health import Reports
from persona_broker.store.hosts import SeenHost, SeenHosts
from persona_broker.store.interface import Binding, Store

_CHECK_EVERY_S = 0.002  # before any guest can have been told of a change; one that has says so
_JUDGE_EVERY_S = 1.0  # hours begin and samples age without anybody writing


@dataclass(frozen=True, slots=True)
class View:
    """Everything that a decision needs, of one moment."""

    snapshot: Snapshot
    condition_state: ConditionState
    revoked: frozenset[str]
    ending: frozenset[str]  # of the revoked
    quarantined: frozenset[str]  # guests
    generation: int
    moved: int  # how often documents moved within their files, which raises no generation
    guests: Mapping[str, str]  # by the hash of their token
    sample: Sample | None
    health: Mapping[str, Reported]  # by VM
    hosts: Mapping[str, SeenHost]
    bindings: Mapping[str, Binding]  # by guest, of those that are bound to a domain
    shared: int  # the newest generation that concerns every guest
    watched: tuple[str, ...]  # hosts that are to have a sample
    load_max_age_s: float
    health_max_age_s: float
    written: int  # the database's ``data_version`` that this was made from
    judged_at: float  # monotonic

    def gaps(self, now: float) -> list[Gap]:
        """What is missing between domains and agents, at ``now`` (Unix seconds)."""
        bindings = {guest: binding.uuid for guest, binding in self.bindings.items()}
        ages = Ages(now, self.load_max_age_s, self.health_max_age_s)
        return gaps(self.hosts, bindings, sorted(self.guests.values()), self.health, self.watched, ages)

    def generation_for(self, guest: str) -> int:
        """The newest generation that concerns a guest: what it is told with every answer."""
        return self.condition_state.generation_for(guest)


class State:
    """One per process; ``current`` may be called from any thread.

    Its connection only reads, so that no decision waits for a lock that a writer waits for.
    """

    def __init__(
        self,
        store: Store,
        load_max_age_s: float,
        health_max_age_s: float = MAX_AGE_S,
        watched: tuple[str, ...] = (),
    ) -> None:
        self._store = store
        self._watched = watched
        self._load_max_age_s = load_max_age_s
        self._health_max_age_s = health_max_age_s
        self._reports = Reports(store)
        self._health_judge = HealthJudge(health_max_age_s)
        self._hosts = SeenHosts(store)
        self._host_judge = HostJudge(load_max_age_s)
        self._lock = threading.Lock()
        self._check_at = 0.0  # monotonic
        self._view = self._load(None)

    def current(self, at_least: int = 0) -> View:
        """The view as of now, a moment old at most and of no generation below ``at_least`` that there is.

        Raises ``StoreError`` where the database cannot be read: no decision then.
        """
        view = self._view
        if time.monotonic() < self._check_at and view.generation >= at_least:
            return view
        with self._lock:  # whoever waits here waits for what it would have to load itself
            view = self._view
            now = time.monotonic()
            if self._store.data_version() != view.written or now - view.judged_at >= _JUDGE_EVERY_S:
                view = self._view = self._load(view)
            self._check_at = now + _CHECK_EVERY_S
            return view

    def _load(self, previous: View | None) -> View:
        written = self._store.data_version()  # first: what is written meanwhile makes the view old, never the reverse
        with self._store.reading():
            generation, moved = self._store.stamp()
            shared, bindings = self._store.shared_generation(), self._store.bindings()
            if previous is not None and (previous.shared, previous.moved) == (shared, moved):
                snapshot, revoked, ending = previous.snapshot, previous.revoked, previous.ending
                quarantined = previous.quarantined
            else:
                snapshot = self._store.snapshot()
                revoked, ending = self._store.revoked(), self._store.ending()
                quarantined = frozenset(self._store.quarantined())
            world = ConditionInputs(self._store.sample(), self._store.latches(), time.time(), self._load_max_age_s)
            guests = self._store.tokens()
            health = self._reports.look(guests.values())
            states = self._hosts.look()
        domains = {guest: binding.uuid for guest, binding in bindings.items()}
        placed = self._host_judge.look(snapshot.conditions, states, domains, world.now)
        generations = {guest: bound.generation for guest, bound in bindings.items() if bound.generation > shared}
        unhealthy = self._health_judge.look(snapshot.vm_conditions, health, world.now)
        condition_state = look(snapshot.conditions, world, shared, unhealthy, placed, generations)
        if previous is not None and condition_state == previous.condition_state and snapshot is previous.snapshot:
            condition_state = previous.condition_state  # the same object: what was made for it stays good
        sample, judged_at = world.sample, time.monotonic()
        return View(
            snapshot,
            condition_state,
            revoked,
            ending,
            quarantined,
            generation,
            moved,
            guests,
            sample,
            health,
            self._hosts.seen,
            bindings,
            shared,
            self._watched,
            self._load_max_age_s,
            self._health_max_age_s,
            written,
            judged_at,
        )
