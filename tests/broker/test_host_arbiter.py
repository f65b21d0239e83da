"""The rules of the arbiter: each by an example, and those that must hold for whatever it is given."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from persona_broker.host.core.arbiter import (
    Host,
    Kept,
    LiveSession,
    Rules,
    Shape,
    Target,
    Vm,
    Why,
    arbitrate,
    classes,
)

GIB = 1 << 30
RULES = Rules()
QUIET, BUSY = Host({"cpu": 10.0, "memory": 40.0}, 64 * GIB), Host({"cpu": 100.0, "memory": 40.0}, 64 * GIB)
SHORT = Host({"cpu": 10.0, "memory": 95.0}, 1 * GIB)


def vm(name: str, *sessions: LiveSession, memory: int = 4 * GIB, used: int | None = GIB, cpus: int = 4) -> Vm:
    return Vm(name, cpus, memory, sessions, Shape(100, None, memory), memory, used)


class Lab:
    """A host whose VMs do at once as they are told, or do not."""

    def __init__(self, *vms: Vm, rules: Rules = RULES) -> None:
        self.vms = {one.name: one for one in vms}
        self.rules, self.memory, self.now = rules, Kept(), 1000.0
        self.changes = dict.fromkeys(self.vms, 0)
        self.deaf: set[str] = set()  # whose balloon does not move

    def round(self, host: Host) -> Mapping[str, Target]:
        targets, self.memory = arbitrate(self.rules, self.now, host, list(self.vms.values()), self.memory)
        for name, target in targets.items():
            if target.shape is None:
                continue
            self.changes[name] += target.shape != self.vms[name].in_force
            balloon = self.vms[name].balloon if name in self.deaf else target.shape.memory
            self.vms[name] = replace(self.vms[name], in_force=target.shape, balloon=balloon)
        self.now += 1
        return targets

    def seconds(self, host: Host, count: int) -> Mapping[str, Target]:
        targets: Mapping[str, Target] = {}
        for _ in range(count):
            targets = self.round(host)
        return targets

    def shape(self, name: str) -> Shape:
        found = self.vms[name].in_force
        assert found is not None
        return found

    def says(self, name: str, *sessions: LiveSession) -> None:
        self.vms[name] = replace(self.vms[name], sessions=sessions)


def test_limits_cap_a_vm_and_its_baseline_returns_at_once() -> None:
    lab = Lab(vm("a", LiveSession(50, cpus=0.5, memory=GIB // 2), LiveSession(50, cpus=0.5, memory=GIB // 2)))
    lab.round(QUIET)
    assert lab.shape("a").cpus == 3.0  # a step
    lab.seconds(QUIET, 120)
    assert lab.shape("a") == Shape(100, 1.2, 2 * GIB)  # half of it is the floor
    lab.says("a")
    assert lab.round(QUIET)["a"].why is Why.NO_SESSIONS
    lab.seconds(QUIET, 10)
    assert lab.shape("a") == lab.vms["a"].baseline


def test_a_session_without_limits_caps_nothing() -> None:
    lab = Lab(vm("a", LiveSession(50, cpus=0.5), LiveSession(50)))
    lab.seconds(QUIET, 60)
    assert (lab.shape("a"), lab.changes) == (lab.vms["a"].baseline, {"a": 0})


def test_the_higher_priority_gains_under_contention_and_only_then() -> None:
    lab = Lab(vm("low", LiveSession(20)), vm("high", LiveSession(80)), vm("nobody"))
    lab.seconds(QUIET, 60)
    assert set(lab.changes.values()) == {0}
    lab.seconds(BUSY, 2)
    assert {lab.shape(name).weight for name in lab.vms} == {100}  # not for one sample
    targets = lab.seconds(BUSY, 2)
    assert {name: lab.shape(name).weight for name in lab.vms} == {"low": 100, "high": 400, "nobody": 100}
    assert (targets["high"].why, targets["low"].why) == (Why.CONTENTION, Why.PERSONAS)
    lab.says("high")
    lab.round(BUSY)
    assert lab.shape("high").weight == 100  # its sessions are over


def test_contention_that_ends_is_believed_after_a_while() -> None:
    lab = Lab(vm("low", LiveSession(20)), vm("high", LiveSession(80)))
    lab.seconds(BUSY, 5)
    lab.seconds(QUIET, 29)
    assert lab.shape("high").weight == 400
    lab.seconds(QUIET, 60)
    assert lab.shape("high").weight == 100


@pytest.mark.parametrize("load", [{}, {"cpu": 80.0}])
def test_a_load_that_is_unknown_or_between_the_thresholds_changes_nothing(load: dict[str, float]) -> None:
    for before, weight in ((QUIET, 100), (BUSY, 400)):
        lab = Lab(vm("low", LiveSession(20)), vm("high", LiveSession(80)))
        lab.seconds(before, 10)
        lab.seconds(Host(load, 64 * GIB), 300)
        assert lab.shape("high").weight == weight


def test_a_noisy_load_changes_a_vm_once_in_its_hold_time() -> None:
    lab = Lab(vm("low", LiveSession(20)), vm("high", LiveSession(80)))
    for second in range(600):
        lab.round(BUSY if second % 7 < 4 else QUIET)
    assert lab.changes == {"low": 0, "high": 1}
    for second in range(6000):
        lab.round(BUSY if second % 70 < 35 else QUIET)
    assert lab.changes["high"] <= 1 + 2 * 6000 / RULES.hold_s


@pytest.mark.parametrize(
    ("priorities", "ranks"),
    [
        ((50, 60), (0, 0)),
        ((50, 61), (0, 1)),
        ((50, 58, 66), (0, 0, 0)),  # no two neighbours are far enough apart
        ((90, 10, 50), (2, 0, 1)),
        ((0, 1000, 0), (0, 1, 0)),
    ],
)
def test_only_a_gap_makes_another_class(priorities: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    vms = [vm(f"vm-{at}", LiveSession(priority)) for at, priority in enumerate(priorities)]
    assert [classes(RULES, vms)[one.name] for one in vms] == list(ranks)


def test_a_session_that_does_nothing_holds_no_priority() -> None:
    lab = Lab(vm("low", LiveSession(20)), vm("high", LiveSession(80, idle_s=601)))
    lab.seconds(BUSY, 10)
    assert lab.shape("high").weight == 100
    assert classes(RULES, lab.vms.values()) == {"low": 0}


def test_memory_is_taken_from_the_lower_one_in_steps_down_to_its_floor() -> None:
    lab = Lab(vm("low", LiveSession(20)), vm("high", LiveSession(80)), vm("nobody"))
    lab.seconds(SHORT, 3)
    assert lab.shape("low").memory == 4 * GIB - int(0.4 * GIB)
    assert lab.seconds(SHORT, 100)["low"].why is Why.CONTENTION
    assert [lab.shape(name).memory for name in ("low", "high", "nobody")] == [2 * GIB, 4 * GIB, 4 * GIB]
    lab.vms["low"] = replace(lab.vms["low"], used=3 * GIB)  # it needs more by now
    lab.seconds(Host({"memory": 95.0}, 4 * GIB), 5)
    assert lab.shape("low").memory == 3 * GIB + GIB // 4


def test_equals_take_nothing_from_each_other() -> None:
    lab = Lab(vm("a", LiveSession(50)), vm("b", LiveSession(60)))
    lab.seconds(replace(SHORT, load={"cpu": 100.0, "memory": 99.0}), 300)
    assert set(lab.changes.values()) == {0}


def test_nothing_is_taken_of_memory_whose_use_nobody_knows() -> None:
    lab = Lab(vm("low", LiveSession(20), used=None), vm("high", LiveSession(80)))
    lab.seconds(SHORT, 100)
    assert lab.changes["low"] == 0


def test_a_balloon_that_does_not_follow_is_asked_once_and_shown() -> None:
    lab = Lab(vm("low", LiveSession(20)), vm("high", LiveSession(80)))
    lab.deaf = {"low"}
    targets = lab.seconds(SHORT, 300)
    assert (targets["low"].why, lab.changes["low"]) == (Why.NO_PROGRESS, 1)
    lab.says("low")
    lab.seconds(QUIET, 10)
    assert lab.shape("low") == lab.vms["low"].baseline  # what was asked is given back all the same


def test_a_vm_that_is_left_alone_or_unknown_has_no_target() -> None:
    lab = Lab(
        replace(vm("other", LiveSession(20)), left_alone="somebody set its weight"),
        replace(vm("unknown", LiveSession(20)), in_force=None),
        vm("high", LiveSession(80)),
    )
    targets = lab.seconds(BUSY, 10)
    assert (targets["other"].shape, targets["other"].why, targets["other"].detail) == (
        None, Why.LEFT_ALONE, "somebody set its weight",
    )  # fmt: skip
    assert (targets["unknown"].shape, targets["unknown"].why) == (None, Why.UNKNOWN)
    assert lab.shape("high").weight == 400


def test_room_is_given_to_the_higher_first_and_to_equals_in_turn() -> None:
    small = Shape(100, None, 2 * GIB)
    vms = [replace(vm(name, LiveSession(p)), in_force=small, balloon=2 * GIB) for name, p in
           (("high", 80), ("a", 20), ("b", 20))]  # fmt: skip
    lab = Lab(*vms)
    free = RULES.host_reserve + 3 * GIB
    for _ in range(30):
        held = sum(one.balloon or 0 for one in lab.vms.values())
        lab.round(Host({"memory": 50.0}, free + 6 * GIB - held))
    assert lab.shape("high").memory == 4 * GIB
    assert abs(lab.shape("a").memory - lab.shape("b").memory) <= 0.4 * GIB + 1
    assert sum(lab.shape(name).memory for name in lab.vms) <= 9 * GIB


def test_memory_trickles_to_nobody() -> None:
    lab = Lab(replace(vm("a", LiveSession(50)), in_force=Shape(100, None, 2 * GIB), balloon=2 * GIB))
    for second in range(100):  # something on the host lets go of its memory
        lab.round(Host({"memory": 85.0}, RULES.host_reserve + ((second << 20) % (10 << 20))))
    assert lab.changes == {"a": 0}


def test_no_step_is_smaller_than_what_memory_is_counted_in() -> None:
    lab = Lab(vm("low", LiveSession(20)), vm("high", LiveSession(80)))
    sizes = []
    for host, seconds in ((SHORT, 100), (QUIET, 200)):
        for _ in range(seconds):
            lab.round(host)
            sizes.append(lab.shape("low").memory)
    steps = [abs(after - before) for before, after in pairwise(sizes) if after != before]
    assert (len(steps), min(sizes), sizes[-1]) == (10, 2 * GIB, 4 * GIB)
    assert min(steps) >= 64 << 20


def test_a_use_that_is_noisy_changes_nothing_for_ever() -> None:
    lab = Lab(vm("low", LiveSession(20)), vm("high", LiveSession(80)))
    lab.vms["low"] = replace(lab.vms["low"], used=3 * GIB)
    lab.seconds(SHORT, 100)
    before = lab.changes["low"]
    for second in range(3600):
        lab.vms["low"] = replace(lab.vms["low"], used=3 * GIB + (second % 2 << 20))
        lab.round(SHORT)
    assert lab.changes["low"] - before == 1


def test_what_is_given_back_does_not_make_it_short_again() -> None:
    lab = Lab(vm("a", LiveSession(20)), vm("b", LiveSession(20)), vm("high", LiveSession(80)))
    total, own = 20 * GIB, 7 * GIB
    for second in range(3600):
        used = own + sum(one.balloon or 0 for one in lab.vms.values())
        lab.round(Host({"memory": 100.0 * used / total}, total - used))
        if second == 600:
            before = dict(lab.changes)
    assert lab.changes == before


def test_who_lacks_little_does_not_get_what_is_too_little_for_an_equal() -> None:
    much = replace(vm("much", LiveSession(50)), in_force=Shape(100, None, 2 * GIB), balloon=2 * GIB)
    little = replace(vm("little", LiveSession(50)), in_force=Shape(100, None, 4 * GIB - (32 << 20)))
    lab = Lab(much, replace(little, balloon=4 * GIB - (32 << 20)))
    lab.seconds(Host({"memory": 50.0}, RULES.host_reserve + (40 << 20)), 10)
    assert lab.changes == {"much": 0, "little": 0}


sessions = st.builds(
    LiveSession,
    st.integers(0, 1000),
    st.none() | st.floats(0.05, 8),
    st.none() | st.integers(16 << 20, 8 * GIB),
    st.sampled_from([0.0, 5000.0]),
)
machines = st.builds(
    lambda cpus, memory, sessions, used: (cpus, memory << 20, tuple(sessions), used),
    st.integers(1, 16),
    st.integers(128, 16_384),
    st.lists(sessions, max_size=3),
    st.none() | st.floats(0, 1),
)
hosts = st.builds(
    lambda cpu, memory, free: Host(
        {key: value for key, value in (("cpu", cpu), ("memory", memory)) if value is not None}, free
    ),
    st.none() | st.floats(0, 100),
    st.none() | st.floats(0, 100),
    st.none() | st.integers(0, 32 * GIB),
)


def rounds(found: list[tuple[int, int, tuple[LiveSession, ...], float | None]]) -> Iterator[Vm]:
    for at, (cpus, memory, live, used) in enumerate(found):
        size = None if used is None else int(used * memory)
        yield vm(f"vm-{at}", *live, memory=memory, used=size, cpus=cpus)


@given(st.lists(machines, max_size=5), st.lists(st.tuples(hosts, st.integers(1, 40)), max_size=6))
def test_whatever_happens_the_bounds_hold(
    found: list[tuple[int, int, tuple[LiveSession, ...], float | None]], script: list[tuple[Host, int]]
) -> None:
    lab = Lab(*rounds(found))
    for host, seconds in script:
        for _ in range(seconds):
            before = {name: lab.shape(name) for name in lab.vms}
            lab.round(host)
            given = 0
            for name, one in lab.vms.items():
                now = lab.shape(name)
                assert one.floor(RULES) <= now.memory <= one.memory
                assert 100 <= now.weight <= 6400
                assert now.cpus is None or RULES.cpu_beside <= now.cpus <= one.cpus
                given += max(0, now.memory - before[name].memory)
                if not one.sessions:
                    assert (now.weight, now.cpus) == (100, None)
            assert given <= max(0, (host.free or 0) - RULES.host_reserve)


@given(st.lists(machines, max_size=5), hosts)
def test_where_nothing_changes_any_more_nothing_is_changed(
    found: list[tuple[int, int, tuple[LiveSession, ...], float | None]], host: Host
) -> None:
    lab = Lab(*rounds(found))
    lab.seconds(host, 400)
    before = dict(lab.changes)
    lab.seconds(host, 200)
    assert lab.changes == before
