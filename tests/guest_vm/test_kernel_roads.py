"""Roads into the machine that no PAM module watches, and times when nobody answers: nothing unapproved starts."""

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from persona_guest.lsm import abi

from tests.guest_vm.conftest import Compiler
from tests.guest_vm.login import Session
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import ROOT, Broker, await_connected, configure, status
from tests.guest_vm.test_kernel import WAYS, kernel, put, sidedoor

LONG = [pytest.mark.soak, pytest.mark.timeout(4 * 3600)]


@pytest.fixture
def unwatched(guest: Machine) -> Iterator[Machine]:
    """The PAM module left out of every stack, the agent running."""
    guest.must("loginctl terminate-user alice || true; pam-auth-update --package --remove persona")
    try:
        yield guest
    finally:
        guest.must("loginctl disable-linger alice; pam-auth-update --package; crontab -u alice -r 2>/dev/null || true")
        guest.must("systemctl stop user@1000.service || true")


def test_logins_are_gated_without_the_pam_module(unwatched: Machine) -> None:
    before = kernel(unwatched)
    done = unwatched.ssh("alice", "echo in")
    assert done.code != 0
    assert "in" not in done.out
    assert kernel(unwatched)["stopped"] > before["stopped"]
    assert unwatched.ssh("root", "echo in").out == "in\n"


def test_the_user_manager_is_gated_without_the_pam_module(unwatched: Machine) -> None:
    before = kernel(unwatched)
    unwatched.root("loginctl enable-linger alice; sleep 3")
    assert unwatched.root("systemctl is-active user@1000.service").out.strip() != "active"
    assert kernel(unwatched)["stopped"] > before["stopped"]


def test_at_and_cron_are_gated_without_the_pam_module(unwatched: Machine) -> None:
    unwatched.must("rm -f /tmp/side-*; chmod 666 /dev/null; systemctl restart cron atd")
    before = kernel(unwatched)
    # an ungated alice would have queued these: root does it for her, which is nobody's login
    unwatched.must("setpriv --reuid 1000 --regid 1000 --clear-groups sh -c 'echo \"touch /tmp/side-at\" | at now'")
    unwatched.must("printf '* * * * * touch /tmp/side-cron\\n' | crontab -u alice -")
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and kernel(unwatched)["stopped"] < before["stopped"] + 2:
        time.sleep(3)
    assert kernel(unwatched)["stopped"] >= before["stopped"] + 2
    assert unwatched.root("ls /tmp/side-*").code != 0


def test_a_manager_from_before_starts_nothing_and_a_new_login_is_gated_as_ever(unwatched: Machine) -> None:
    # in complain mode alice lingers and has a session, both without the gate; then the operator enforces
    unwatched.must("sed -i 's/^mode.*/mode = \"complain\"/' /etc/persona/guest.toml; systemctl restart persona-agent")
    await_connected(unwatched)
    up = "for i in $(seq 60); do systemctl -q is-active user@1000.service && exit 0; sleep 1; done; exit 1"
    unwatched.must(f"loginctl enable-linger alice; {up}")
    with unwatched.session("alice") as session:
        assert session.ask("ls -d /etc") == "/etc\n"
        assert "Nmap" in session.ask("systemd-run --user --wait --pipe -q nmap --version", timeout=60)
        unwatched.must(
            "sed -i 's/^mode.*/mode = \"enforce\"/' /etc/persona/guest.toml; systemctl restart persona-agent"
        )
        await_connected(unwatched)
        assert "Permission denied" in session.ask("ls -d /etc")
        assert "Nmap" not in session.ask("systemd-run --user --wait --pipe -q nmap --version", timeout=60)
        unwatched.must(
            "XDG_RUNTIME_DIR=/run/user/1000 setpriv --reuid 1000 --regid 1000 --init-groups"
            " busctl --user call org.freedesktop.systemd1 /org/freedesktop/systemd1"
            " org.freedesktop.systemd1.Manager StartUnit ss dbus.service replace || true"
        )
    unwatched.must("pam-auth-update --package")
    assert unwatched.ssh("alice", "ls -d /etc").out == "/etc\n"
    assert unwatched.ssh("alice", "nmap --version").code == 126


def test_a_container_from_before_starts_nothing(unwatched: Machine) -> None:
    unwatched.must("sed -i 's/^mode.*/mode = \"complain\"/' /etc/persona/guest.toml; systemctl restart persona-agent")
    await_connected(unwatched)
    with unwatched.session("alice") as session:
        session.write("exec bwrap --unshare-user --unshare-pid --bind / / --dev-bind /dev /dev --proc /proc bash")
        session.read()
        assert session.ask("ls -d /etc") == "/etc\n"
        unwatched.must(
            "sed -i 's/^mode.*/mode = \"enforce\"/' /etc/persona/guest.toml; systemctl restart persona-agent"
        )
        await_connected(unwatched)
        before = kernel(unwatched)
        assert "Permission denied" in session.ask("ls -d /etc")
        assert kernel(unwatched)["stopped"] > before["stopped"]


def tally(text: str) -> dict[str, int]:
    """What ``sort | uniq -c`` counted."""
    return {word: int(number) for number, word in map(str.split, text.splitlines())}


def killer(guest: Machine, times: int) -> threading.Thread:
    def kill() -> None:
        for _ in range(times):
            time.sleep(2)
            guest.must("systemctl kill -s KILL persona-agent")

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


@pytest.mark.parametrize("execs", [400, pytest.param(20_000, marks=LONG)])
def test_the_agent_is_killed_in_the_middle_of_many_execs(guest: Machine, execs: int) -> None:
    guest.must("rm -f /tmp/unapproved; sleep 1")
    with guest.session("carol") as session:
        assert session.ask("/usr/bin/true && echo ready") == "ready\n"
        session.write(
            f"for i in $(seq {execs // 20}); do for j in $(seq 10); do (/usr/bin/expr $i + $j >/dev/null && echo ok"
            " || echo refused) & (/usr/local/bin/forbidden /tmp/unapproved 2>/dev/null && echo BAD || echo denied) &"
            " done; wait; done 2>/dev/null | sort | uniq -c"
        )
        thread = killer(guest, 2 + execs // 400)
        counted = tally(session.read(timeout=200 + execs))
        thread.join()
        assert "BAD" not in counted
        assert counted["ok"] + counted.get("refused", 0) == execs // 2
        assert counted["ok"] >= execs // 2 - 3 - execs // 400  # an exec whose approval died with the agent is refused
        await_connected(guest)
        assert session.ask("ls -d /etc") == "/etc\n"  # the same session goes on
    assert guest.root("test -e /tmp/unapproved").code == 1


def keep_trying(probe: Session, session: Session) -> None:
    """Until there is /tmp/enough: every side door by a subshell with carol's login uid and no gate, and true by her.

    Both leave most of the CPU, of which there may be one, to what goes on meanwhile: each stop is work of the agent's.
    """
    for one in (probe, session):
        one.ask("renice -n 10 $$")
    probe.write(
        "exec 9<> <(:); (echo 1002 > /proc/self/loginuid; exec bash -c 'while test ! -e /tmp/enough; do"
        " sidedoor 1002 /tmp/probe; read -rt 4 -u 9; done') | sort | uniq -c"
    )
    session.write(
        "exec 9<> <(:); while test ! -e /tmp/enough; do /usr/bin/true && echo ok || echo refused; read -rt 0.3 -u 9;"
        " done 2>/dev/null | sort | uniq -c"
    )


@pytest.mark.parametrize("times", [1, pytest.param(300, marks=LONG)])
def test_no_gap_while_the_layer_is_replaced_and_the_agent_restarts(
    guest: Machine, static_c: Compiler, times: int
) -> None:
    put(guest, static_c, "sidedoor")
    guest.must("rm -f /tmp/enough; mkdir -p -m 777 /tmp/probe")
    with guest.session("root") as probe, guest.session("carol") as session:
        assert session.ask("/usr/bin/true && echo ready") == "ready\n"
        keep_trying(probe, session)
        for _ in range(times):
            guest.must("systemctl reload persona-kernel")
        guest.must("systemctl restart persona-kernel persona-agent")
        guest.must("dpkg -i /root/debs/persona-guest_*.deb", timeout=300)
        guest.must("persona-agent load-kernel; touch /tmp/enough")
        seen = {tuple(line.split()[1:]) for line in probe.read(timeout=120).splitlines()}
        assert seen == {(way, "stopped") for way in WAYS}
        counted = tally(session.read(timeout=120))
        assert set(counted) == {"ok"}, counted
    assert len(guest.must("ls /sys/fs/bpf/persona/*/links").split()) == len(abi.PROGRAMS)


def of_another_layout(directory: Path) -> list[Path]:
    """The packages of this version as if they were of 0.0.1, whose maps are others; made on this host."""
    found, changed = [], 0
    for package in ("persona-guest", "python3-persona"):
        (deb,) = (ROOT / "build" / "debs").glob(f"{package}_*.deb")
        tree, other = directory / package, directory / f"{package}.deb"
        subprocess.run(["dpkg-deb", "-R", str(deb), str(tree)], check=True, timeout=60)
        control = (tree / "DEBIAN" / "control").read_text()
        control = re.sub(r"^Version: .*", "Version: 0.0.1", control, flags=re.MULTILINE)
        control = re.sub(r"python3-persona \(= [^)]*\)", "python3-persona (= 0.0.1)", control)
        (tree / "DEBIAN" / "control").write_text(control)
        for code in tree.rglob("lsm/abi.py"):  # which one of them has
            changed += 1
            code.write_text(re.sub(r"^LAYOUT = .*", 'LAYOUT = "0"', code.read_text(), flags=re.MULTILINE))
        subprocess.run(["dpkg-deb", "-Znone", "-b", str(tree), str(other)], check=True, timeout=60, capture_output=True)
        found.append(other)
    assert changed == 1
    return found


def test_no_gap_while_a_version_with_other_maps_comes_and_goes(
    guest: Machine, static_c: Compiler, tmp_path: Path
) -> None:
    put(guest, static_c, "sidedoor")
    guest.must("mkdir -p /root/old")
    guest.put(*of_another_layout(tmp_path), to="/root/old/")
    guest.must("rm -f /tmp/enough; mkdir -p -m 777 /tmp/probe")
    with guest.session("root") as probe, guest.session("carol") as session:
        assert session.ask("/usr/bin/true && echo ready") == "ready\n"
        keep_trying(probe, session)
        guest.must("dpkg -i /root/old/*.deb", timeout=300)  # a downgrade
        assert guest.must("ls /sys/fs/bpf/persona") == "0\n"
        assert guest.ssh("alice", "ls -d /etc").out == "/etc\n"
        assert guest.ssh("alice", "nmap --version").code == 126
        guest.must("dpkg -i /root/debs/python3-persona_*.deb /root/debs/persona-guest_*.deb", timeout=300)
        assert guest.must("ls /sys/fs/bpf/persona") == f"{abi.LAYOUT}\n"
        guest.must("touch /tmp/enough")
        seen = {tuple(line.split()[1:]) for line in probe.read(timeout=120).splitlines()}
        assert seen == {(way, "stopped") for way in WAYS}
        counted = tally(session.read(timeout=120))
        assert set(counted) == {"ok"}, counted
        assert session.ask("ls -d /etc") == "/etc\n"


def test_a_machine_that_demands_the_layer_opens_no_session_without_it(guest: Machine, broker: Broker) -> None:
    configure(guest, broker, extra="[gate]\nrequire_kernel_layer = true\n")
    try:
        assert guest.ssh("alice", "ls -d /etc").out == "/etc\n"
        guest.must("persona-agent unload-kernel; systemctl restart persona-agent")
        await_connected(guest)
        refused = guest.ssh("alice", "true")
        assert refused.code == 255
        assert "kernel_layer_missing" in refused.err
        assert guest.ssh("root", "echo in").out == "in\n"
        guest.must("persona-agent load-kernel")
        deadline = time.monotonic() + 30
        while not status(guest)["layers"]["bpf"] and time.monotonic() < deadline:
            time.sleep(1)
        assert guest.ssh("alice", "ls -d /etc").out == "/etc\n"  # no restart was needed
    finally:
        guest.must("persona-agent load-kernel")
        configure(guest, broker)


def test_an_object_that_the_verifier_refuses_leaves_the_old_one_in_place(
    guest: Machine, static_c: Compiler, tmp_path: Path
) -> None:
    put(guest, static_c, "sidedoor")
    for part in ("bpf", "include"):
        shutil.copytree(ROOT / "guest" / part, tmp_path / part)
    source = tmp_path / "bpf" / "persona.bpf.c"
    text = source.read_text()
    assert "step >= CHAIN_MAX || " in text
    source.write_text(text.replace("step >= CHAIN_MAX || ", ""))  # an index without a bound
    subprocess.run(["make", "-s", "-B", "-C", str(tmp_path / "bpf")], check=True, timeout=120)
    guest.must("cp /usr/lib/persona/persona.bpf.o /root/good.o")
    guest.put(tmp_path / "bpf" / "persona.bpf.o", to="/usr/lib/persona/persona.bpf.o")
    try:
        assert guest.root("systemctl reload persona-kernel").code != 0
        assert "check_file" in guest.must("cat /var/lib/persona/verifier.log")
        assert sidedoor(guest) == dict.fromkeys(WAYS, "stopped")
        assert guest.ssh("alice", "ls -d /etc").out == "/etc\n"
    finally:
        guest.must("cp /root/good.o /usr/lib/persona/persona.bpf.o; systemctl reload persona-kernel")
    assert guest.root("test -e /var/lib/persona/verifier.log").code == 1


def test_the_layer_is_there_after_a_reboot_before_anybody_logs_in(guest: Machine, static_c: Compiler) -> None:
    put(guest, static_c, "sidedoor")
    boot = guest.must("cat /proc/sys/kernel/random/boot_id")
    guest.root("systemctl --no-block reboot")
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        time.sleep(3)
        try:
            if guest.ssh("root", "cat /proc/sys/kernel/random/boot_id", timeout=20).out not in ("", boot):
                break
        except subprocess.TimeoutExpired:
            continue
    guest.must(f"date -u -s @{time.time():.0f} >/dev/null; systemctl restart persona-agent")
    await_connected(guest)
    times = {}
    for unit in ("persona-kernel", "persona-agent", "ssh"):
        shown = guest.must(f"systemctl show -p InactiveExitTimestampMonotonic -p ActiveEnterTimestampMonotonic {unit}")
        times[unit] = dict(re.findall(r"(\w+)TimestampMonotonic=(\d+)", shown))
    assert int(times["persona-kernel"]["ActiveEnter"]) < int(times["ssh"]["InactiveExit"])
    assert status(guest)["layers"]["bpf"]
    assert sidedoor(guest) == dict.fromkeys(WAYS, "stopped")
    assert guest.ssh("alice", "ls -d /etc").out == "/etc\n"
