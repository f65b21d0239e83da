"""Whose load counts: that of the host on which a VM's domain runs, and of no other."""

import pytest
from persona_broker.policy.conditions import ConditionInputs, Sample, Unmet, latch, look, thresholds
from persona_broker.policy.host_load import HostJudge, HostState
from persona_broker.policy.snapshot import Snapshot, Versioned

from persona.decisions import Denied, Granted, Program, Request, Subject
from persona.documents import Persona, Policy, parse_document
from persona.problems import Reason

NOW = 1000.0
LS = Program("/usr/bin/ls", ("ls",), ("/usr/bin/ls",))


def snapshot(when: dict[str, object]) -> Snapshot:
    persona = parse_document({"kind": "Persona", "name": "A", "command_whitelist": ["ls"]})
    policy = parse_document({"kind": "Policy", "name": "a", "subjects": {"users": ["u"]}, "persona": "A", "when": when})
    assert isinstance(persona, Persona) and isinstance(policy, Policy)
    return Snapshot([policy], {"A": Versioned(persona, 1)})


BUSY = snapshot({"host_load": {"cpu": {"below": 70, "again_below": 60}}, "hours": "00:00-24:00"})


def host(
    name: str, cpu: float | None, runs: dict[str, bool], *, at: float = NOW, domains_at: float | None = NOW
) -> HostState:
    sample = Sample(at, {} if cpu is None else {"cpu": cpu}, name)
    return HostState(name, sample, latch(frozenset(), thresholds(BUSY.conditions), sample), domains_at, runs)


def unmet(hosts: list[HostState], bindings: dict[str, str], vm: str, found: Snapshot = BUSY) -> Unmet | None:
    placed = HostJudge(15).look(found.conditions, {host.name: host for host in hosts}, bindings, NOW)
    state = look(found.conditions, _idle(), 1, None, placed)
    return state.unmet_of(found.policies[0], vm)


def _idle() -> ConditionInputs:
    """The broker's own machine does next to nothing."""
    return ConditionInputs(Sample(NOW, {"cpu": 5.0}, "psutil"), frozenset(), NOW, 15)


@pytest.mark.parametrize(
    ("hosts", "why"),
    [
        ([host("a", 5, {"u1": True}), host("b", 90, {"u2": True})], None),
        ([host("a", 90, {"u1": True}), host("b", 5, {"u2": True})], "load is 90 %"),
        ([host("a", 5, {"u1": False}), host("b", 90, {"u1": True})], "load is 90 %"),  # it moved to b
        ([host("a", 5, {"u1": False})], None),  # the only one that has it
        ([host("a", 5, {"u1": True}), host("b", 5, {"u1": True})], "its domain is on several hosts"),
        ([host("a", 5, {"u1": False}), host("b", 5, {"u1": False})], "its domain is on several hosts"),
        ([host("a", 5, {})], "its domain is not seen on any host"),
        ([], "its domain is not seen on any host"),
        ([host("a", 5, {"u1": True}, domains_at=NOW - 16)], "has not been seen for too long"),
        ([host("a", 5, {"u1": True}, domains_at=None)], "has not been seen for too long"),
        ([host("a", 90, {"u1": True}, domains_at=NOW - 16), host("b", 5, {"u1": True})], None),  # a is gone
        ([host("a", 5, {"u1": True}, at=NOW - 16)], "last measured more than 15 s ago"),
        ([host("a", 5, {"u1": True}, at=NOW + 60)], "last measured more than 15 s ago"),  # of another clock
        ([host("a", None, {"u1": True})], "CPU load is not known"),
        ([HostState("a", Sample(NOW, {"cpu": 5.0}, "a"), None, NOW, {"u1": True})], "is not known"),  # its latches
    ],
)
def test_a_bound_vm_goes_by_the_host_of_its_domain(hosts: list[HostState], why: str | None) -> None:
    """And unknown is not below, whatever the load of the broker's own machine."""
    found = unmet(hosts, {"vm-1": "u1"}, "vm-1")
    assert (found is None) is (why is None), found
    if found is not None and why is not None:
        assert why in found.detail
        known = found.detail.startswith("the host's CPU load is 90")
        assert found.reason is (Reason.LOAD_EXCEEDS_THRESHOLD if known else Reason.LOAD_UNKNOWN)


def test_one_that_is_not_bound_goes_by_the_broker_s_machine() -> None:
    assert unmet([host("a", 90, {"u1": True})], {"vm-1": "u1"}, "vm-2") is None


def test_hours_hold_for_both() -> None:
    """00:16 is the time that all of this happens at."""
    night = snapshot({"hours": "22:00-23:00"})
    for vm in ("vm-1", "vm-2"):
        found = unmet([host("a", 5, {"u1": True})], {"vm-1": "u1"}, vm, night)
        assert found is not None and found.reason is Reason.OUTSIDE_HOURS
    day = snapshot({"hours": "00:00-24:00"})  # without load: it matters to nobody where a domain is
    assert unmet([], {"vm-1": "u1"}, "vm-1", day) is None


def test_a_decision_says_which_generation_concerns_its_vm() -> None:
    placed = HostJudge(15).look(BUSY.conditions, {"a": host("a", 90, {"u1": True})}, {"vm-1": "u1"}, NOW)
    state = look(BUSY.conditions, _idle(), 7, None, placed, {"vm-1": 9})
    decisions = [BUSY.decide(Request(Subject("u", (), vm), "", LS, ("ls",), "/"), state) for vm in ("vm-1", "vm-2")]
    assert isinstance(decisions[0], Denied) and isinstance(decisions[1], Granted)
    assert [decision.generation for decision in decisions] == [9, 7]


def test_a_host_is_judged_once_a_sample() -> None:
    """What did not change is the same object, so that what was made for it stays good."""
    judge, bindings = HostJudge(15), {f"vm-{n}": f"u{n}" for n in range(3)}
    hosts = {"a": host("a", 90, {"u0": True, "u1": True}), "b": host("b", 5, {"u2": True})}
    first = judge.look(BUSY.conditions, hosts, bindings, NOW)
    assert first["vm-0"] is first["vm-1"]
    second = judge.look(BUSY.conditions, hosts, bindings, NOW + 1)
    assert all(second[vm] is first[vm] for vm in bindings)
    hosts = {**hosts, "b": host("b", 80, {"u2": True})}
    third = judge.look(BUSY.conditions, hosts, bindings, NOW + 1)
    assert third["vm-0"] is first["vm-0"] and third["vm-2"] is not first["vm-2"]
    fourth = judge.look(BUSY.conditions, hosts, bindings, NOW + 20)  # all of it is old
    assert {unmet.reason for vm in bindings for unmet in fourth[vm].unmet.values()} == {Reason.LOAD_UNKNOWN}


def test_a_metric_that_is_missing_for_a_moment_leaves_its_latch() -> None:
    every = thresholds(BUSY.conditions)
    assert latch(every, every, Sample(NOW, {}, "a")) == every
    assert latch(frozenset(), every, Sample(NOW, {}, "a")) == frozenset()
