"""Installation, upgrade, removal and purge leave PAM working at every step, with sessions open."""

import time

from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker, configure, install


def test_upgrade_with_a_session_open(guest: Machine) -> None:
    with guest.session("alice") as session:
        assert session.ask("ls -d /etc") == "/etc\n"
        guest.must("dpkg -i /root/debs/persona-guest_*.deb", timeout=300)
        assert session.ask("ls -d /etc") == "/etc\n"
        assert "denied" in session.ask("nmap --version")


def test_a_failed_configuration_locks_nobody_out(guest: Machine) -> None:
    guest.must("mv /usr/sbin/pam-auth-update /usr/sbin/pam-auth-update.away")
    try:
        assert guest.root("dpkg -i /root/debs/persona-guest_*.deb", timeout=300).code != 0
        assert "half-configured" in guest.root("dpkg -s persona-guest").out
        assert guest.ssh("root", "echo in").out == "in\n"
        assert guest.ssh("alice", "ls -d /etc").out == "/etc\n"
        assert guest.ssh("alice", "nmap --version").code == 126
    finally:
        guest.must("mv /usr/sbin/pam-auth-update.away /usr/sbin/pam-auth-update; dpkg --configure -a", timeout=300)


def test_removal_inside_a_session_purge_and_installation_anew(guest: Machine, broker: Broker) -> None:
    with guest.session("alice") as session:
        assert "denied" in session.ask("nmap --version")
        guest.must("DEBIAN_FRONTEND=noninteractive apt-get remove -y -q persona-guest", timeout=300)
        try:
            assert "pam_persona" not in guest.must("cat /etc/pam.d/common-*")
            # the session that was open goes on, ungated now: nobody is cut off
            assert "Nmap version" in session.ask("nmap --version")
            assert guest.ssh("bob", "echo in").out == "in\n"
        finally:
            session.ask("true")
    time.sleep(3)
    guest.must("DEBIAN_FRONTEND=noninteractive apt-get purge -y -q persona-guest", timeout=300)
    ours = (
        "/sys/fs/bpf/persona /usr/lib/persona /var/lib/persona /etc/persona/guest.toml /lib/*/security/pam_persona.so"
    )
    left = guest.must(f"ls -d {ours} 2>/dev/null || true")
    assert left == ""
    names = "-name login -o -name DataAnalyst -o -name 'persona*'"
    assert guest.must(f"find /sys/fs/cgroup/user.slice -type d {names}") == ""
    assert guest.ssh("alice", "echo in").out == "in\n"
    install(guest)
    try:
        # a fresh installation complains: it stops nothing, with no broker at all
        assert guest.ssh("alice", "nmap --version | head -n 1").code == 0
    finally:
        configure(guest, broker)
    assert guest.ssh("alice", "nmap --version").code == 126
