"""The VM's health decides: a full disk, errors, failed units, a wrong clock, and silence."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guest_vm.bound import DOCUMENTS
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import VM, Broker, await_connected

ASKING = """
kind: Persona
name: Healthy
command_whitelist: [ls, logger, "systemctl is-system-running"]
---
kind: Policy
name: while-healthy
subjects: {users: [alice]}
persona: Healthy
when:
  vm_health:
    disk_free_above: 20%
    memory_available_above: 64MiB
    failed_units_below: 1
    errors_below: 30
    clock_skew_below: 10s
    layers: [seccomp]
---
kind: Persona
name: Asker
command_whitelist: [persona]
---
kind: Policy
name: always
subjects: {users: [alice]}
persona: Asker
"""


@pytest.fixture
def asking(guest: Machine, broker: Broker, tmp_path: Path) -> Iterator[None]:
    """alice's persona asks that the VM is healthy, which it is, with a small disk of its own mounted."""
    (tmp_path / "asking.yaml").write_text(ASKING)
    guest.must("systemctl reset-failed; journalctl --rotate -q; mkdir -p /mnt/small")
    guest.must(
        "truncate -s 64M /var/tmp/small && mkfs.ext4 -q -F /var/tmp/small && mount -o loop /var/tmp/small /mnt/small"
    )
    broker.documents(tmp_path / "asking.yaml")
    try:
        until(lambda: guest.ssh("alice", "ls -d /etc").out == "/etc\n", 90)
        yield
    finally:
        guest.root("umount /mnt/small; rm -f /var/tmp/small")
        broker.documents(*DOCUMENTS)


def until(holds: Callable[[], bool], seconds: float) -> float:
    """How long it took.  Raises ``TimeoutError``."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.3)
    return time.monotonic() - began


@pytest.mark.usefixtures("asking")
def test_a_full_disk_denies_in_a_session_that_is_open_and_a_freed_one_allows(guest: Machine, broker: Broker) -> None:
    with guest.session("alice") as session:
        assert session.ask("ls -d /etc") == "/etc\n"
        guest.must("dd if=/dev/zero of=/mnt/small/full bs=1M count=55 status=none; sync")
        took = until(lambda: "denied, vm_unhealthy" in session.ask("ls -d /etc"), 30)
        line = session.ask("ls -d /etc")
        assert "/mnt/small has" in line and "the policy holds above 20 %, again above 22 %" in line
        assert "under persona Healthy, policy while-healthy (" in line
        assert "would be denied, vm_unhealthy" in session.ask("persona explain ls")
        assert "Healthy v1, policy while-healthy: not now, vm_unhealthy" in session.ask("persona list")
        assert "! the VM is not healthy: /mnt/small has" in broker.run("health", check=False)
        guest.must("rm /mnt/small/full; sync")
        back = until(lambda: session.ask("ls -d /etc") == "/etc\n", 30)
    print(f"full to denied {took:.1f} s, freed to allowed {back:.1f} s")


@pytest.mark.usefixtures("asking")
def test_errors_of_the_machine_deny_and_those_of_a_user_do_not(guest: Machine) -> None:
    with guest.session("alice") as session:
        session.ask("for i in $(seq 50); do logger -p user.err mine; done", timeout=120)
        time.sleep(12)
        assert session.ask("ls -d /etc") == "/etc\n"
        guest.must("for i in $(seq 50); do logger -p daemon.err broken; done")
        until(lambda: "errors a minute" in session.ask("ls -d /etc"), 30)
        until(lambda: session.ask("ls -d /etc") == "/etc\n", 100)  # the minute passes


@pytest.mark.usefixtures("asking")
def test_a_unit_that_failed_denies(guest: Machine) -> None:
    guest.root("systemd-run --unit=broken -q --wait false")
    until(lambda: "1 units failed (broken.service)" in guest.ssh("alice", "ls -d /etc").err, 30)
    guest.must("systemctl reset-failed broken")
    until(lambda: guest.ssh("alice", "ls -d /etc").out == "/etc\n", 30)


@pytest.mark.usefixtures("asking")
def test_a_user_who_kills_his_service_manager_makes_nothing_unhealthy(guest: Machine) -> None:
    with guest.session("alice") as session:
        unit = f"user@{session.ask('echo $UID').strip()}.service"
        processes = f"/sys/fs/cgroup/user.slice/user-$UID.slice/{unit}/init.scope/cgroup.procs"
        session.ask(f"for pid in $(<{processes}); do kill -9 $pid; done")  # nothing but bash itself
        try:
            until(lambda: guest.root(f"systemctl is-failed {unit}").out == "failed\n", 30)
            time.sleep(12)  # two looks
            assert session.ask("ls -d /etc") == "/etc\n"
        finally:
            guest.root(f"systemctl reset-failed {unit}")


@pytest.mark.usefixtures("asking")
def test_a_wrong_clock_denies(guest: Machine) -> None:
    guest.must("date -u -s @$(($(date +%s) + 40)) >/dev/null")
    try:
        until(lambda: "ahead, the policy holds below 10 s" in guest.ssh("alice", "ls -d /etc").err, 40)
    finally:
        guest.must(f"date -u -s @{time.time():.0f} >/dev/null")
    until(lambda: guest.ssh("alice", "ls -d /etc").out == "/etc\n", 40)


@pytest.mark.usefixtures("asking")
def test_a_silent_agent_makes_an_unhealthy_vm(guest: Machine, broker: Broker) -> None:
    def decision() -> dict[str, str]:
        words = ("explain", "--json", "--user", "alice", "--vm", VM, "--", "ls")
        found: dict[str, str] = json.loads(broker.run(*words, check=False))["decision"]
        return found

    assert decision()["decision"] == "granted"
    guest.must("systemctl stop persona-agent")
    try:
        took = until(lambda: decision()["decision"] == "denied", 70)
        assert took > 25  # not at the first report that is missing
        assert decision()["reason"] == "vm_unhealthy"
        assert "last reported more than 45 s ago" in decision()["help"]
    finally:
        guest.must("systemctl start persona-agent")
        await_connected(guest)
    until(lambda: guest.ssh("alice", "ls -d /etc").out == "/etc\n", 30)
