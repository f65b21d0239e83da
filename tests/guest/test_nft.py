"""The table in a kernel: in network namespaces of the test's own, what a persona reaches and what it does not.

The programs run in cgroups as those of sessions do.  nft(8), which is not how the table was made, reads it.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from persona_guest.core.following import NOBODYS
from persona_guest.core.places import Place
from persona_guest.core.ruleset import access
from persona_guest.enforce import plan as plans
from persona_guest.enforce.nft import Network, Outside
from persona_guest.enforce.plan import PlanError
from persona_guest.enforce.table import Table

from persona.decisions import PersonaRef
from persona.documents import Persona
from persona.network import Via, parse_rule
from persona.patterns import Whitelist
from tests.guest import netns
from tests.guest.netns import FAR4, FAR6, NEAR4, NEAR6, OTHER4, OTHER6, World

pytestmark = [pytest.mark.root, pytest.mark.skipif(not netns.available(), reason="no namespaces or no cgroup v2 here")]
UID = 4321


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with netns.world("pnet") as found:
        found.start("serve", "53", "443", "5432", "5433", FAR4, FAR6, OTHER4, OTHER6, where="far")
        yield found


@pytest.fixture
def table(world: World) -> Iterator[Table]:
    found = world.in_near(lambda: Table(number))
    found.resolve(("10.9.0.2", "127.0.0.53", "2001:db8:9::2"))
    yield found
    found.rebuild({})
    found.close()


@pytest.fixture
def bases() -> dict[int, Persona]:
    return {}


@pytest.fixture
def network(world: World, table: Table, bases: dict[int, Persona]) -> Network:
    return Network(table, number, str(world.root), bases)


def under(network: Network, bases: dict[int, Persona], uid: int, *rules: str) -> None:
    """A user's base."""
    bases[uid] = persona(*rules, name="Base")
    plans.apply(network.base(uid))


def number(via: Via) -> int:
    return {"dev e1": 1, "10.9.0.9": 2, "table 100": 3}[str(via)]


def persona(*rules: str, name: str = "Analyst") -> Persona:
    return Persona(name, Whitelist(()), network_access=tuple(map(parse_rule, rules)))


def place(world: World, name: str = "Analyst", version: int = 1) -> Place:
    return Place("s-1", PersonaRef(name, version), world.cgroup(name), UID)


def enter(network: Network, world: World, *rules: str, name: str = "Analyst") -> str:
    """Brings the cgroup of that name under these rules."""
    where = place(world, name)
    plans.apply(network.enter(where, persona(*rules, name=name)))
    return where.cgroup


def listed(world: World) -> list[dict[str, object]]:
    return list(json.loads(world.near_run("nft", "-j", "list", "ruleset"))["nftables"])


REFUSED, CUT = "ECONNREFUSED", "EPERM"  # of TCP, and of what else goes out; of ICMPv6 the kernel says EACCES
PROHIBITED = "EHOSTUNREACH"  # what a peer hears who may not come in
RULES = [
    "10.20.0.0/16:tcp/5432",
    "2001:db8:20::/48:tcp/5432,440-450",
    "10.9.0.2:udp/443",
    "2001:db8:9::2:udp/443",
    "icmp",
    "dns",
]
# kind, host, port, and what must come of it under RULES
MATRIX = [
    ("tcp", OTHER4, 5432, "ok"),
    ("tcp", OTHER4, 5433, REFUSED),
    ("tcp", OTHER4, 443, REFUSED),
    ("tcp", FAR4, 5432, REFUSED),
    ("tcp", OTHER6, 5432, "ok"),
    ("tcp", OTHER6, 443, "ok"),
    ("tcp", OTHER6, 5433, REFUSED),
    ("tcp", FAR6, 5432, REFUSED),
    ("tcp_mapped", OTHER4, 5432, "ok"),
    ("tcp_mapped", OTHER4, 443, REFUSED),
    ("udp", FAR4, 443, "ok"),
    ("udp", FAR4, 5432, CUT),
    ("udp", OTHER4, 443, CUT),
    ("udp", FAR6, 443, "ok"),
    ("udp", OTHER6, 443, CUT),
    ("udp_unconnected", FAR4, 443, "ok"),
    ("udp_unconnected", FAR4, 5433, CUT),
    ("udp_mapped", FAR4, 443, "ok"),
    ("udp_mapped", FAR4, 5433, CUT),
    ("udplite", FAR4, 443, CUT),
    ("udplite", FAR6, 443, CUT),
    ("dns", FAR4, 0, "ok"),
    ("dns", FAR6, 0, "ok"),
    ("dns", OTHER4, 0, CUT),
    ("dns", OTHER6, 0, CUT),
    ("tcp", FAR4, 53, "ok"),
    ("tcp", OTHER4, 53, REFUSED),
    ("ping", FAR4, 0, "ok"),
    ("ping", FAR6, 0, "ok"),
    ("raw_ping", OTHER4, 0, "ok"),
    ("raw_tcp", OTHER4, 5432, "ok"),
    ("raw_tcp", OTHER4, 443, CUT),
]


def test_what_is_listed_is_reached_and_nothing_else(world: World, network: Network) -> None:
    cgroup = enter(network, world, *RULES)
    found = world.attempt([row[:3] for row in MATRIX], cgroup=cgroup)
    assert list(zip(MATRIX, found, strict=True)) == [(row, row[3]) for row in MATRIX]
    open_ = [row[:3] for row in MATRIX if row[0] not in ("raw_tcp", "udplite")]
    assert set(world.attempt(open_)) == {"ok"}  # beside it


def test_nothing_listed_is_nothing_but_loopback(world: World, network: Network) -> None:
    world.start("serve", "7000")
    cgroup = enter(network, world)
    tries = [("tcp", FAR4, 443), ("tcp", FAR6, 443), ("udp", FAR4, 443), ("ping", FAR4, 0), ("ping", FAR6, 0)]
    assert world.attempt(tries, cgroup=cgroup) == [REFUSED, REFUSED, CUT, CUT, "EACCES"]
    own = [("tcp", host, 7000) for host in ("127.0.0.1", "::1", NEAR4, NEAR6)] + [("udp", "127.0.0.1", 7000)]
    assert set(world.attempt(own, cgroup=cgroup)) == {"ok"}
    assert world.attempt([("ping", "127.0.0.1", 0), ("ping", "::1", 0)], cgroup=cgroup) == ["ok", "ok"]


def test_neighbour_discovery_goes_on_under_a_persona_without_icmp(world: World, network: Network) -> None:
    cgroup = enter(network, world, "any:tcp/443")
    world.ip(world.near, "-6", "neigh", "flush", "dev", "e0")
    assert world.attempt([("tcp", FAR6, 443), ("tcp", FAR4, 443)], cgroup=cgroup) == ["ok", "ok"]


def test_the_local_stub_is_name_service_and_not_loopback(world: World, network: Network) -> None:
    world.start("serve", "53", "127.0.0.53", "127.0.0.1")
    tries = [("dns", "127.0.0.53", 0), ("tcp", "127.0.0.53", 53), ("dns", "127.0.0.1", 0)]
    assert world.attempt(tries, cgroup=enter(network, world, "dns")) == ["ok", "ok", CUT]
    assert world.attempt(tries, cgroup=enter(network, world, "any:tcp/443")) == [CUT, REFUSED, CUT]
    assert world.attempt(tries, cgroup=enter(network, world, "127.0.0.1:udp/53")) == [CUT, REFUSED, "ok"]


def test_listening_sockets_hear_only_whom_they_may(world: World, network: Network) -> None:
    cgroup = enter(network, world, "in:any:tcp/8080", f"in:{FAR4}:udp/8081", f"in:{FAR6}")
    server = world.start("serve", "8080", "8081", "8082", cgroup=cgroup)
    tries = [
        ("tcp", NEAR4, 8080, "ok"), ("tcp", NEAR6, 8080, "ok"), ("udp", NEAR4, 8081, "ok"),
        ("udp", NEAR6, 8082, "ok"), ("tcp", NEAR6, 8082, "ok"),
        ("tcp", NEAR4, 8081, PROHIBITED), ("tcp", NEAR4, 8082, PROHIBITED), ("udp", NEAR4, 8080, PROHIBITED),
        ("udp", NEAR4, 8082, PROHIBITED),
    ]  # fmt: skip
    found = world.attempt([row[:3] for row in tries], where="far")
    assert list(zip(tries, found, strict=True)) == [(row, row[3]) for row in tries]
    assert world.attempt([("tcp", "127.0.0.1", 8082), ("udplite", "127.0.0.1", 8082)]) == ["ok", "ok"]
    # the kernel does not tell whose socket of UDP-Lite it is
    assert world.attempt([("udplite", NEAR4, 8080), ("udplite", NEAR6, 8080)], where="far") == [PROHIBITED, "EACCES"]
    # to be let in is not to be let out
    assert world.attempt([("tcp", FAR4, 443), ("udp", FAR4, 443)], cgroup=cgroup) == [REFUSED, CUT]
    server.kill()


def test_a_listener_may_not_speak_first_from_its_port(world: World, network: Network) -> None:
    cgroup = enter(network, world, "in:any:tcp/8090", "in:any:udp/8090")
    script = (
        "import socket,errno,sys\n"
        "for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):\n"
        " s=socket.socket(socket.AF_INET, kind); s.bind(('0.0.0.0', 8090)); s.settimeout(2)\n"
        " try:\n"
        f"  s.connect(('{FAR4}', 443)); s.send(b'x'); print('out')\n"
        " except OSError as e: print(errno.errorcode.get(e.errno, e))\n"
    )
    enter_it = (
        f'echo $$ > {world.root / cgroup}/cgroup.procs; exec nsenter --net=/run/netns/{world.near} python3 -c "$0"'
    )
    assert netns.run("sh", "-c", enter_it, script).split() == [REFUSED, CUT]


def test_an_owner_outside_of_every_cgroup_of_ours_is_under_his_base(
    world: World, network: Network, bases: dict[int, Persona]
) -> None:
    tries = [("tcp", OTHER4, 5432), ("tcp", OTHER6, 5432), ("tcp", OTHER4, 443), ("udp", FAR4, 443)]
    assert set(world.attempt(tries, uid=UID)) == {"ok"}
    under(network, bases, UID, "10.20.0.0/16:tcp/5432")
    assert world.attempt(tries, uid=UID) == ["ok", REFUSED, REFUSED, CUT]
    assert set(world.attempt(tries, uid=UID + 1)) == {"ok"}
    inside = enter(network, world, "any:tcp/443", name="Other")
    assert world.attempt(tries, uid=UID, cgroup=inside) == [REFUSED, REFUSED, "ok", CUT]  # the cgroup's word first
    under(network, bases, UID)
    assert world.attempt(tries, uid=UID) == [REFUSED, REFUSED, REFUSED, CUT]
    del bases[UID]
    plans.apply(network.base(UID))
    assert set(world.attempt(tries, uid=UID)) == {"ok"}


def test_an_owners_listener_is_answered_for_by_its_answers(
    world: World, network: Network, bases: dict[int, Persona]
) -> None:
    under(network, bases, UID, "in:any:tcp/8100")
    world.start("serve", "8100", "8101", uid=UID)
    assert world.attempt([("tcp", NEAR4, 8100), ("tcp", NEAR6, 8100)], where="far") == ["ok", "ok"]
    assert world.attempt([("tcp", NEAR4, 8101)], where="far") != ["ok"]


@pytest.mark.parametrize(("host", "narrowed"), [(FAR4, "any:tcp/5432"), (FAR6, ""), (OTHER4, "10.21.0.0/16")])
def test_a_narrowed_persona_cuts_what_is_open(world: World, network: Network, host: str, narrowed: str) -> None:
    cgroup = enter(network, world, "any:tcp/443")
    process = world.start("stream", host, "443", cgroup=cgroup)
    time.sleep(0.2)
    changed = time.time()
    enter(network, world, *([narrowed] if narrowed else []))
    out, _ = process.communicate(timeout=10)
    when, error = out.split()
    assert float(when) - changed < 1
    assert error in ("ECONNRESET", "EPIPE")


def test_a_narrowed_persona_cuts_who_came_in(world: World, network: Network) -> None:
    cgroup = enter(network, world, "in:any:tcp/8110")
    world.start("serve", "8110", cgroup=cgroup)
    process = world.start("stream", NEAR4, "8110", where="far")
    changed = time.time()
    enter(network, world)
    process.wait(30) if process.poll() else None
    assert world.attempt([("tcp", NEAR4, 8110)], where="far") == [PROHIBITED]
    out, _ = process.communicate(timeout=30)
    assert float(out.split()[0]) - changed < 12  # its peer hears nothing more: its own patience is 10 s


def test_another_version_that_leaves_a_flow_its_right_does_not_disturb_it(world: World, network: Network) -> None:
    cgroup = enter(network, world, "any:tcp/443")
    process = world.start("stream", FAR4, "443", cgroup=cgroup)
    for port in range(100, 150):
        enter(network, world, f"any:tcp/{port}", "any:tcp/443")
    time.sleep(0.2)
    assert process.poll() is None
    process.kill()


def test_refusals_are_counted(world: World, network: Network, table: Table) -> None:
    cgroup = enter(network, world, name="Counted")
    assert table.refused() == {next(iter(table.bound.values())).access.name: 0}
    began = time.monotonic()
    world.attempt([("tcp", FAR4, 443), ("tcp", FAR6, 443), ("udp", FAR4, 443)], cgroup=cgroup)
    assert time.monotonic() - began < 0.9  # at once: an ICMP error would cost each connect a second
    assert sum(table.refused().values()) == 3


def test_the_plan_says_what_it_will_do(world: World, network: Network) -> None:
    where = place(world)
    (step,) = plans.describe(network.enter(where, persona("10.20.0.0/16:tcp/5432", "in:any:udp/53")))
    rules = step["rules"]
    assert isinstance(rules, dict)
    out, into = rules.values()
    assert out[0] == "meta l4proto tcp th dport 5432 ip daddr 10.20.0.0/16 accept"
    assert out[1] == "meta l4proto udp ct direction reply th sport 53 accept"
    assert out[-1] == "reject with icmpx admin-prohibited"
    assert into[0] == "meta l4proto udp th dport 53 accept"
    assert network.enter(where, persona()) != ()
    plans.apply(network.enter(where, persona()))
    assert network.enter(where, persona()) == ()


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
    world: World, network: Network, bases: dict[int, Persona]
) -> None:
    """Those of another owner too, where no cgroup above tells whose they are."""
    under(network, bases, UID, "any:tcp/443", "any:udp/443")
    holder = moved_on(world, network)
    assert holder.fares() == ["ok", "ok"]
    under(network, bases, UID, "any:tcp/443")
    assert holder.fares() == ["ok", CUT]
    under(network, bases, UID)
    assert holder.fares() == ["ECONNRESET", CUT]
    del bases[UID]  # with his last session
    plans.apply(network.base(UID))
    assert holder.fares()[1] == "ok"


def test_sockets_of_a_place_that_was_made_anew_count_as_the_users(
    world: World, network: Network, bases: dict[int, Persona]
) -> None:
    under(network, bases, UID)
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


def test_what_places_left_behind_is_taken_up_by_the_next_agent(world: World, table: Table, tmp_path: Path) -> None:
    bases = {UID: persona("any:tcp/443", name="Base")}
    first = Network(table, number, str(world.root), bases, Outside(tmp_path / "outside.json"))
    plans.apply(first.base(UID))
    holder = moved_on(world, first)
    assert holder.fares() == ["ok", CUT]
    wanted = {place(world, "Other"): persona("any", name="Other")}
    successor = world.in_near(lambda: Table(number))
    second = Network(successor, number, str(world.root), bases, Outside(tmp_path / "outside.json"))
    plans.apply(second.reconcile(wanted))
    assert second.reconcile(wanted) == ()
    assert holder.fares() == ["ok", CUT]
    bases[UID] = persona(name="Base")
    plans.apply(second.base(UID))
    assert second.reconcile(wanted) == ()
    assert holder.fares() == ["ECONNRESET", CUT]
    bases.clear()
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
    table.warm(access(NOBODYS, {}))
    assert "inet persona" not in world.near_run("nft", "list", "tables")
    assert not table.exists()


def test_warming_up_leaves_a_table_that_is_there_alone(world: World, table: Table, network: Network) -> None:
    enter(network, world, "any:tcp/443")
    before = world.near_run("nft", "list", "table", "inet", "persona")
    world.in_near(lambda: Table(number)).warm(access(NOBODYS, {}))
    assert world.near_run("nft", "list", "table", "inet", "persona") == before
