"""Sees within 20 ms that any process wrote to the database, as ``apply`` does, and wakes the event streams.

It also samples the load, takes what ``persona-host`` saw of hosts, keeps the latches, and raises the generation when a
condition begins or ceases to hold: for every guest, or for those of one host where only they are concerned.
One thread of the events process; the only writer of samples.  When it dies its process ends with it;
where that does not help, samples age and every condition on load becomes unknown, which is not below
anything.
"""

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from persona.shown import line as printable
from persona_broker.host.core.sample import HostSample
from persona_broker.host.load import LoadSource
from persona_broker.host.sample_files import SampleFiles
from persona_broker.policy.conditions import (
    ConditionInputs,
    ConditionState,
    Placed,
    Sample,
    Unmet,
    latch,
    look,
    thresholds,
)
from persona_broker.policy.host_load import HostJudge
from persona_broker.policy.vm_health import MAX_AGE_S, HealthJudge
from persona_broker.store.health import Reports
from persona_broker.store.hosts import SeenHosts
from persona_broker.store.interface import Store, StoreError

log = logging.getLogger("persona.watcher")

_SAMPLE_EVERY_S = 2.0
_TELL_EVERY_S = 2.0  # what streams were told: a transaction for all of them
_HOSTS_EVERY_S = 0.25  # whether the poller put a new sample
_BEHIND_EVERY_S = 0.1  # where samples were left: each worker reads what this takes, too
_LOOK_EVERY_S = 0.02  # how soon a change made by another process is pushed


@dataclass(frozen=True, slots=True)
class _OnHost:
    """A condition of a policy, on one host."""

    host: str
    policy: str


@dataclass(frozen=True, slots=True)
class _PlacedOn:
    """Where a guest's domain is; an empty ``host`` = nobody knows."""

    vm: str
    host: str


class Watcher:
    """``generation``, ``generation_for``, ``told`` and ``changed``, their lock, are for the streams of the process.

    ``told`` is by guest what was written to its stream since the last time that this was written down.
    """

    def __init__(
        self,
        store: Store,
        source: LoadSource,
        load_max_age_s: float,
        health_max_age_s: float = MAX_AGE_S,
        hosts: SampleFiles | None = None,
    ) -> None:
        self.changed = threading.Condition()
        self.generation = store.generation()
        self.told: dict[str, int] = {}
        self._shared, self._narrow = _generations(store)
        self._store = store
        self._source = source
        self._load_max_age_s = load_max_age_s
        self._loaded = self._shared  # documents change for every guest
        self._snapshot = store.snapshot()
        self._reports = Reports(store)
        self._health_judge = HealthJudge(health_max_age_s)
        self._files = hosts
        if hosts is not None:
            store.keep_hosts(hosts.hosts)  # settings that changed, or an older broker that took any name
        self._hosts = SeenHosts(store)
        self._host_judge = HostJudge(load_max_age_s)
        self._state: dict[object, str] | None = None
        self._seen: int | None = None
        self._sample_at = self._tell_at = self._hosts_at = time.monotonic()

    def generation_for(self, guest: str) -> int:
        """The newest generation that concerns a guest; under the lock ``changed``."""
        return max(self._shared, self._narrow.get(guest, 0))

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
        seen = self._news_of_hosts()
        if written == self._seen and not due and not seen:
            return
        generation = self._store.generation()
        if (shared := self._store.shared_generation()) != self._loaded:
            self._snapshot, self._loaded = self._store.snapshot(), shared
        sample, latches = self._store.sample(), self._store.latches()
        load = dict(self._source.read()) if due or self._source.immediate else None
        if load is not None and (due or sample is None or sample.load != load):
            sample = Sample(time.time(), load, self._source.name)
            every = thresholds(self._snapshot.conditions)
            latches = latch(every if latches is None else latches, every, sample)  # not known: as if all were exceeded
            self._store.put_sample(sample, latches)
            self._sample_at = time.monotonic() + _SAMPLE_EVERY_S
        if seen:
            self._put_hosts(seen)
        world = ConditionInputs(sample, latches, time.time(), self._load_max_age_s)
        health = self._reports.look(self._store.guests())
        unhealthy = self._health_judge.look(self._snapshot.vm_conditions, health, world.now)
        domains = {guest: binding.uuid for guest, binding in self._store.bindings().items()}
        placed = self._host_judge.look(self._snapshot.conditions, self._hosts.look(), domains, world.now)
        state = _state(look(self._snapshot.conditions, world, generation, unhealthy, placed))
        if self._state is not None and state.keys() != self._state.keys():
            began = [said for key, said in state.items() if key not in self._state]
            ended = [said for key, said in self._state.items() if key not in state]
            now, not_now = (printable("; ".join(said)) or "-" for said in (began, ended))  # a guest names its disks
            log.info("conditions changed; now: %s; not any more: %s", now, not_now)
            concerned = _concerned(state.keys() ^ self._state.keys(), placed)
            if concerned is None:
                generation = self._store.raise_generation()
            else:
                generation = self._store.raise_generation_for(concerned)
        self._state, self._seen = state, written
        if generation != self.generation:
            shared, narrow = _generations(self._store)
            with self.changed:
                self.generation, self._shared, self._narrow = generation, shared, narrow
                self.changed.notify_all()
        if time.monotonic() >= self._tell_at:  # after what guests wait for
            self._write_down()

    def _news_of_hosts(self) -> list[HostSample]:
        """What the poller put since the last look."""
        if self._files is None or time.monotonic() < self._hosts_at:
            return []
        found = self._files.news()
        self._hosts_at = time.monotonic() + (_BEHIND_EVERY_S if self._files.is_behind else _HOSTS_EVERY_S)
        return found

    def _put_hosts(self, samples: Iterable[HostSample]) -> None:
        """Keeps them, with what each host has exceeded by now."""
        every, known = thresholds(self._snapshot.conditions), self._hosts.look()
        rows = []
        for sample in samples:
            unreadable = sample.host in self._hosts.unreadable
            before = known[sample.host].latches if sample.host in known else None if unreadable else frozenset()
            load = Sample(sample.at, sample.load, sample.host)
            rows.append((sample, latch(every if before is None else before, every, load)))
        self._store.put_hosts(rows)

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
    for vm, on_host in condition_state.placed.items():
        found[_PlacedOn(vm, on_host.host)] = f"{vm} is on {on_host.host or 'no host that is known'}"
    by_host = {on_host.host: on_host.unmet for on_host in condition_state.placed.values()}
    for host, not_there in by_host.items():
        if host:  # where nobody knows, it is the placement that changes
            found |= {_OnHost(host, name): _said(host, name, unmet) for name, unmet in not_there.items()}
    return found


def _said(host: str, policy: str, unmet: Unmet) -> str:
    return f"policy {policy} does not hold on {host}: {unmet.detail}"


def _concerned(changed: Iterable[object], placed: Placed) -> set[str] | None:
    """The guests that a change makes a difference to; ``None`` = to all, or nobody can tell."""
    hosts, found = set(), set()
    for key in changed:
        match key:
            case _OnHost(host=host):
                hosts.add(host)
            case _PlacedOn(vm=vm):
                found.add(vm)
            case _:
                return None
    return found | {vm for vm, on_host in placed.items() if on_host.host in hosts}


def _generations(store: Store) -> tuple[int, Mapping[str, int]]:
    """The newest generation that concerns every guest, and by guest the one that concerns it alone."""
    with store.reading():
        narrow = {guest: binding.generation for guest, binding in store.bindings().items()}
        return store.shared_generation(), narrow
