"""Ways: packets of a persona that names one leave by it, and by nothing else; afterwards nothing is left."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from persona_guest.core.persona_cgroups import PersonaCgroup
from persona_guest.core.ruleset import MARK_SHIFT
from persona_guest.enforce import plan as plans
from persona_guest.enforce.network.egress_routes import EgressRoutes, Routes, Routing
from persona_guest.enforce.network.facility import Network
from persona_guest.enforce.network.table import Table
from persona_guest.enforce.plan import PlanError

from persona.decisions import PersonaRef
from persona.documents import Persona
from persona.network import Via, parse_rule, parse_via
from persona.patterns import Whitelist
from persona.problems import PersonaError
from tests.guest import netns
from tests.guest.netns import OTHER4, OTHER6, World

pytest.importorskip("pyroute2")
pytestmark = [pytest.mark.root, pytest.mark.skipif(not netns.available(), reason="no namespaces or no cgroup v2 here")]
SIDE4, SIDE6 = "10.8.0.2", "2001:db8:8::2"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A second cable, e1, to the same far side, which tells by which one it was reached."""
    with netns.world("pway") as found:
        netns.run(
            "ip", "link", "add", "e1", "netns", found.near, "type", "veth", "peer", "name", "e1", "netns", found.far
        )
        for name, host in ((found.near, 1), (found.far, 2)):
            found.ip(name, "link", "set", "e1", "up")
            found.ip(name, "address", "add", f"10.8.0.{host}/24", "dev", "e1")
            found.ip(name, "address", "add", f"2001:db8:8::{host}/64", "dev", "e1", "nodad")
        found.start("serve", "80", OTHER4, OTHER6, where="far")
        yield found


class Parts:
    """What the agent has of it."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world = world
        self.user_rules: dict[int, Persona] = {}
        self.egress_routes = EgressRoutes(directory / "ways.json")
        self.routing = Routing()
        self.table = world.in_near(lambda: Table(self.egress_routes.number))
        self.routes = Routes(self.egress_routes, self.routing, self.table, self.user_rules)
        self.network = Network(self.table, self.egress_routes.number, str(world.root), self.user_rules)

    def enter(self, *rules: str, name: str = "Traveller") -> str:
        """As the agent would; the cgroup."""
        place, document = self.place(name), persona(*rules, name=name)
        self.do(lambda: (*self.routes.enter(place, document), *self.network.enter(place, document)))
        return place.cgroup

    def leave(self, name: str = "Traveller") -> None:
        """As the agent would."""
        self.do(lambda: self.network.leave(self.place(name)))
        self.do(lambda: self.routes.leave(self.place(name)))

    def place(self, name: str) -> PersonaCgroup:
        """Of a session."""
        return PersonaCgroup("s-1", PersonaRef(name, 1), self.world.cgroup(name), 4321)

    def do(self, plan: Callable[[], plans.Plan]) -> plans.Plan:
        """Plans and applies in the namespace."""

        def work() -> plans.Plan:
            made = plan()
            plans.apply(made)
            return made

        return self.world.in_near(work)


@pytest.fixture
def parts(world: World, tmp_path: Path) -> Iterator[Parts]:
    found = Parts(world, tmp_path)
    yield found
    found.do(lambda: found.network.reconcile({}))
    found.do(lambda: found.routes.reconcile({}))
    assert left_over(world) == ""
    found.table.close()


def persona(*rules: str, name: str = "Traveller") -> Persona:
    return Persona(name, Whitelist(()), network_access=tuple(map(parse_rule, rules)))


def left_over(world: World) -> str:
    """Routing rules and tables that are not the kernel's own."""
    found = world.near_run("sh", "-c", "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all")
    return "\n".join(line for line in found.splitlines() if "fwmark" in line or "table 21" in line)


def marked(world: World, number: int, host: str = OTHER4) -> str:
    """By which device a packet with the mark of a way would go, or none."""
    try:
        return (
            world.near_run("ip", "route", "get", host, "mark", f"{number << MARK_SHIFT:#x}")
            .split(" dev ")[1]
            .split()[0]
        )
    except RuntimeError as error:
        assert "unreachable" in str(error) or "No route to host" in str(error)
        return "none"


@contextlib.contextmanager
def out(world: World) -> Iterator[None]:
    """The second cable is out meanwhile."""
    world.ip(world.near, "link", "set", "e1", "down")
    try:
        yield
    finally:
        world.ip(world.near, "link", "set", "e1", "up")
        world.ip(world.near, "address", "replace", "2001:db8:8::1/64", "dev", "e1", "nodad")


def taken(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which of a way's two rules are taken away from now on: 0 leads there, 1 refuses."""
    found: list[int] = []
    rule = parts.routing._rule

    def noted(command: str, family: int, number: int, which: int, **more: Any) -> None:
        if command == "del":
            found.append(which)
        rule(command, family, number, which, **more)

    monkeypatch.setattr(parts.routing, "_rule", noted)
    return found


def by(world: World, cgroup: str, host: str) -> str:
    """By which device a connection to a host goes, or why it does not."""
    return sent(world, [("tcp", host, 80)], cgroup)


def sent(world: World, tries: list[tuple[str, str, int]], cgroup: str) -> str:
    counts = {device: int_of(world, device) for device in ("e0", "e1")}
    (outcome,) = world.attempt(tries, cgroup=cgroup)
    if outcome != "ok":
        return outcome
    grown = {device: int_of(world, device) - counts[device] for device in counts}
    return max(grown, key=lambda device: grown[device])


def int_of(world: World, device: str) -> int:
    words = world.near_run("ip", "-s", "-o", "link", "show", "dev", device).split("TX:")[1].split()
    return int(words[words.index("\\") + 2])


@pytest.mark.parametrize("way", [f"{SIDE4}", f"{SIDE4} dev e1", "dev e1", "table 100"])
def test_packets_go_the_way_that_is_named(world: World, parts: Parts, way: str) -> None:
    if way == "table 100":
        world.ip(world.near, "route", "replace", "default", "via", SIDE4, "table", "100")
    cgroup = parts.enter(f"10.20.0.0/16 via {way}", "2001:db8:20::/48")
    assert by(world, cgroup, OTHER4) == "e1"
    assert by(world, cgroup, OTHER6) == "e0"
    parts.enter("10.20.0.0/16", "2001:db8:20::/48")
    assert by(world, cgroup, OTHER4) == "e0"
    world.near_run("sh", "-c", "ip route flush table 100 2>/dev/null; true")


@pytest.mark.parametrize("way", [SIDE6, "dev e1"])
def test_ipv6_too(world: World, parts: Parts, way: str) -> None:
    if way == "dev e1":
        hardware = netns.run("ip", "-n", world.far, "-o", "link", "show", "e1").split("link/ether ")[1].split()[0]
        world.ip(world.near, "neigh", "replace", OTHER6, "lladdr", hardware, "dev", "e1")
    cgroup = parts.enter(f"2001:db8:20::/48 via {way}", "10.20.0.0/16")
    assert by(world, cgroup, OTHER6) == "e1"
    assert by(world, cgroup, OTHER4) == "e0"


def test_the_other_family_does_not_leak_past_a_gateway(world: World, parts: Parts) -> None:
    cgroup = parts.enter(f"any:tcp/80 via {SIDE4}")
    assert by(world, cgroup, OTHER4) == "e1"
    assert by(world, cgroup, OTHER6) == "ECONNREFUSED"


def test_a_way_that_goes_away_is_unreachable_and_comes_back(world: World, parts: Parts) -> None:
    cgroup = parts.enter(f"10.20.0.0/16 via {SIDE4}")
    with out(world):
        assert by(world, cgroup, OTHER4) == "silence"  # as with any cable that is out; and not by e0
    wanted = {parts.place("Traveller"): persona(f"10.20.0.0/16 via {SIDE4}")}
    parts.do(lambda: parts.routes.reconcile(wanted))
    assert by(world, cgroup, OTHER4) == "e1"


@pytest.mark.parametrize("way", [SIDE4, "dev e1"])
def test_a_repair_that_fails_lets_nothing_through_and_keeps_no_other_way(
    world: World, parts: Parts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    cgroup = parts.enter(f"10.20.0.0/16 via {way}")
    (number,) = parts.egress_routes.numbers.values()
    other = parts.place("Other")
    wanted = {
        parts.place("Traveller"): persona(f"10.20.0.0/16 via {way}"),
        other: persona("any via dev e0", name="Other"),
    }
    before = taken(parts, monkeypatch)
    with out(world):
        assert marked(world, number) == "none"
        parts.do(lambda: parts.routes.reconcile(wanted))
        assert marked(world, number) == "none"
        assert by(world, cgroup, OTHER4) == "silence"
        assert f"via {way}" in caplog.text
        assert parts.egress_routes.made == {parse_via(way), parse_via("dev e0")}
        assert marked(world, parts.egress_routes.numbers[parse_via("dev e0")], SIDE4) == "e0"
    assert [step["op"] for step in plans.describe(parts.do(lambda: parts.routes.reconcile(wanted)))] == [
        "routes.repair"
    ]
    assert by(world, cgroup, OTHER4) == "e1"
    assert 1 not in before
    assert parts.do(lambda: parts.routes.reconcile(wanted)) == ()


@pytest.mark.long
def test_what_is_bound_to_a_way_that_never_was_is_refused(world: World, parts: Parts) -> None:
    """As after a file of ways that is torn: the network facility binds what is wanted all the same."""
    wanted = {
        parts.place("Lost"): persona("any via dev nosuch", name="Lost"),
        parts.place("Traveller"): persona(f"10.20.0.0/16 via {SIDE4}"),
    }
    parts.do(lambda: parts.routes.reconcile(wanted))
    parts.do(lambda: parts.network.reconcile(wanted))
    assert by(world, world.cgroup("Lost"), OTHER4) == "silence"
    assert by(world, world.cgroup("Lost"), OTHER6) == "silence"
    assert by(world, world.cgroup("Traveller"), OTHER4) == "e1"


@pytest.mark.parametrize("how", ["enter", "reconcile"])
def test_what_is_found_under_a_number_goes_with_the_refusal_in_place(
    world: World, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    world.ip(world.near, "route", "replace", "default", "via", netns.FAR4, "table", "100")
    parts.enter("10.20.0.0/16 via table 100")
    (tmp_path / "ways.json").write_text("{torn")
    second = Parts(world, tmp_path)
    gone = taken(second, monkeypatch)
    wanted = {second.place("Traveller"): persona(f"10.20.0.0/16 via {SIDE4}")}
    if how == "enter":
        second.do(lambda: second.routes.enter(*next(iter(wanted.items()))))
    else:
        second.do(lambda: second.routes.reconcile(wanted))
    assert second.egress_routes.numbers == {Via(gateway=SIDE4): 1}
    assert marked(world, 1) == "e1"
    assert 0 in gone
    assert 1 not in gone
    second.do(lambda: second.network.reconcile({}))
    second.do(lambda: second.routes.reconcile({}))
    second.table.close()
    world.near_run("ip", "route", "flush", "table", "100")


def test_a_way_that_failed_in_any_manner_does_not_count_as_made(
    world: World, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: object) -> None:
        raise ImportError("no pyroute2")

    (tmp_path / "nosuch").touch()
    unkept = Parts(world, tmp_path / "nosuch")
    monkeypatch.setattr(parts.routing, "open", lacking)
    for each, why in ((parts, "no pyroute2"), (unkept, "Not a directory")):
        for _ in range(2):
            with pytest.raises(PlanError, match=why):
                each.enter("any via dev e1")
            assert not each.table.bound
    unkept.table.close()


def test_a_way_that_cannot_be_is_refused_whole(world: World, parts: Parts) -> None:
    for rule, why in (("any via dev nosuch", "no network device nosuch"), ("any via 192.0.2.1", "unreachable")):
        with pytest.raises(PlanError, match=why):
            parts.enter(rule)
    assert left_over(world) == ""
    assert not parts.table.bound


def test_two_personas_share_a_way_until_the_last_leaves(world: World, parts: Parts) -> None:
    one, two = parts.enter("any via dev e1", name="One"), parts.enter("10.20.0.0/16 via dev e1", name="Two")
    assert len(parts.egress_routes.numbers) == 1
    parts.leave("One")
    assert by(world, two, OTHER4) == "e1"
    assert by(world, one, OTHER4) == "e0"  # nobody's
    parts.leave("Two")
    assert left_over(world) == ""
    assert not parts.egress_routes.numbers


def test_after_a_crash_the_numbers_are_the_same_and_the_rest_goes(world: World, parts: Parts, tmp_path: Path) -> None:
    parts.enter("any via dev e1", name="Gone")
    cgroup = parts.enter(f"10.20.0.0/16 via {SIDE4}")
    second = Parts(world, tmp_path)
    assert second.egress_routes.numbers == parts.egress_routes.numbers
    wanted = {second.place("Traveller"): persona(f"10.20.0.0/16 via {SIDE4}")}
    second.do(lambda: second.routes.reconcile(wanted))
    assert len(second.egress_routes.numbers) == 2  # the table of the one before may still lead there
    second.do(lambda: second.network.reconcile(wanted))
    second.do(lambda: second.routes.reconcile(wanted))
    assert by(world, cgroup, OTHER4) == "e1"
    assert list(second.egress_routes.numbers) == [Via(gateway=SIDE4)]
    world.near_run(
        "sh", "-c", "ip rule flush; ip rule add pref 32766 lookup main; ip rule add pref 32767 lookup default"
    )
    assert [step["op"] for step in plans.describe(second.do(lambda: second.routes.reconcile(wanted)))] == [
        "routes.repair"
    ]
    assert by(world, cgroup, OTHER4) == "e1"
    (tmp_path / "ways.json").write_text("{torn")
    third = Parts(world, tmp_path)
    third.do(lambda: third.network.reconcile({}))
    third.do(lambda: third.routes.reconcile({}))
    assert left_over(world) == ""
    parts.egress_routes.made.clear()
    parts.egress_routes.numbers.clear()
    for each in (second, third):
        each.table.close()


def test_a_mark_on_its_own_leads_nobody_else(world: World, parts: Parts) -> None:
    parts.enter("any via dev e1")
    assert by(world, world.cgroup("Other"), OTHER4) == "e0"


def test_numbers_run_out_with_a_word(tmp_path: Path) -> None:
    egress_routes = EgressRoutes(tmp_path / "ways.json")
    for table in range(1, 256):
        assert egress_routes.number(Via(table=table)) == table
    with pytest.raises(PersonaError, match="255 ways"):
        egress_routes.number(Via(table=1000))
