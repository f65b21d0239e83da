"""The table in a kernel: in network namespaces of the test's own, what a persona reaches and what it does not.

The programs run in cgroups as those of sessions do.  nft(8), which is not how the table was made, reads it.
"""

import time

import pytest
from persona_guest.enforce import plan as plans
from persona_guest.enforce.network.facility import Network
from persona_guest.enforce.network.table import Table

from persona.documents import Persona
from tests.guest import netns
from tests.guest.netns import FAR4, FAR6, NEAR4, NEAR6, OTHER4, OTHER6, World
from tests.guest.nft_world import CUT, REFUSED, RULES, UID, enter, under

pytestmark = [pytest.mark.root, pytest.mark.skipif(not netns.available(), reason="no namespaces or no cgroup v2 here")]


PROHIBITED = "EHOSTUNREACH"  # what a peer hears who may not come in
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
    world: World, network: Network, user_rules: dict[int, Persona]
) -> None:
    tries = [("tcp", OTHER4, 5432), ("tcp", OTHER6, 5432), ("tcp", OTHER4, 443), ("udp", FAR4, 443)]
    assert set(world.attempt(tries, uid=UID)) == {"ok"}
    under(network, user_rules, UID, "10.20.0.0/16:tcp/5432")
    assert world.attempt(tries, uid=UID) == ["ok", REFUSED, REFUSED, CUT]
    assert set(world.attempt(tries, uid=UID + 1)) == {"ok"}
    inside = enter(network, world, "any:tcp/443", name="Other")
    assert world.attempt(tries, uid=UID, cgroup=inside) == [REFUSED, REFUSED, "ok", CUT]  # the cgroup's word first
    under(network, user_rules, UID)
    assert world.attempt(tries, uid=UID) == [REFUSED, REFUSED, REFUSED, CUT]
    del user_rules[UID]
    plans.apply(network.bind_user(UID))
    assert set(world.attempt(tries, uid=UID)) == {"ok"}


def test_an_owners_listener_is_answered_for_by_its_answers(
    world: World, network: Network, user_rules: dict[int, Persona]
) -> None:
    under(network, user_rules, UID, "in:any:tcp/8100")
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


@pytest.mark.long
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
