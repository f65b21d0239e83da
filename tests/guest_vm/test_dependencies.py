"""What a persona needs, in the real guest: looked for, installed by the worker where that is allowed, or denied."""

import concurrent.futures
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.debs import build_deb
from tests.guest_vm.bound import DOCUMENTS
from tests.guest_vm.login import Terminal
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker, configure
from tests.guest_vm.test_health import until

SOURCE = "/var/local/packages"
ALLOWED = '[dependencies]\ninstall = ["lab-*"]\nstart = ["lab-*"]\n'


def persona(user: str, name: str, *needs: str) -> str:
    return (
        f"kind: Persona\nname: {name}\ncommand_whitelist: [ls]\ndependencies: {list(needs)}\n---\n"
        f"kind: Policy\nname: {name.lower()}\nsubjects: {{users: [{user}]}}\npersona: {name}\n"
    )


INDEX = f"""
cd {SOURCE} && for file in *.deb; do
    dpkg-deb -f $file; printf 'Filename: ./%s\\nSize: %s\\nSHA256: %s\\n\\n' $file $(stat -c %s $file) \
        $(sha256sum $file | cut -d ' ' -f 1)
done > Packages
mkdir -p /root/sources-away && mv /etc/apt/sources.list /etc/apt/sources.list.d/* /root/sources-away/ 2>/dev/null
echo 'deb [trusted=yes] file:{SOURCE} ./' > /etc/apt/sources.list && apt-get update -q
"""


@pytest.fixture
def source(guest: Machine, broker: Broker, tmp_path: Path) -> Iterator[None]:
    """A package source of the guest's own, and alice and carol under personas that need things from it."""
    build_deb(tmp_path, "lab-tool", "2", depends="lab-helper", postinst="sleep 5")
    build_deb(tmp_path, "lab-helper")
    build_deb(tmp_path, "lab-broken", depends="lab-helper", postinst="echo sorry; exit 3")
    build_deb(tmp_path, "lab-huge", size=20 << 20)
    guest.must(f"rm -rf {SOURCE}; mkdir -p {SOURCE}")
    guest.put(*tmp_path.glob("*.deb"), to=SOURCE + "/")
    guest.must(INDEX)
    guest.must(": > /var/log/dpkg.log")
    guest.must(
        "printf '[Service]\\nExecStart=/bin/sleep infinity\\n' > /run/systemd/system/lab-service.service;"
        "printf '[Service]\\nExecStart=/bin/false\\n' > /run/systemd/system/lab-bad.service; systemctl daemon-reload"
    )
    yield
    guest.root("umount /opt; systemctl stop lab-service; systemctl reset-failed")
    guest.root("dpkg --purge lab-tool lab-broken lab-huge lab-helper")
    guest.must("mv /root/sources-away/* /etc/apt/ 2>/dev/null; true")
    broker.documents(*DOCUMENTS)
    configure(guest, broker)


def needing(broker: Broker, tmp_path: Path, *needs: str) -> None:
    """alice's and carol's only personas need this."""
    (tmp_path / "x.yaml").write_text(persona("alice", "Needy", *needs) + "---\n" + persona("carol", "Needy2", *needs))
    broker.documents(tmp_path / "x.yaml")


def audit(guest: Machine) -> str:
    return guest.must("dpkg --audit; dpkg -l 'lab-*' 2>/dev/null | grep -v '^[ui]n' | grep ' lab-' || true")


@pytest.mark.usefixtures("source")
def test_by_default_it_is_denied_with_what_an_operator_can_do(guest: Machine, broker: Broker, tmp_path: Path) -> None:
    needing(broker, tmp_path, "lab-tool (>= 2)", "service:lab-service")
    line = guest.ssh("alice", "ls -d /etc").err
    assert "ls: denied, dependency_missing under persona Needy, policy needy (" in line
    assert "lab-tool (>= 2) (not installed), service:lab-service (inactive)" in line
    assert "'apt-get install lab-tool' and 'systemctl start lab-service'" in line
    assert audit(guest) == ""
    guest.must("DEBIAN_FRONTEND=noninteractive apt-get install -y -q lab-tool && systemctl start lab-service")
    until(lambda: guest.ssh("alice", "ls -d /etc").out == "/etc\n", 20)
    guest.must("systemctl stop lab-service")
    until(lambda: "service:lab-service (inactive)" in guest.ssh("alice", "ls -d /etc").err, 60)
    guest.must("systemctl start lab-service; dpkg --purge lab-tool")
    until(lambda: "lab-tool (>= 2) (not installed)" in guest.ssh("alice", "ls -d /etc").err, 20)


@pytest.mark.usefixtures("source")
def test_it_is_installed_with_progress_once_for_all_who_wait(guest: Machine, broker: Broker, tmp_path: Path) -> None:
    configure(guest, broker, extra=ALLOWED)
    needing(broker, tmp_path, "lab-tool (>= 2)", "service:lab-service")
    assert audit(guest) == ""
    terminal = Terminal(guest.ssh_argv("alice", "-tt"))
    try:
        terminal.expect("$", 60)
        terminal.type("ls -d /etc && echo d''one\n")
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            others = [pool.submit(guest.ssh, user, "ls -d /etc", timeout=240) for user in ("alice", "carol") * 3]
            terminal.expect("persona: Needy needs lab-tool (>= 2) (not installed), service:lab-service", 60)
            terminal.expect("%", 120)  # apt's progress
            terminal.expect("done", 120)
            assert [other.result().out for other in others] == ["/etc\n"] * 6
    finally:
        terminal.close()
    log = guest.must("journalctl -u persona-installer --no-pager -o cat; grep -c ' install lab-tool' /var/log/dpkg.log")
    assert log.splitlines()[-1] == "1"
    assert guest.must("systemctl is-active lab-service") == "active\n"
    assert guest.must("dpkg --audit") == ""
    with guest.session("alice") as session:
        began = time.monotonic()
        assert session.ask("ls -d /etc") == "/etc\n"
        assert time.monotonic() - began < 5


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(
    ("needs", "why"),
    [
        ("lab-broken", "lab-broken package post-installation script subprocess returned error exit status 3"),
        ("lab-tool (>= 9)", "Depends: lab-tool (>= 9)"),
        ("lab-none", "Depends: lab-none but it is not installable"),
        ("service:lab-bad", "service:lab-bad does not run, it is failed"),
    ],
)
def test_what_cannot_be_had_is_denied_in_apt_s_words(
    guest: Machine, broker: Broker, tmp_path: Path, needs: str, why: str
) -> None:
    configure(guest, broker, extra=ALLOWED)
    needing(broker, tmp_path, needs)
    done = guest.ssh("alice", "ls -d /etc; true", timeout=200)
    assert "dependency_missing under persona Needy" in done.err
    assert why in done.err
    assert audit(guest) == ""


@pytest.mark.usefixtures("source")
def test_a_lock_no_network_and_a_full_disk(guest: Machine, broker: Broker, tmp_path: Path) -> None:
    configure(guest, broker, extra=ALLOWED)
    needing(broker, tmp_path, "lab-helper")
    hold = "import fcntl,time; f=open('/var/lib/dpkg/lock-frontend','w'); fcntl.lockf(f,fcntl.LOCK_EX); time.sleep(90)"
    guest.must(f'systemd-run -q --unit=holder python3 -c "{hold}"')
    done = guest.ssh("alice", "ls -d /etc; true", timeout=200)
    assert re.search(r"Could not get lock .* held by process \d+ \(python3\)", done.err)
    guest.must("systemctl stop holder")
    assert audit(guest) == ""

    guest.must(
        "echo 'deb [trusted=yes] http://10.255.255.1:9/none ./' > /etc/apt/sources.list; rm -rf /var/lib/apt/lists/*"
    )
    needing(broker, tmp_path, "lab-huge")
    done = guest.ssh("alice", "ls -d /etc; true", timeout=200)
    assert "lab-huge but it is not installable" in done.err or "Failed to fetch" in done.err
    assert audit(guest) == ""

    guest.must(f"echo 'deb [trusted=yes] file:{SOURCE} ./' > /etc/apt/sources.list")
    guest.must("mkdir -p /opt && mount -t tmpfs -o size=2m none /opt")
    # an operator did something: what failed is tried again, as soon as the agent has seen it
    guest.must("touch /var/lib/dpkg/status; sleep 3")
    done = guest.ssh("alice", "ls -d /etc; true", timeout=200)
    assert "No space left on device" in done.err
    assert audit(guest) == ""
    guest.must("umount /opt; touch /var/lib/dpkg/status; sleep 3")
    assert guest.ssh("alice", "ls -d /etc", timeout=200).out == "/etc\n"


@pytest.mark.usefixtures("source")
def test_an_installer_killed_in_the_middle_is_put_right_by_the_next(
    guest: Machine, broker: Broker, tmp_path: Path
) -> None:
    configure(guest, broker, extra=ALLOWED)
    needing(broker, tmp_path, "lab-tool")
    with guest.session("alice") as session:
        session.write("ls -d /etc")
        guest.must("for i in $(seq 300); do pgrep -f [l]ab-tool.postinst && exit 0; sleep 0.1; done; exit 1")
        guest.must("systemctl kill -s KILL --kill-whom=all persona-installer")
        assert "the installer gave no answer" in session.read(timeout=120)
        assert "half-configured" in guest.root("dpkg -s lab-tool").out
        time.sleep(31)  # it is not tried again at once
        assert session.ask("ls -d /etc 2>/dev/null", timeout=200) == "/etc\n"
    assert guest.must("dpkg --audit") == ""
