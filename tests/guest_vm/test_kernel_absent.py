"""A kernel that was not told of BPF among its security modules, as Ubuntu's is: the fallback, and called that."""

import http.client
import json
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest_vm.bound import DOCUMENTS
from tests.guest_vm.conftest import Compiler
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker, await_connected, configure, site, status

OPTIONS = "lsm=landlock,lockdown,yama,apparmor"

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Broker]]:
    """A guest of its own, booted so."""
    with site(tmp_path_factory.mktemp("absent"), OPTIONS) as (machine, broker):
        broker.documents(*DOCUMENTS)
        machine.must("cp /usr/bin/touch /usr/local/bin/forbidden")
        yield machine, broker


def metrics(broker: Broker) -> str:
    context = ssl.create_default_context(cafile=str(broker.directory / "ca.pem"))
    connection = http.client.HTTPSConnection("127.0.0.1", broker.port, timeout=10, context=context)
    connection.request("GET", "/metrics")
    return connection.getresponse().read().decode()


def test_it_is_shown_as_what_it_is(plain: tuple[Machine, Broker]) -> None:
    machine, broker = plain
    assert "bpf" not in machine.must("cat /sys/kernel/security/lsm")
    assert machine.must("systemctl show -p Result persona-kernel") == "Result=success\n"
    found = json.loads(machine.must("persona status --json"))
    assert found["layers"]["bpf"] is False
    assert "bpf" in found["kernel"]["why_not"]
    assert "not active: bpf" in machine.ssh("alice", "persona status").out
    assert "no kernel layer" in machine.must("journalctl -u persona-agent --no-pager")
    assert "bpf is not among the kernel's security modules" in machine.must("journalctl -u persona-kernel --no-pager")
    assert 'persona_broker_vm_layer_active{vm="analytics-1",layer="bpf"} 0\n' in metrics(broker)


def test_commands_are_gated_all_the_same(plain: tuple[Machine, Broker]) -> None:
    machine, _ = plain
    assert machine.ssh("alice", "ls -d /etc").out == "/etc\n"
    assert machine.ssh("alice", "nmap --version").code == 126
    own = "import ctypes; l = ctypes.CDLL(None, use_errno=True); print(l.syscall(317, 1, 8, 0), ctypes.get_errno())"
    assert machine.ssh("alice", f"python3 -c '{own}'").out == "-1 16\n"  # no listener of one's own: EBUSY


def test_who_demands_the_layer_gets_no_session(plain: tuple[Machine, Broker]) -> None:
    machine, broker = plain
    configure(machine, broker, extra="[gate]\nrequire_kernel_layer = true\n")
    try:
        refused = machine.ssh("alice", "true")
        assert refused.code == 255
        assert "kernel_layer_missing" in refused.err
        assert machine.ssh("root", "echo in").out == "in\n"
    finally:
        configure(machine, broker)


LANDLOCK = """[gate]
landlock_execute = ["/usr/bin", "/usr/sbin", "/usr/lib", "/bin", "/sbin", "/lib", "/lib64", "/usr/local/bin/race"]
"""


def wrong_starts(machine: Machine) -> int:
    """How many races for a program that nobody allows were won meanwhile, and killed."""
    machine.must("systemctl restart persona-agent")
    await_connected(machine)
    machine.must("rm -rf /tmp/race; mkdir -m 777 /tmp/race")
    done = machine.ssh("carol", "race shared path 20000 15 /tmp/race 2>/dev/null", timeout=75)
    assert done.code == 0, done.text
    assert int(done.out) > 50
    time.sleep(3)
    return int(status(machine)["verified"]["wrong"])


def test_landlock_bounds_what_can_be_raced_for(plain: tuple[Machine, Broker], static_c: Compiler) -> None:
    machine, broker = plain
    source = (Path(__file__).parent / "programs" / "race.c").read_text()
    machine.put(static_c.compile("race", source), to="/usr/local/bin/race")
    machine.must("chmod 755 /usr/local/bin/race; cp /usr/bin/true /usr/local/bin/elsewhere; sleep 2")
    elsewhere = "elsewhere && echo ran"
    assert machine.ssh("carol", elsewhere).out == "ran\n"
    assert wrong_starts(machine) > 0, "or it would say nothing that none is won below"
    configure(machine, broker, extra=LANDLOCK)
    try:
        assert wrong_starts(machine) == 0
        assert machine.must("ls /tmp/race") == ""
        refused = machine.ssh("carol", elsewhere)
        assert "Permission denied" in refused.err
        assert "ran" not in refused.out
        assert machine.ssh("carol", "mkdir -p one two; touch one/f && mv one/f two/ && ls two").out == "f\n"
        assert "layers:    seccomp, verify, limits, network, landlock" in machine.ssh("alice", "persona status").out
        assert 'persona_broker_vm_layer_active{vm="analytics-1",layer="landlock"} 1\n' in metrics(broker)
        assert "ran" not in machine.must(f"su - carol -c '{elsewhere}' 2>&1 || true")
        assert "ran" in machine.must(f"sh -c '{elsewhere}'")  # root's own login is nobody's to bound
        configure(machine, broker, mode="complain", extra=LANDLOCK)
        assert machine.ssh("carol", elsewhere).out == "ran\n"
    finally:
        configure(machine, broker)


@pytest.fixture
def no_nftables(plain: tuple[Machine, Broker]) -> Iterator[tuple[Machine, Broker]]:
    """The same kernel without nf_tables."""
    machine, broker = plain
    machine.must(
        "systemctl stop persona-agent; nft delete table inet persona || true;"
        "printf 'install nf_tables /bin/false\\ninstall nfnetlink /bin/false\\n' > /etc/modprobe.d/none.conf;"
        "for try in 1 2 3 4 5; do for module in $(lsmod | awk '/^nf/ {print $1}'); do rmmod $module 2>/dev/null; done;"
        " done; ! lsmod | grep -E '^(nf_tables|nfnetlink) '"
    )
    try:
        yield plain
    finally:
        machine.must("rm /etc/modprobe.d/none.conf")
        configure(machine, broker)


def test_without_nftables_complain_mode_stops_nothing_and_enforce_mode_everything(
    no_nftables: tuple[Machine, Broker],
) -> None:
    machine, broker = no_nftables
    configure(machine, broker, mode="complain")
    assert "Nmap version" in machine.ssh("alice", "nmap --version").out
    assert "no nftables" in machine.must("journalctl -u persona-agent --no-pager")
    machine.root("sed -i s/complain/enforce/ /etc/persona/guest.toml; systemctl restart persona-agent")
    refused = machine.ssh("alice", "ls -d /etc", timeout=180)  # as long as a start of the agent may take, and a bit
    assert refused.code != 0
    assert "/etc\n" not in refused.out
    assert machine.ssh("root", "echo in").out == "in\n"
