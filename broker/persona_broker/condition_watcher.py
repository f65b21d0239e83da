"""Sees within 20 ms that any process wrote to the database, as ``apply`` does, and wakes the event streams.

It also samples the load, keeps the latches, and raises the generation when a condition begins or ceases to hold.
One thread of the events process; the only writer of samples.  When it dies its process ends with it;
where that does not help, samples age and every condition on load becomes unknown, which is not below
anything.
"""

import logging
import os
import threading
import time

from persona_broker.host.load import LoadSource
from persona_broker.policy.conditions import ConditionInputs, ConditionState, Sample, latch, look, thresholds
from persona_broker.policy.vm_health import MAX_AGE_S, HealthJudge
from persona_broker.store.health import Reports
from persona_broker.store.interface import Store, StoreError

log = logging.getLogger("persona.watcher")

_SAMPLE_EVERY_S = 2.0
_TELL_EVERY_S = 2.0  # what streams were told: a transaction for all of them
_LOOK_EVERY_S = 0.02  # how soon a change made by another process is pushed


class Watcher:
    """``generation``, ``told`` and ``changed``, their lock, are for the streams of the same process.

    ``told`` is by guest what was written to its stream since the last time that this was written down.
    """

    def __init__(
        self, store: Store, source: LoadSource, load_max_age_s: float, health_max_age_s: float = MAX_AGE_S
    ) -> None:
        self.changed = threading.Condition()
        self.generation = store.generation()
        self.told: dict[str, int] = {}
        self._store = store
        self._source = source
        self._load_max_age_s = load_max_age_s
        self._snapshot, self._loaded = store.snapshot(), self.generation
        self._reports = Reports(store)
        self._health_judge = HealthJudge(health_max_age_s)
        self._state: dict[object, str] | None = None
        self._seen: int | None = None
        self._sample_at = self._tell_at = time.monotonic()

    def run(self) -> None:
        """For ever; an error of the database is logged and the next round tries again."""
        try:
            while True:
                try:
                    self.look()
                except StoreError as error:
                    log.error("the database cannot be used: %s", error)
                    time.sleep(1)
                time.sleep(_LOOK_EVERY_S)
        finally:
            # a bug: streams that go on saying "beat" while nobody watches would be a lie
            log.critical("the watcher ended; so does its process", exc_info=True)
            os._exit(70)

    def look(self) -> None:
        """One round: samples where it is time to, and announces what changed.  Raises ``StoreError``."""
        written, due = self._store.data_version(), time.monotonic() >= self._sample_at
        if written == self._seen and not due:
            return
        generation = self._store.generation()
        if generation != self._loaded:
            self._snapshot, self._loaded = self._store.snapshot(), generation
        sample, latches = self._store.sample(), self._store.latches()
        load = dict(self._source.read()) if due or self._source.immediate else None
        if load is not None and (due or sample is None or sample.load != load):
            sample = Sample(time.time(), load, self._source.name)
            every = thresholds(self._snapshot.conditions)
            latches = latch(every if latches is None else latches, every, sample)  # not known: as if all were exceeded
            self._store.put_sample(sample, latches)
            self._sample_at = time.monotonic() + _SAMPLE_EVERY_S
        world = ConditionInputs(sample, latches, time.time(), self._load_max_age_s)
        health = self._reports.look(self._store.guests())
        unhealthy = self._health_judge.look(self._snapshot.vm_conditions, health, world.now)
        state = _state(look(self._snapshot.conditions, world, generation, unhealthy))
        if self._state is not None and state.keys() != self._state.keys():
            began = [said for key, said in state.items() if key not in self._state]
            ended = [said for key, said in self._state.items() if key not in state]
            log.info("conditions changed; now: %s; not any more: %s", "; ".join(began) or "-", "; ".join(ended) or "-")
            generation = self._store.raise_generation()
        self._state, self._seen = state, written
        if generation != self.generation:
            with self.changed:
                self.generation = generation
                self.changed.notify_all()
        if time.monotonic() >= self._tell_at:  # after what guests wait for
            self._write_down()

    def _write_down(self) -> None:
        """Which generations guests were told, for ``rollout``."""
        with self.changed:
            told, self.told = self.told, {}
        if told:
            self._store.put_told(told, time.time())
        self._tell_at = time.monotonic() + _TELL_EVERY_S


def _state(condition_state: ConditionState) -> dict[object, str]:
    """What can change a decision, without the figures that lead to it, each with a word for the log."""
    found: dict[object, str] = {name: f"policy {name} does not hold" for name in condition_state.unmet}
    for vm, unhealthy in condition_state.unhealthy.items():
        found[vm, None] = f"{vm} reports its health"
        for condition, unmet in unhealthy.items():
            found[vm, condition] = f"{vm}: {unmet.detail}"
    return found
