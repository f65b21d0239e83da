"""The table in a kernel as it comes, changes and goes, and what lives on without its place."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from persona_guest.core.persona_cgroups import PersonaCgroup, slice_of
from persona_guest.core.reassignment import NO_PERSONA_DOCUMENT
from persona_guest.core.ruleset import access, text
from persona_guest.enforce import plan as plans
from persona_guest.enforce.network.build import KINDS, WAY
from persona_guest.enforce.network.facility import Network
from persona_guest.enforce.network.orphan_sockets import SocketOwners
from persona_guest.enforce.network.table import Table
from persona_guest.enforce.plan import PlanError

from persona.decisions import PersonaRef
from persona.documents import Persona
from persona.network import parse_via
from tests.guest import netns
from tests.guest.netns import FAR4, World
from tests.guest.nft_world import CUT, REFUSED, RULES, UID, enter, listed, number, persona, place, under

pytestmark = [pytest.mark.root, pytest.mark.skipif(not netns.available(), reason="no namespaces or no cgroup v2 here")]


def test_the_plan_says_what_it_will_do(world: World, network: Network) -> None:
    where = place(world)
    (step,) = plans.describe(network.enter(where, persona("10.20.0.0/16:tcp/5432", "in:any:udp/53")))
    rules = step["rules"]
    assert isinstance(rules, dict)
    out, into = rules.values()
    assert out[0] == "meta l4proto udp ct direction reply th sport 53 accept"
    assert out[1] == "meta l4proto tcp th dport 5432 ip daddr 10.20.0.0/16 accept"
    assert out[-1] == "reject with icmpx admin-prohibited"
    assert into[0] == "meta l4proto udp th dport 53 accept"
    assert network.enter(where, persona()) != ()
    plans.apply(network.enter(where, persona()))
    assert network.enter(where, persona()) == ()


def test_what_most_packets_are_about_is_asked_first(world: World, network: Network) -> None:
    rules = "10.20.0.0/16:tcp/5432", "dns", "any:udp/443", "icmp", "any:tcp/443-444"
    first = ["tcp th dport 443-444", "udp th dport 443", "icmp", "ipv6-icmp", "tcp th dport 5432 ip daddr 10.20.0.0/16"]
    chain = access(persona(*rules), {}).out
    assert [text(rule) for rule in chain.rules[:5]] == [f"meta l4proto {match} accept" for match in first]


def test_rules_keep_their_order_where_one_names_a_way(world: World, network: Network) -> None:
    given = persona("10.20.0.0/16:tcp/5432", "any:tcp/5432 via dev e1")
    chain = access(given, {parse_via("dev e1"): 1}).out
    assert "10.20.0.0/16" in text(chain.rules[0])
    assert "meta mark set" in text(chain.rules[1])


def test_undo_puts_back_what_was(world: World, network: Network) -> None:
    cgroup = enter(network, world, "any:tcp/443")
    plan = network.enter(place(world), persona("any:tcp/5432"))
    plans.apply(plan)
    plans.undo(plan)
    assert world.attempt([("tcp", FAR4, 443), ("tcp", FAR4, 5432)], cgroup=cgroup) == ["ok", REFUSED]
    gone = network.leave(place(world))
    plans.apply(gone)
    plans.undo(gone)
    assert world.attempt([("tcp", FAR4, 443), ("tcp", FAR4, 5432)], cgroup=cgroup) == ["ok", REFUSED]


def test_a_cgroup_that_is_gone_is_left_and_made_anew(world: World, network: Network, table: Table) -> None:
    where = place(world, "Gone")
    plans.apply(network.enter(where, persona(name="Gone")))
    (world.root / where.cgroup).rmdir()
    with pytest.raises(PlanError, match="No such file"):
        plans.apply(network.enter(where, persona("any", name="Gone")))
    assert where.cgroup in table.bound
    cgroup = enter(network, world, "any:tcp/443", name="Gone")  # another number under the same name
    assert world.attempt([("tcp", FAR4, 443), ("tcp", FAR4, 5432)], cgroup=cgroup) == ["ok", REFUSED]
    (world.root / where.cgroup).rmdir()
    plans.apply(network.leave(where))
    assert not table.bound
    assert not [item for item in listed(world) if "element" in item or ("chain" in item and "Gone" in str(item))]


class Holder:
    """A program of root's in a session outside of its user's slice (sudo in a su), with flows of TCP and UDP."""

    def __init__(self, world: World, cgroup: str) -> None:
        self._root = world.root
        self._process = world.start("hold", FAR4, "443", cgroup=cgroup)

    def moved(self, cgroup: str) -> None:
        """It lives there from now on; its sockets stay where they were made."""
        (self._root / cgroup / "cgroup.procs").write_text(str(self._process.pid))

    def fares(self) -> list[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return list(json.loads(self._process.stdout.readline()))


def moved_on(world: World, network: Network) -> Holder:
    """Begun under Left, which is left and gone; it is under Other by now."""
    holder = Holder(world, enter(network, world, "any:tcp/443", "any:udp/443", name="Left"))
    assert holder.fares() == ["ok", "ok"]
    holder.moved(enter(network, world, "any:tcp/443", "any:udp/443", name="Other"))
    plans.apply(network.leave(place(world, "Left")))
    (world.root / place(world, "Left").cgroup).rmdir()
    return holder


def test_sockets_of_a_place_that_was_left_count_as_the_users(
    world: World, network: Network, user_rules: dict[int, Persona]
) -> None:
    """Those of another owner too, where no cgroup above tells whose they are."""
    under(network, user_rules, UID, "any:tcp/443", "any:udp/443")
    holder = moved_on(world, network)
    assert holder.fares() == ["ok", "ok"]
    under(network, user_rules, UID, "any:tcp/443")
    assert holder.fares() == ["ok", CUT]
    under(network, user_rules, UID)
    assert holder.fares() == ["ECONNRESET", CUT]
    under(network, user_rules, UID + 1, "any")
    del user_rules[UID]  # with his last session
    plans.apply(network.bind_user(UID))
    assert holder.fares()[1] == CUT, "who is there still may have been handed them"
    del user_rules[UID + 1]
    plans.apply(network.bind_user(UID + 1))
    assert holder.fares()[1] == "ok"


def test_sockets_of_a_place_that_was_made_anew_count_as_the_users(
    world: World, network: Network, user_rules: dict[int, Persona]
) -> None:
    under(network, user_rules, UID)
    holder = Holder(world, enter(network, world, "any:tcp/443", "any:udp/443", name="Left"))
    holder.moved(enter(network, world, "any", name="Other"))
    (world.root / place(world, "Left").cgroup).rmdir()
    again = enter(network, world, "any:tcp/443", name="Left")  # without that it was left
    assert holder.fares() == ["ECONNRESET", CUT]
    assert world.attempt([("tcp", FAR4, 443)], cgroup=again) == ["ok"]
    plan = network.leave(place(world, "Left"))
    plans.apply(plan)
    assert world.attempt([("tcp", FAR4, 443)], cgroup=again) == [REFUSED]
    plans.undo(plan)
    assert world.attempt([("tcp", FAR4, 443)], cgroup=again) == ["ok"]
    assert holder.fares()[1] == CUT


@pytest.fixture
def slice_(world: World) -> Iterator[str]:
    """A scope in the user's own slice."""
    scope = world.root / slice_of(UID) / "session-1.scope"
    (scope / "Analyst").mkdir(parents=True)
    yield str(scope.relative_to(world.root))
    (scope / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + 10
    while "populated 1" in (scope / "cgroup.events").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    for directory in (scope / "Analyst", scope, scope.parent):
        directory.rmdir()
    with contextlib.suppress(OSError):  # this machine's own
        scope.parent.parent.rmdir()


def test_sockets_of_a_user_who_has_gone_reach_nothing(world: World, table: Table, slice_: str, tmp_path: Path) -> None:
    """He may have handed them to an accomplice, who is there still."""
    user_rules: dict[int, Persona] = {}
    network = Network(table, number, str(world.root), user_rules, SocketOwners(tmp_path / "outside.json"))
    under(network, user_rules, UID + 1, "any:tcp/5432")
    under(network, user_rules, UID, "any:tcp/443", "any:udp/443")
    where = PersonaCgroup("s-1", PersonaRef("Analyst", 1), f"{slice_}/Analyst", UID)
    plans.apply(network.enter(where, user_rules[UID]))
    holder = Holder(world, where.cgroup)
    assert holder.fares() == ["ok", "ok"]
    del user_rules[UID]  # his session ends; its place is left a moment later
    plans.apply(network.bind_user(UID))
    plans.apply(network.leave(where))
    assert holder.fares() == ["ECONNRESET", CUT]
    assert network.reconcile({}) == ()
    successor = world.in_near(lambda: Table(number))
    second = Network(successor, number, str(world.root), user_rules, SocketOwners(tmp_path / "outside.json"))
    plans.apply(second.reconcile({}))
    assert holder.fares()[1] == CUT
    under(second, user_rules, UID, "any:udp/443")  # he is back, and his slice was never gone
    assert holder.fares()[1] == "ok"
    user_rules.clear()
    plans.apply(second.bind_user(UID))
    plans.apply(second.reconcile({}))
    assert "inet persona" not in world.near_run("nft", "list", "tables")
    successor.close()


@pytest.mark.parametrize("before", [False, True], ids=["while his session lives", "once it has ended"])
def test_who_breaks_the_glass_beside_a_session_of_his_is_not_nobody(
    world: World, table: Table, slice_: str, tmp_path: Path, before: bool
) -> None:
    user_rules: dict[int, Persona] = {}
    network = Network(table, number, str(world.root), user_rules, SocketOwners(tmp_path / "outside.json"))
    under(network, user_rules, UID + 1)
    under(network, user_rules, UID, "any:udp/443")
    if not before:
        plans.apply(network.exempt(UID))
    plans.apply(network.reconcile({}))
    del user_rules[UID]
    plans.apply(network.bind_user(UID))
    if before:
        assert world.attempt([("tcp", FAR4, 443)], cgroup=f"{slice_}/Analyst") == [REFUSED]
        plans.apply(network.exempt(UID))
    assert world.attempt([("tcp", FAR4, 443)], cgroup=f"{slice_}/Analyst") == ["ok"]
    assert network.reconcile({}) == ()
    again = Network(table, number, str(world.root), user_rules, SocketOwners(tmp_path / "outside.json"))
    assert again.reconcile({}) == ()
    user_rules.clear()
    plans.apply(network.bind_user(UID + 1))
    plans.apply(network.exempt(UID))
    plans.apply(network.reconcile({}))
    assert "inet persona" not in world.near_run("nft", "list", "tables")


def test_what_places_left_behind_is_taken_up_by_the_next_agent(world: World, table: Table, tmp_path: Path) -> None:
    user_rules = {UID: persona("any:tcp/443", name="Base")}
    first = Network(table, number, str(world.root), user_rules, SocketOwners(tmp_path / "outside.json"))
    plans.apply(first.bind_user(UID))
    holder = moved_on(world, first)
    assert holder.fares() == ["ok", CUT]
    wanted = {place(world, "Other"): persona("any", name="Other")}
    successor = world.in_near(lambda: Table(number))
    second = Network(successor, number, str(world.root), user_rules, SocketOwners(tmp_path / "outside.json"))
    kept = (tmp_path / "outside.json").read_text()
    plan = second.reconcile({**wanted, place(world, "New"): persona(name="New")})
    assert (tmp_path / "outside.json").read_text() == kept  # which a plan that is only looked at leaves as it is
    plans.apply(plan)
    assert "New" in (tmp_path / "outside.json").read_text()
    plans.apply(second.reconcile(wanted))
    assert second.reconcile(wanted) == ()
    assert holder.fares() == ["ok", CUT]
    user_rules[UID] = persona(name="Base")
    plans.apply(second.bind_user(UID))
    assert second.reconcile(wanted) == ()
    assert holder.fares() == ["ECONNRESET", CUT]
    user_rules.clear()
    plans.apply(second.reconcile({}))
    assert json.loads((tmp_path / "outside.json").read_text()) == {}
    successor.close()


def test_unused_chains_go_with_the_last_that_used_them(world: World, network: Network, table: Table) -> None:
    enter(network, world, "any:tcp/443", name="One")
    plans.apply(network.enter(place(world, "Two"), persona("any:tcp/443", name="One")))
    assert len(table.refused()) == 1
    plans.apply(network.leave(place(world, "One")))
    assert len(table.refused()) == 1
    plans.apply(network.leave(place(world, "Two")))
    assert not table.refused()


def test_a_new_agent_takes_the_table_up_in_one_step(world: World, network: Network) -> None:
    cgroup = enter(network, world, "any:tcp/443")
    enter(network, world, "any:tcp/5432", name="Stale")
    process = world.start("stream", FAR4, "443", cgroup=cgroup)
    successor = world.in_near(lambda: Table(number))
    kept = {UID: persona()}
    second = Network(successor, number, str(world.root), kept)
    wanted = {place(world): persona("any:tcp/443")}
    plan = second.reconcile(wanted)
    assert plans.describe(plan)[0]["op"] == "network.rebuild"
    plans.apply(plan)
    assert second.reconcile(wanted) == ()
    time.sleep(0.2)
    assert process.poll() is None
    assert world.attempt([("tcp", FAR4, 443), ("tcp", FAR4, 5432)], cgroup=cgroup) == ["ok", REFUSED]
    assert world.attempt([("tcp", FAR4, 443)], cgroup=place(world, "Stale").cgroup) == ["ok"]  # nobody's any more
    assert world.attempt([("tcp", FAR4, 443)], uid=UID) == [REFUSED]
    kept.clear()
    plans.apply(second.reconcile({}))
    assert second.reconcile({}) == ()
    assert "persona" not in world.near_run("nft", "list", "tables")
    successor.close()
    process.kill()


def test_other_tables_are_left_alone(world: World, network: Network) -> None:
    """A firewall and a container engine beside us: their rules stay, and still refuse what they refuse."""
    world.near_run("nft", "-f", str(netns.PROBE.with_name("neighbours.nft")))
    neighbours = world.near_run("nft", "list", "ruleset")
    cgroup = enter(network, world, "any:tcp/443,5432")
    assert world.attempt([("tcp", FAR4, 443), ("tcp", FAR4, 5432), ("tcp", FAR4, 5433)], cgroup=cgroup) == [
        "ok", "EHOSTUNREACH", REFUSED,
    ]  # fmt: skip
    plans.apply(network.reconcile({}))
    assert world.near_run("nft", "list", "ruleset") == neighbours
    world.near_run("nft", "flush", "ruleset")


def test_nft_reads_the_table_as_we_mean_it(world: World, network: Network) -> None:
    cgroup = enter(
        network, world, "10.20.0.0/16:tcp/80-90", "2001:db8::/33:udp/53", "dns", "in:any:udp/9", "any via dev e1"
    )
    text = world.near_run("nft", "list", "table", "inet", "persona")
    for line in (
        "type route hook output priority mangle; policy accept;",
        "socket cgroupv2 level 4 vmap @out4",
        "meta skuid vmap @owner",
        "tcp dport 80-90 ip daddr 10.20.0.0/16 accept",
        "udp dport 53 ip6 daddr 2001:db8::/33 accept",
        "meta mark set meta mark & 0x01ffffff | 0x01000000 accept",
        "udp dport 53 ip6 daddr @resolvers6 accept",
        "ct direction reply udp sport 9 accept",
        "reject with icmpx admin-prohibited",
        "reject with tcp reset",
        "masquerade",
    ):
        assert line in text, line
    assert f'"{cgroup}" : goto Analyst.' in text or "goto Analyst." in text


def test_a_thousand_personas_change_quickly(world: World, network: Network, table: Table) -> None:
    """Nothing grows with what is loaded: an upper bound, loose enough for a loaded machine."""
    wanted = {
        replace(place(world), cgroup=world.cgroup(f"P{index}"), persona=PersonaRef(f"P{index}", 1)): persona(
            *RULES, f"in:any:tcp/{index + 1}", name=f"P{index}"
        )
        for index in range(1000)
    }
    plans.apply(network.reconcile(wanted))
    assert len(table.refused()) == 1000
    times = []
    for port in range(20):
        began = time.perf_counter()
        enter(network, world, f"any:tcp/{port + 1}", name="P7")
        times.append(time.perf_counter() - began)
    assert sorted(times)[10] < 0.05
    plans.apply(network.reconcile({}))


def test_what_a_first_login_needs_is_loaded_beforehand_and_no_table_is_left(world: World, table: Table) -> None:
    assert not table.exists()
    table.warm(access(NO_PERSONA_DOCUMENT, {}))
    assert "inet persona" not in world.near_run("nft", "list", "tables")
    assert not table.exists()


def test_warming_up_takes_rules_of_every_kind(world: World, table: Table, network: Network) -> None:
    every = access(KINDS, {WAY: 1})
    said = " ".join(text for texts in every.texts.values() for text in texts)
    assert "ct direction" in said
    assert "meta mark set" in said
    table.warm(every)
    assert "inet persona" not in world.near_run("nft", "list", "tables")


def test_warming_up_leaves_a_table_that_is_there_alone(world: World, table: Table, network: Network) -> None:
    enter(network, world, "any:tcp/443")
    before = world.near_run("nft", "list", "table", "inet", "persona")
    world.in_near(lambda: Table(number)).warm(access(NO_PERSONA_DOCUMENT, {}))
    assert world.near_run("nft", "list", "table", "inet", "persona") == before
