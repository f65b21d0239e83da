"""The broker's package, by the README's steps: a site on one machine."""

import subprocess
from pathlib import Path

from tests.guest_vm.machine import Machine
from tests.guest_vm.site import ROOT, VM, await_connected

GUEST_TOML = f"""
mode = "enforce"
[vm]
name = "{VM}"
[broker]
url = "https://localhost:8443"
events_url = "https://localhost:8444"
"""


def test_the_steps_of_the_readme_lead_to_a_gated_login(guest: Machine, tmp_path: Path) -> None:
    subprocess.run(["tar", "-cf", tmp_path / "x.tar", "-C", ROOT, "examples"], check=True, timeout=60)
    guest.put(*(ROOT / "build" / "debs").glob("persona-broker_*.deb"), tmp_path / "x.tar", to="/root/")
    guest.must("tar -xf x.tar && rm -f /etc/persona/ca.pem /etc/persona/token")  # of the broker on the host
    guest.must("DEBIAN_FRONTEND=noninteractive apt-get install -y -q ./persona-broker_*.deb", timeout=600)
    guest.must("persona-broker tls init --host localhost")
    guest.must("systemctl enable --now persona-broker")
    guest.must("persona-broker apply examples")
    guest.must(f"persona-broker guest add {VM} --token-file /etc/persona/token")
    guest.must("install -m 600 /dev/stdin /etc/persona/guest.toml", stdin=GUEST_TOML)
    assert "note:" not in guest.must("persona-agent check-config")
    guest.must("systemctl restart persona-agent")
    await_connected(guest)
    assert guest.ssh("alice", "ls -d /etc").out == "/etc\n"
    assert "no_matching_policy" in guest.ssh("alice", "nmap --version").err
    assert guest.must("systemctl is-enabled persona-broker") == "enabled\n"
    # what root wrote is the service's own too, or it could not write on
    assert guest.must("find /var/lib/persona-broker -printf '%u\\n' | sort -u") == "persona-broker\n"
    assert guest.must("stat -c %a /var/lib/persona-broker/audit.key") == "600\n"
    assert "ls" in guest.must("persona-broker records tail -n 50")
    guest.must("systemctl restart persona-broker")
    await_connected(guest)
    assert guest.ssh("alice", "ls -d /etc").out == "/etc\n"
