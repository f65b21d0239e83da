"""Two versions at once in a real guest: packages of 0.1.0 and this version's broker, the upgrade, and the reverse."""

from pathlib import Path

import pytest

from tests import releases
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import ROOT, Broker, configure, install


def works(guest: Machine) -> None:
    """A login is gated, and what its persona allows starts."""
    assert guest.ssh("alice", "ls -d /etc").out == "/etc\n"
    assert guest.ssh("alice", "nmap --version").code == 126
    assert guest.ssh("bob", "true").code != 0


@pytest.mark.soak  # three installations; tests/test_two_versions.py has the conversations themselves
def test_0_1_0_with_this_broker_then_upgraded_then_with_the_broker_of_0_1_0(
    guest: Machine, broker: Broker, tmp_path: Path
) -> None:
    install(guest, releases.build_debs(ROOT / "build" / "debs-0.1.0"), "/root/debs-0.1.0")
    configure(guest, broker)
    assert "0.1.0" in guest.must("dpkg-query -W persona-guest")
    works(guest)
    with guest.session("alice") as session:
        assert session.ask("ls -d /etc") == "/etc\n"
        install(guest)
        assert "0.2.0" in guest.must("dpkg-query -W persona-guest")
        assert session.ask("ls -d /etc") == "/etc\n"
        assert "denied" in session.ask("nmap --version")
    works(guest)
    before = Broker(tmp_path / "broker", releases.unpack(tmp_path))
    before.run("apply", str(tmp_path / "persona-0.1.0" / "examples"))
    before.load(30)
    before.start()
    try:
        configure(guest, before)
        works(guest)
        lines = before.run("records", "tail", "--json").splitlines()
        assert any('"program": "/usr/bin/ls"' in line for line in lines)
    finally:
        before.stop()
        configure(guest, broker)
