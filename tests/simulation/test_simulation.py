"""A thousand VMs on fifty hosts under the real arbiter: a day in each run, two weeks with leaks in ``make soak``.

What holds for one call of the arbiter is in ``tests/broker/test_host_arbiter.py``; here it is what comes of many.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from persona_broker.host.core.arbiter import Host, Rules, Shape, Vm

from tests.simulation.fleet import GIB, PERSONAS, Fleet
from tests.simulation.rules import Arbiter, Nobody, Proxmox, Rule, Seen, shares
from tests.simulation.run import Figures, simulate

pytestmark = pytest.mark.long
RULES = Rules()
NAMES = [persona.name for persona in PERSONAS]
# Memory is taken from all of it to its floor in so many steps, and given back in as many; weight and cap may change
# beside that, each at once where it is given.
STEPS = math.ceil((1 - RULES.memory_floor) / RULES.memory_step)
SWING = 2 * STEPS + 2
# The quickest that anything goes back and forth: what was given is held, and then taken step by step.
SWING_S = RULES.hold_s + (STEPS - 1) * RULES.take_every_s
CHANGES_AN_HOUR = math.ceil(3600 / SWING_S) * SWING
ONE = Fleet(hosts=1, days=0.5)


def satisfied(figures: Figures) -> dict[str, float]:
    return {name: figures.satisfied(name) for name in NAMES}


def too_many(figures: Figures) -> list[object]:
    """VMs that changed more often in an hour than the rules' times allow; each login or its end may begin anew."""
    return [
        (where, count)
        for where, count in figures.changes.items()
        if count > CHANGES_AN_HOUR + SWING * figures.logins[where]
    ]


def unequal(figures: Figures, least_s: int = 1200) -> list[object]:
    """Equals that were short of CPU beside each other for so long, and one had over a twentieth more than the other.

    A class that changes leaves a VM its weight for ``hold_s``, which is a twentieth of the shortest such time.
    """
    return [
        (pair, one, other)
        for pair, (seconds, one, other) in figures.equals.items()
        if seconds >= least_s and max(one, other) > min(one, other) * 1.05
    ]


@pytest.mark.parametrize(
    "fleet",
    [
        pytest.param(Fleet(), id="day", marks=pytest.mark.timeout(600)),
        pytest.param(
            Fleet(seed=2, days=14, leaks=True), id="leaks", marks=[pytest.mark.soak, pytest.mark.timeout(7200)]
        ),
    ],
)
def test_a_fleet_is_shaped_within_its_bounds(fleet: Fleet) -> None:
    arbiter, nobody = simulate(fleet, Arbiter), simulate(fleet, Nobody)
    assert arbiter.faults == []
    assert sum(arbiter.over) <= sum(nobody.over)
    assert sum(nobody.over) > 3600 * fleet.days, "the hosts are too large for what this test asks"
    assert too_many(arbiter) == []
    assert sum(arbiter.changes.values()) <= SWING * sum(arbiter.logins.values())
    assert sum(seconds >= 1200 for seconds, *_ in arbiter.equals.values()) > 100
    assert unequal(arbiter) == []
    now, before = satisfied(arbiter), satisfied(nobody)
    assert max(now, key=lambda name: now[name]) == "on-call"
    assert now["on-call"] > before["on-call"] + 0.1
    gained = {name: now[name] - before[name] for name in NAMES}
    assert gained["on-call"] > max(gained["analyst"], gained["engineer"])  # those are one class
    assert min(gained["analyst"], gained["engineer"]) > gained["intern"]


def test_nothing_is_missed_between_two_looks() -> None:
    """With a look each second everything comes out the same."""
    fleet = replace(ONE, sizes=ONE.sizes[4:16:2], cores=4, memory=14 * GIB)
    some, every = simulate(fleet, Arbiter), simulate(fleet, Arbiter, each_second=True)
    assert some.looks < every.looks / 10
    assert some.changes == every.changes and some.changes
    assert (some.over, some.short_s, some.contended_s) == (every.over, every.short_s, every.contended_s)
    assert some.contended_s
    assert some.granted == pytest.approx(every.granted)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 1 << 32),
    st.lists(st.sampled_from([(1, GIB), (1, 2 * GIB), (2, 3 * GIB), (4, 8 * GIB)]), min_size=1, max_size=6),
    st.integers(1, 6),
    st.integers(40, 110),
    st.booleans(),
)
def test_the_bounds_hold_for_any_small_host(
    seed: int, sizes: list[tuple[int, int]], cores: int, percent: int, leaks: bool
) -> None:
    memory = 3 * GIB + sum(size for _, size in sizes) * percent // 100
    figures = simulate(Fleet(seed, 1, 0.5, cores, memory, tuple(sizes), leaks), Arbiter)
    assert figures.faults == []
    assert too_many(figures) == []


# --- the simulation itself ---


class Unfair:
    """A fake that does all that no rule may, all the time: ``vm-1`` starves, and ``vm-15`` has twice the CPU."""

    def shapes(self, now: int, seen: Seen, vms: Sequence[Vm]) -> tuple[Mapping[str, Shape], float]:
        part = (1.0, 0.6, 0.2)[now // 5 % 3]
        return {
            vm.name: Shape(
                200 if vm.name == "vm-15" else 100, None, int(vm.memory * (0.1 if vm.name == "vm-1" else part))
            )
            for vm in vms
        }, now + 5


def test_the_checks_find_what_is_wrong() -> None:
    figures = simulate(replace(ONE, days=0.45, cores=6), Unfair)
    for fault in (
        r"gave \d+ of \d+ bytes",
        r"vm-\d+: took below its floor",
        r"vm-\d+ lost something 5 s after it got something",
        r"vm-\d+ lost something 5 s after the last time",
        r"vm-1 waited for memory while vm-\d+ got it",
    ):
        assert any(re.search(fault, found) for found in figures.faults), fault
    assert too_many(figures) != []
    assert unequal(figures) != []


@pytest.mark.parametrize("rule", [Arbiter, Nobody, Proxmox])
def test_a_seed_makes_one_day(rule: type[Rule]) -> None:
    fleet = replace(ONE, sizes=ONE.sizes[4:16:2], cores=4, memory=14 * GIB)
    assert simulate(fleet, rule) == simulate(fleet, rule)
    assert simulate(fleet, rule) != simulate(replace(fleet, seed=2), rule)


def test_cpu_goes_by_weight_and_what_one_leaves_goes_to_the_others() -> None:
    assert shares(10, [1, 20, 20], [100, 100, 300]) == [1, 2.25, 6.75]
    assert shares(10, [20, 2, 3], [1, 100, 1]) == [5, 2, 3]
    assert shares(0, [1, 1], [1, 1]) == [0, 0]


def test_proxmox_grows_the_tight_first_and_shrinks_the_roomy() -> None:
    def vm(name: str, balloon: int, used: int) -> Vm:
        return Vm(name, 2, 4 * GIB, (), Shape(100, None, balloon), balloon, used)

    vms = [vm("tight", 3 * GIB, 3 * GIB), vm("roomy", 3 * GIB, GIB)]
    for percent, changed in ((60, {"tight": 1}), (79.99, {}), (95, {"roomy": -1})):
        used = int(20 * GIB * percent / 100)
        seen = Seen(Host({}, None), 20 * GIB, used)
        shapes, _ = Proxmox().shapes(0, seen, vms)
        assert {name: shape.memory - 3 * GIB for name, shape in shapes.items()} == {
            name: sign * (100 << 20) for name, sign in changed.items()
        }
