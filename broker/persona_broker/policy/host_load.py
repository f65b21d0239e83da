"""On which host each bound VM runs, and which policies do not hold there for that host's load.

A VM that is bound to a domain is judged by the host of that domain and no other; where that is not known, no load is
below anything.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from persona.conditions import When
from persona.problems import Reason
from persona_broker.policy.conditions import (
    ConditionInputs,
    Latches,
    OnHost,
    Placed,
    Sample,
    Unmet,
    is_fresh,
    judge_hours,
    judge_load,
)


@dataclass(frozen=True, slots=True)
class HostState:
    """A host as it was seen last.  ``runs`` has its domains by UUID, and whether each runs.

    ``domains_at`` (Unix seconds) is when they were listed; ``latches`` are ``None`` where they cannot be read.
    """

    name: str
    sample: Sample
    latches: Latches | None
    domains_at: float | None
    runs: Mapping[str, bool]


Conditions = Mapping[When, Iterable[str]]  # and the names of the policies that have each
_Loads = Mapping[When, Unmet]


class HostJudge:
    """Judges each host once a sample, whatever the number of VMs and policies.

    One per process; holds nothing but what it judged last.
    """

    def __init__(self, max_age_s: float) -> None:
        self._max_age_s = max_age_s
        self._conditions: Conditions = {}
        self._judged: dict[str, tuple[HostState, bool, _Loads]] = {}
        self._hours: _Loads = {}
        self._on_host: dict[str, tuple[_Loads, OnHost]] = {}
        self._nowhere: dict[str, OnHost] = {}
        self._hosts: Mapping[str, HostState] = {}
        self._where: dict[str, list[HostState]] = {}

    def look(
        self, conditions: Conditions, hosts: Mapping[str, HostState], bindings: Mapping[str, str], now: float
    ) -> Placed:
        """By bound VM (``bindings`` have its domain's UUID) its host, and what does not hold there."""
        hours = {when: unmet for when in conditions if (unmet := judge_hours(when, now)) is not None}
        if conditions is not self._conditions or hours != self._hours:
            self._conditions, self._hours = conditions, hours
            self._judged, self._on_host, self._nowhere = {}, {}, {}
        if hosts is not self._hosts:
            self._hosts, self._where = hosts, _index(hosts)
        placed: dict[str, OnHost] = {}
        used: set[str] = set()
        for vm, uuid in bindings.items():
            found = self._place(uuid, now)
            if isinstance(found, str):
                placed[vm] = self._unknown(found)
            else:
                used.add(found.name)
                placed[vm] = self._on(found, now)
        self._judged = {name: known for name, known in self._judged.items() if name in used}
        self._on_host = {name: known for name, known in self._on_host.items() if name in used}
        return placed

    def _place(self, uuid: str, now: float) -> HostState | str:
        """The host on which a domain is, or why that is not known."""
        known = self._where.get(uuid, [])
        fresh = [host for host in known if is_fresh(host.domains_at, now, self._max_age_s)]
        running = [host for host in fresh if host.runs[uuid]]
        if len(running or fresh) == 1:
            return (running or fresh)[0]
        if fresh:
            return "its domain is on several hosts"
        return "where its domain is has not been seen for too long" if known else "its domain is not seen on any host"

    def _unknown(self, why: str) -> OnHost:
        found = self._nowhere.get(why)
        if found is None:
            unmet = Unmet(Reason.LOAD_UNKNOWN, f"the host's load is not known: {why}")
            loads = {when: unmet for when in self._conditions if when.host_load}
            found = self._nowhere[why] = self._by_policy("", loads)
        return found

    def _on(self, host: HostState, now: float) -> OnHost:
        loads = self._loads(host, now)
        known = self._on_host.get(host.name)
        if known is None or known[0] is not loads:
            known = self._on_host[host.name] = (loads, self._by_policy(host.name, loads))
        return known[1]

    def _loads(self, host: HostState, now: float) -> _Loads:
        fresh = is_fresh(host.sample.at, now, self._max_age_s)
        known = self._judged.get(host.name)
        if known is not None and known[0] is host and known[1] is fresh:
            return known[2]
        inputs = ConditionInputs(host.sample, host.latches, host.sample.at, 1.0)
        loads: dict[When, Unmet] = {}
        for when in self._conditions:
            unmet = judge_load(when, inputs) if fresh else self._old(when)
            if unmet is not None:
                loads[when] = unmet
        if known is not None and known[2] == loads:
            found: _Loads = known[2]  # the same object: what was made of it stays good
        else:
            found = loads
        self._judged[host.name] = (host, fresh, found)
        return found

    def _old(self, when: When) -> Unmet | None:
        if not when.host_load:
            return None
        return Unmet(Reason.LOAD_UNKNOWN, f"the host's load was last measured more than {self._max_age_s:g} s ago")

    def _by_policy(self, host: str, loads: _Loads) -> OnHost:
        unmet: dict[str, Unmet] = {}
        for when, names in self._conditions.items():
            found = loads.get(when) or self._hours.get(when)
            if found is not None:
                unmet.update(dict.fromkeys(names, found))
        return OnHost(host, unmet)


def _index(hosts: Mapping[str, HostState]) -> dict[str, list[HostState]]:
    found: dict[str, list[HostState]] = {}
    for host in hosts.values():
        for uuid in host.runs:
            found.setdefault(uuid, []).append(host)
    return found
