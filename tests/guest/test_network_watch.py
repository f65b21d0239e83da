"""What the agent hears of its table: refused connections by name, and other people's hands in it."""

import errno
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from persona_guest.core.persona_cgroups import PersonaCgroup
from persona_guest.core.ruleset import STUBS, resolvers
from persona_guest.enforce import plan as plans
from persona_guest.enforce.network.facility import Network
from persona_guest.enforce.network.rejected_packet import target
from persona_guest.enforce.network.rejects import Refusal, Refusals
from persona_guest.enforce.network.resolvers import Resolvers
from persona_guest.enforce.network.table import Table
from persona_guest.enforce.network.tamper import Meddling
from persona_guest.kernel import nflog
from persona_guest.loop import Loop

from persona.decisions import PersonaRef
from persona.documents import Persona
from persona.network import parse_rule
from persona.patterns import Whitelist
from tests.guest import netns
from tests.guest.netns import FAR4, FAR6, NEAR4, OTHER4, World

here = pytest.mark.skipif(not netns.available(), reason="no namespaces or no cgroup v2 here")
UID = 4321
DNS = Persona("Analyst", Whitelist(()), network_access=(parse_rule("dns"),))


class Parts:
    """The table, bound for one cgroup, and a loop."""

    def __init__(self, world: World) -> None:
        self.loop = Loop()
        self.table = world.in_near(lambda: Table(lambda _via: 1))
        self.network = Network(self.table, lambda _via: 1, str(world.root), {})
        self.place = PersonaCgroup("s-1", PersonaRef("Analyst", 1), world.cgroup("Analyst"), UID)
        self.persona = Persona("Analyst", Whitelist(()), network_access=(parse_rule("any:tcp/443"),))
        self.wanted = {self.place: self.persona}
        plans.apply(self.network.reconcile(self.wanted))

    def run(self, seconds: float) -> None:
        """The loop, for so long."""
        self.loop.call_later(seconds, self.loop.stop)
        self.loop.run()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with netns.world("pwat") as found:
        found.start("serve", "443", "53", FAR4, FAR6, OTHER4, where="far")
        yield found


@pytest.fixture
def parts(world: World) -> Iterator[Parts]:
    found = Parts(world)
    yield found
    found.table.rebuild({})
    found.table.close()


@pytest.fixture
def heard(world: World, parts: Parts) -> Iterator[list[Refusal]]:
    """What is told of refused connections."""
    found: list[Refusal] = []
    refusals = world.in_near(lambda: Refusals(parts.loop, found.append))
    yield found
    refusals.close()


@here
@pytest.mark.root
def test_a_refused_connection_is_told_once_with_its_target(world: World, parts: Parts, heard: list[Refusal]) -> None:
    tries = [
        ("tcp", FAR4, 22),
        ("tcp", FAR4, 22),
        ("tcp", FAR6, 22),
        ("udp", FAR4, 9),
        ("ping", FAR4, 0),
        ("tcp", FAR4, 443),
    ]
    world.attempt(tries, cgroup=parts.place.cgroup, uid=UID)
    server = world.start("serve", "7070", cgroup=parts.place.cgroup, uid=UID)
    world.attempt([("tcp", NEAR4, 7070)], where="far")
    server.kill()
    parts.run(0.5)
    assert [(refusal.persona, refusal.target) for refusal in heard] == [
        ("Analyst", f"{FAR4}:tcp/22"),
        ("Analyst", f"{FAR6}:tcp/22"),
        ("Analyst", f"{FAR4}:udp/9"),
        ("Analyst", f"{FAR4} icmp"),
        ("Analyst", f"in:{FAR4}:tcp/7070"),
    ]
    assert {refusal.uid for refusal in heard[:4]} == {UID}


@here
@pytest.mark.root
def test_a_flood_of_refusals_is_bounded(world: World, parts: Parts, heard: list[Refusal]) -> None:
    world.attempt([("tcp", FAR4, port) for port in range(1000, 1400)], cgroup=parts.place.cgroup)
    parts.run(0.5)
    assert 50 <= len(heard) <= 150
    assert sum(parts.table.refused().values()) == 400


@here
@pytest.mark.root
@pytest.mark.parametrize(
    "by",
    [
        ("flush", "ruleset"),
        ("delete", "table", "inet", "persona"),
        ("flush", "chain", "inet", "persona", "output"),
        ("insert", "rule", "inet", "persona", "output", "accept"),
    ],
)
def test_what_others_change_is_put_right_at_once(world: World, parts: Parts, by: tuple[str, ...]) -> None:
    tries = [("tcp", FAR4, 443), ("tcp", FAR4, 53)]
    repaired: list[float] = []

    def repair() -> None:
        parts.table.disturbed = True
        plans.apply(parts.network.reconcile(parts.wanted))
        repaired.append(time.monotonic())

    world.in_near(lambda: Meddling(parts.loop, parts.table.port, repair))
    plans.apply(parts.network.enter(parts.place, parts.persona))
    parts.run(0.1)
    assert repaired == []  # of our own changes nothing is made
    world.near_run("nft", *by)
    assert world.attempt(tries, cgroup=parts.place.cgroup) == ["ok", "ok"]
    began = time.monotonic()
    parts.run(0.3)
    assert len(repaired) == 1
    assert repaired[0] - began < 0.2
    assert world.attempt(tries, cgroup=parts.place.cgroup) == ["ok", "ECONNREFUSED"]


@here
@pytest.mark.root
def test_name_service_follows_the_machines_configuration(world: World, parts: Parts, tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    follows = Resolvers(parts.table, [str(file)])
    plans.apply(
        parts.network.enter(parts.place, Persona("Analyst", Whitelist(()), network_access=(parse_rule("dns"),)))
    )
    tries = [("dns", FAR4, 0), ("dns", OTHER4, 0)]
    follows.refresh()
    assert world.attempt(tries, cgroup=parts.place.cgroup) == ["EPERM", "EPERM"]
    for address, outcome in ((FAR4, ["ok", "EPERM"]), (OTHER4, ["EPERM", "ok"])):
        file.write_text(f"search example.org\nnameserver {address}\n")
        follows.refresh()
        assert world.attempt(tries, cgroup=parts.place.cgroup) == outcome
    plans.apply(parts.network.reconcile(parts.wanted))
    parts.table.rebuild(parts.table.bound)  # a new table has them too
    plans.apply(
        parts.network.enter(parts.place, Persona("Analyst", Whitelist(()), network_access=(parse_rule("dns"),)))
    )
    assert world.attempt(tries, cgroup=parts.place.cgroup) == ["EPERM", "ok"]


def test_what_resolv_conf_says() -> None:
    text = "# nameserver 192.0.2.9\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\nnameserver\nnameserver x\n"
    assert set(resolvers(text)) == {"192.0.2.1", "fe80::1", *STUBS}


def test_what_a_packet_was_about() -> None:
    v4 = bytes.fromhex("450000280001000040060000c0000201c0000202") + bytes.fromhex("9c4001bb")
    assert target(3, v4) == "192.0.2.2:tcp/443"
    assert target(1, v4) == "in:192.0.2.1:tcp/443"
    v6 = bytes.fromhex("6000000000083a40") + bytes(15) + b"\1" + bytes(15) + b"\2" + b"\x80\0\0\0"
    assert target(3, v6) == "::2 icmp"
    for torn in (b"", b"\x45", v4[:19], v6[:39], b"\0" * 40):
        assert target(3, torn) == "?"
    assert target(3, v4[:21]) == "192.0.2.2 protocol 6"


def test_refusals_that_the_kernel_dropped_are_told_once_in_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def overrun(_netlink: object) -> Iterator[nflog.Packet]:
        raise OSError(errno.ENOBUFS, "No buffer space available")

    monkeypatch.setattr(nflog, "bind", lambda *_: None)
    monkeypatch.setattr(nflog, "packets", overrun)  # a fake: to overrun the real one takes a flood
    now = 100.0
    loop = Loop()
    refusals = Refusals(loop, lambda _refusal: None, lambda: now)
    for seconds in (0, 1, 1, 10):
        now += seconds
        refusals._ready()
    refusals.close()
    assert [record.message for record in caplog.records] == [
        "refused connections come faster than they can be read: some are not recorded"
    ] * 2
