"""What of the network's stays without an agent and goes with its sessions, and what of others' is left alone."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest_vm.bound import DOCUMENTS, USER, apply, bound, persona, policy
from tests.guest_vm.far import FAR4, FAR6, OTHER4, attempt, background, begin
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker, await_connected, configure

REFUSED = "ECONNREFUSED"
HELPERS = Path(__file__).parent / "helpers"
NEIGHBOURS = Path(__file__).parents[1] / "guest" / "neighbours.nft"


@pytest.fixture(autouse=True)
def _world(guest: Machine) -> None:
    begin(guest, USER)


def table_of(guest: Machine) -> str:
    return guest.root("nft list table inet persona").out


def test_firewalls_and_container_engines_beside_us_are_left_alone(guest: Machine, broker: Broker) -> None:
    guest.must("nft -f -", stdin=NEIGHBOURS.read_text())
    names = "ip filter", "ip nat", "inet firewalld"
    listing = "; ".join(f"nft list table {name}" for name in names)
    before = guest.must(listing)
    try:
        with bound(broker, {}, network_access=["any:tcp/443,5432"]):
            found = attempt(guest, USER, [("tcp", FAR4, 443), ("tcp", FAR4, 5432), ("tcp", FAR4, 22)])
            assert found == ["ok", "EHOSTUNREACH", REFUSED]  # what another table refuses stays refused
        assert guest.must(listing) == before
    finally:
        guest.must("; ".join(f"nft delete table {name}" for name in names))


@pytest.fixture
def ufw(guest: Machine) -> Iterator[str]:
    """ufw, switched on, and Docker's rules; a command that lists what both of them loaded."""
    guest.must("DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends ufw", timeout=600)
    guest.must(f"ufw allow 22/tcp && ufw reject out proto tcp to {FAR4} port 5432 && ufw --force enable")
    guest.must("iptables-restore --noflush", stdin=(HELPERS / "docker.rules").read_text())
    try:
        yield "; ".join(f"nft -s list table {name}" for name in ("ip filter", "ip6 filter", "ip nat"))
    finally:
        guest.must("ufw --force disable; for f in 'ip filter' 'ip6 filter' 'ip nat'; do nft delete table $f; done")


def test_ufw_and_docker_s_rules_go_on_beside_us(guest: Machine, broker: Broker, ufw: str) -> None:
    before = guest.must(ufw)
    assert "ufw-user-output" in before
    assert "DOCKER-USER" in before
    tried = [("tcp", FAR4, 443), ("tcp", FAR4, 5432), ("tcp", OTHER4, 5432), ("tcp", FAR4, 22), ("tcp", FAR6, 443)]
    expected = ["ok", REFUSED, "ok", REFUSED, "ok"]  # the second is ufw's
    with bound(broker, {}, network_access=["any:tcp/443,5432"]):
        assert attempt(guest, USER, tried) == expected
        guest.must("ufw reload")
        assert attempt(guest, USER, tried) == expected
        guest.must("systemctl restart persona-agent")
        await_connected(guest)
        assert attempt(guest, USER, tried) == expected
    assert sorted(guest.must(ufw).splitlines()) == sorted(before.splitlines())  # a reload puts its chains last
    assert "Status: active" in guest.must("ufw status")


def test_a_flushed_ruleset_is_back_at_once(guest: Machine, broker: Broker) -> None:
    with bound(broker, {}, network_access=["any:tcp/443"]), guest.session(USER) as session:
        session.ask("true")
        guest.must("nft flush ruleset; sleep 1; nft list table inet persona >/dev/null")
        assert attempt(guest, USER, [("tcp", FAR4, 443), ("tcp", FAR4, 22)]) == ["ok", REFUSED]


# Tries what is refused, again and again, until it is told to stop; prints each time that it was let through.
LEAKS = f"""
import os, socket
while not os.path.exists("stop"):
    try:
        socket.create_connection(("{FAR4}", 22), 2)
        print("through", flush=True)
    except ConnectionRefusedError:
        pass
"""


def test_without_an_agent_the_rules_stay_and_with_the_next_go_on(guest: Machine, broker: Broker) -> None:
    with bound(broker, {}, network_access=["any:tcp/443"]), guest.session(USER) as session:
        session.ask(background(f"stream {FAR4} 443", "open"))
        session.ask(f"rm -f stop; python3 -c '{LEAKS}' >leaks 2>&1 &")
        for _ in range(3):
            guest.must("systemctl kill -s KILL persona-agent; sleep 1")
            await_connected(guest)
        time.sleep(2)
        session.ask("touch stop; sleep 1")
        assert session.ask("cat leaks") == ""
        assert session.ask("cat probe.out") == "open\n"  # and what may go on does
        session.ask("kill %1")


def test_nothing_is_left_of_ended_sessions(guest: Machine, broker: Broker) -> None:
    with bound(broker, {}, network_access=[f"any via {FAR4}", "in:any:tcp/1"]):
        assert attempt(guest, USER, [("tcp", OTHER4, 443)]) == ["ok"]
    guest.must(
        f"loginctl terminate-user {USER}; for i in $(seq 20); do pgrep -u {USER} >/dev/null || exit 0; sleep 1; done"
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and ("Bound" in table_of(guest) or "fwmark" in guest.must("ip rule; ip -6 rule")):
        time.sleep(1)
    assert "Bound" not in table_of(guest)
    assert "fwmark" not in guest.must("ip rule; ip -6 rule")
    assert guest.must("ip route show table 21001 2>/dev/null; true") == ""


def test_the_plan_can_be_seen(guest: Machine, broker: Broker) -> None:
    with bound(broker, {}, network_access=["any:tcp/443"]), guest.session(USER) as session:
        session.ask("true")
        assert json.loads(guest.must("persona-agent plan --json"))["plan"] == []
        guest.must(
            "systemctl kill -s STOP persona-agent; nft delete table inet persona; systemctl kill -s CONT persona-agent"
        )
        deadline = time.monotonic() + 20
        while "Bound" not in table_of(guest) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert json.loads(guest.must("persona-agent plan --json"))["plan"] == []


def test_removal_leaves_no_table_rule_or_route(guest: Machine, broker: Broker) -> None:
    """Last in this file: with an agent that is dead and its successor kept from coming."""
    apply(broker, persona("Bound", {}, network_access=[f"any via {FAR4}"]), policy("bound", "Bound"))
    with guest.session(USER) as session:
        session.ask("true")
        assert "Bound" in table_of(guest)
        assert "fwmark" in guest.must("ip rule")
        guest.must("systemctl mask --now persona-agent; rm -f /run/persona/agent.sock")
        assert "Bound" in table_of(guest)
        guest.must("DEBIAN_FRONTEND=noninteractive apt-get remove -y -q persona-guest")
        assert table_of(guest) == ""
        assert "fwmark" not in guest.must("ip rule; ip -6 rule")
        assert guest.must("ip route show table 21001 2>/dev/null; true") == ""
    broker.documents(*DOCUMENTS)
    guest.thaw()
    configure(guest, broker)
