"""A kernel that was not told of BPF among its security modules, as Ubuntu's is: the fallback, and called that."""

import http.client
import json
import ssl
from collections.abc import Iterator

import pytest

from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker, configure, site

OPTIONS = "lsm=landlock,lockdown,yama,apparmor"

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Broker]]:
    """A guest of its own, booted so."""
    with site(tmp_path_factory.mktemp("absent"), OPTIONS) as found:
        yield found


def metrics(broker: Broker) -> str:
    context = ssl.create_default_context(cafile=str(broker.directory / "ca.pem"))
    connection = http.client.HTTPSConnection("127.0.0.1", broker.port, timeout=10, context=context)
    connection.request("GET", "/metrics")
    return connection.getresponse().read().decode()


def test_it_is_shown_as_what_it_is(plain: tuple[Machine, Broker]) -> None:
    machine, broker = plain
    assert "bpf" not in machine.must("cat /sys/kernel/security/lsm")
    assert machine.must("systemctl show -p Result persona-kernel") == "Result=success\n"
    status = json.loads(machine.must("persona status --json"))
    assert status["layers"]["bpf"] is False
    assert "bpf" in status["kernel"]["why_not"]
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
