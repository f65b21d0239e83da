"""While there is no agent: nothing is stopped in complain mode, nothing starts and nothing hangs in enforce mode."""

import contextlib
import re
import time
from collections.abc import Iterator

import pytest

from tests.guest_vm.login import Session
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker, await_connected, configure

IDENT = re.compile(r"s-[0-9a-f]{16}")


def ident(session: Session) -> str:
    found = IDENT.search(session.ask("persona status --json"))
    assert found is not None
    return found[0]


def kill_standby(guest: Machine) -> None:
    guest.must("systemctl kill -s KILL persona-standby")


@contextlib.contextmanager
def no_agent(guest: Machine) -> Iterator[None]:
    guest.must("systemctl stop persona-agent")
    try:
        yield
    finally:
        guest.must("systemctl start persona-agent")
        await_connected(guest)


@contextlib.contextmanager
def broken_settings(guest: Machine) -> Iterator[None]:
    """An agent that ends as soon as it starts, again and again."""
    guest.must("cp /etc/persona/guest.toml /root/; echo 'nonsense = 1' >/etc/persona/guest.toml")
    guest.root("systemctl restart persona-agent")
    try:
        yield
    finally:
        guest.must("cp /root/guest.toml /etc/persona/; systemctl restart persona-agent")
        await_connected(guest)


def test_enforce_stopped_nothing_starts_and_nothing_hangs_and_the_sessions_go_on(guest: Machine) -> None:
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(guest.session("alice")) for _ in range(5)]
        before = [ident(session) for session in sessions]
        with no_agent(guest):
            for session in sessions:
                text = session.ask("ls -d /etc; nmap --version", timeout=60)
                assert text.count("agent_stopping") == 2, text
                assert "/etc\n" not in text
            for _ in range(3):
                kill_standby(guest)
                started = time.monotonic()
                text = sessions[0].ask("ls -d /etc; nmap --version", timeout=60)
                assert "/etc\n" not in text
                assert "Nmap version" not in text
                assert time.monotonic() - started < 40
            refused = guest.ssh("alice", "true", timeout=60)
            assert refused.code == 255
            assert "persona-agent" in refused.err
            assert guest.ssh("root", "echo in").out == "in\n"
            assert guest.root("systemctl stop persona-standby").code != 0  # it would drop what it keeps
        assert [session.ask("ls -d /etc") for session in sessions] == ["/etc\n"] * 5
        assert [ident(session) for session in sessions] == before
        assert "denied" in sessions[0].ask("nmap --version")


def test_complain_stopped_nothing_is_stopped_and_the_sessions_go_on(guest: Machine, broker: Broker) -> None:
    configure(guest, broker, mode="complain")
    try:
        with guest.session("alice") as session, guest.session("bob") as bob:
            before = ident(session)
            with no_agent(guest):
                for _ in range(2):
                    assert "Nmap version" in session.ask("nmap --version | head -n 3")
                    assert bob.ask("ls -d /etc") == "/etc\n"
                    assert session.ask("for i in $(seq 200); do /usr/bin/true || echo BAD; done; echo done") == "done\n"
                    kill_standby(guest)
                assert guest.ssh("alice", "ls -d /etc", timeout=60).out == "/etc\n"
                with guest.session("alice") as another:  # ungated: there is no agent to gate it
                    assert "Nmap version" in another.ask("nmap --version | head -n 3")
            assert ident(session) == before
            assert "Nmap version" in session.ask("nmap --version | head -n 3")
    finally:
        configure(guest, broker)


def test_an_agent_that_cannot_start_is_no_agent(guest: Machine, broker: Broker) -> None:
    with guest.session("alice") as session:
        before = ident(session)
        with broken_settings(guest):
            text = session.ask("ls -d /etc", timeout=60)
            assert "agent_stopping" in text
        assert session.ask("ls -d /etc") == "/etc\n"
        assert ident(session) == before
    configure(guest, broker, mode="complain")
    try:
        with guest.session("alice") as session:
            assert session.ask("ls -d /etc") == "/etc\n"
            with broken_settings(guest):
                assert session.ask("ls -d /etc", timeout=30) == "/etc\n"
                assert guest.ssh("alice", "ls -d /etc", timeout=60).out == "/etc\n"
            assert session.ask("ls -d /etc") == "/etc\n"
    finally:
        configure(guest, broker)


def test_starts_in_flight_when_the_agent_stops_are_answered(guest: Machine, broker: Broker) -> None:
    with guest.session("alice") as session:
        assert session.ask("ls -d /etc") == "/etc\n"
        for _ in range(2):
            session.write("for i in $(seq 100); do ls -d /etc || echo refused; done 2>/dev/null | sort | uniq -c")
            time.sleep(0.5)
            with no_agent(guest):
                counts = re.findall(r"(\d+) (/etc|refused)", session.read(timeout=90))
            assert sum(int(count) for count, _ in counts) == 100
            assert {what for _, what in counts} >= {"refused"}


def test_removal_while_the_agent_is_stopped_cuts_nobody_off(guest: Machine, broker: Broker) -> None:
    """Its sessions cannot be released by an agent that is not there; the standby does."""
    with guest.session("alice") as session:
        assert session.ask("ls -d /etc") == "/etc\n"
        guest.must("systemctl stop persona-agent; DEBIAN_FRONTEND=noninteractive apt-get remove -y -q persona-guest",
                   timeout=300)  # fmt: skip
        assert "Nmap version" in session.ask("nmap --version | head -n 3", timeout=60)
    guest.must("loginctl terminate-user alice || true")  # or its user manager stays for a while
    gone = "for i in $(seq 20); do pgrep -f '[p]ersona-standby' >/dev/null || exit 0; sleep 1; done; exit 1"
    assert guest.root(gone, timeout=60).code == 0
    guest.thaw()
    configure(guest, broker)


@contextlib.contextmanager
def slow_start(guest: Machine) -> Iterator[None]:
    """The agent's next start takes longer than anybody waits for one that is not heard of; then it is fast again."""
    starting = "/run/persona/state/starting"
    quota = "systemctl set-property --runtime persona-agent.service CPUQuota"
    guest.must(f"{quota}=20%")
    guest.must(
        f"systemd-run -q --collect sh -c 'until test -e {starting}; do sleep 0.5; done;"
        f" while test -e {starting}; do sleep 0.5; done; {quota}='"
    )
    try:
        yield
    finally:
        guest.must("systemctl set-property --runtime persona-agent.service CPUQuota=")
        await_connected(guest)


@pytest.mark.soak  # it depends on the emulated speed; tests/guest/test_standby_starts.py has the rule itself
def test_a_start_that_takes_long_refuses_nothing_that_is_allowed(guest: Machine) -> None:
    with guest.session("alice") as session, contextlib.ExitStack() as stack:
        assert session.ask("ls -d /etc") == "/etc\n"
        stack.enter_context(slow_start(guest))
        guest.must("systemctl kill -s KILL persona-agent")
        started = time.monotonic()
        session.write("ls -d /etc; nmap --version")
        time.sleep(10)  # by now it has said that it starts
        assert guest.ssh("alice", "ls -d /etc", timeout=120).out == "/etc\n"
        text = session.read(timeout=120)
        took = time.monotonic() - started
        print(f"a start of {took:.0f} s")
        assert "agent_stopping" not in text
        assert text.startswith("/etc\n")
        assert took > 16  # else this shows nothing
