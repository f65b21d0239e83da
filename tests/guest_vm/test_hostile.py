"""A user who means harm: to the gate, to the agent, to the others; he knows the code and has a shell."""

import re
import shlex
import time
from pathlib import Path

import pytest

from tests.guest_vm.conftest import Compiler
from tests.guest_vm.disguises import PRELOAD
from tests.guest_vm.machine import Machine

HELPERS = Path(__file__).parent / "helpers"
FORBIDDEN = "/usr/local/bin/forbidden"


def agents_pid(guest: Machine) -> str:
    return guest.must("systemctl show -p MainPID --value persona-agent").strip()


def test_who_makes_the_agent_wait_is_ended_and_the_others_go_on(guest: Machine) -> None:
    guest.put(HELPERS / "overlay.py", to="/usr/local/share/")
    guest.must("chmod 644 /usr/local/share/overlay.py")
    agent = agents_pid(guest)
    with guest.session("alice") as hostile, guest.session("deploy") as other:
        other.ask("ls -d /etc")
        hostile.write("exec python3 /usr/local/share/overlay.py /tmp/silent")
        time.sleep(1.5)
        slowest = 0.0
        for _ in range(20):
            started = time.monotonic()
            assert other.ask("ls -d /etc") == "/etc\n"
            slowest = max(slowest, time.monotonic() - started)
            time.sleep(0.2)
        with pytest.raises((EOFError, OSError)):
            for _ in range(10):
                hostile.read(20)
                hostile.write("true")
        assert slowest < 15
    assert agents_pid(guest) == agent
    assert "alice makes the gate wait" in guest.must("journalctl -b -u persona-agent --no-pager")
    deadline = time.monotonic() + 30  # alice is kept out for ten seconds
    while (done := guest.ssh("alice", "ls -d /etc")).out != "/etc\n" and time.monotonic() < deadline:
        assert done.code == 255  # by sshd, whom PAM told so
        time.sleep(1)
    assert done.out == "/etc\n"


def test_every_process_of_a_user_is_gated(guest: Machine) -> None:
    with guest.session("alice") as session:
        session.ask("tmux -L g -f /dev/null new -d 'sleep 60'; systemd-run --user -q sleep 60; (setsid sleep 60 &)")
        free = (
            "for p in /proc/[0-9]*; do grep -qs '^Uid:.*\\s1000\\s' $p/status && "
            "! grep -q '^Seccomp:\\s2' $p/status && cat $p/comm; done; true"
        )
        assert guest.must(free) == ""
        session.ask("pkill -u alice sleep; tmux -L g kill-server")


def test_no_process_that_is_not_gated_can_be_traced(guest: Machine) -> None:
    script = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        status = open(f"/proc/{pid}/status").read()
    except OSError:
        continue
    if "Seccomp:\\t0" in status and libc.ptrace(16, int(pid), 0, 0) == 0:
        print("traced", pid, status.splitlines()[0])
print("looked")
"""
    assert guest.ssh("alice", "python3 -", stdin=script).out == "looked\n"


def test_what_the_agent_keeps_is_nobodys_to_read_or_change(guest: Machine) -> None:
    tries = [
        "ls /run/persona/state/sessions", "touch /run/persona/x", "rm -f /run/persona/agent.sock",
        "touch /run/persona/state/x", "rm -f /run/persona/state/agent.sock", "cat /run/persona/state/*.json",
        "cat /etc/persona/token", "echo mode=complain >/var/lib/persona/gate.state",
        "mv /run/persona/agent.sock /tmp/s",
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect("
        "\"/run/persona/standby.sock\")'",
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect("
        "\"/run/persona/pam.sock\")'",
    ]  # fmt: skip
    done = guest.ssh(
        "alice", "; ".join(f"{{ {word}; }} 2>/dev/null && echo DONE: {shlex.quote(word)}" for word in tries)
    )
    assert "DONE" not in done.out
    assert guest.ssh("alice", "ls -d /etc").out == "/etc\n"


LIBRARY = "/home/alice/preload.so"
ENVIRONMENTS = {
    "pam_environment": f"printf 'RUN={FORBIDDEN}\\nON=/tmp/env-0\\nLD_PRELOAD={LIBRARY}\\n' > ~/.pam_environment",
    "bashrc": f"printf '{FORBIDDEN} /tmp/env-1\\n' > ~/.bashrc",
    "ssh rc": f"mkdir -p .ssh; printf '{FORBIDDEN} /tmp/env-2\\n' > ~/.ssh/rc",
    "environment.d": "mkdir -p ~/.config/environment.d; "
    f"printf 'LD_PRELOAD={LIBRARY}\\nRUN={FORBIDDEN}\\nON=/tmp/env-3\\n' > ~/.config/environment.d/x.conf",
}  # fmt: skip


def test_no_start_file_or_environment_starts_what_may_not(guest: Machine, static_c: Compiler) -> None:
    guest.put(static_c.shared("preload.so", PRELOAD), to=LIBRARY)
    guest.must(f"chown alice: {LIBRARY}; rm -f /tmp/env-*")
    try:
        for line in ENVIRONMENTS.values():
            guest.ssh("alice", line)
        guest.must("loginctl terminate-user alice; sleep 2")
        for _ in range(2):
            guest.ssh("alice", "true; systemd-run --user --wait -q true", timeout=60)
        assert guest.must("ls /tmp/env-* 2>/dev/null || true") == ""
    finally:
        guest.must("cd /home/alice; rm -rf .pam_environment .bashrc .ssh/rc .config/environment.d; "
                   "loginctl terminate-user alice || true")  # fmt: skip


BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd"><busconfig><type>session</type>
<listen>unix:path=/tmp/bus-SOCKET</listen><servicedir>/tmp/bus-services</servicedir>
<policy context="default"><allow send_destination="*"/><allow own="*"/><allow eavesdrop="true"/></policy></busconfig>
"""


@pytest.mark.parametrize(("program", "arrives"), [(FORBIDDEN, False), ("/usr/bin/touch", True)])
def test_the_sessions_own_machinery_is_no_launcher(guest: Machine, program: str, arrives: bool) -> None:
    """dbus-daemon runs whatever a persona says; what it activates is decided."""
    guest.must("rm -rf /tmp/bus*")
    service = f"[D-BUS Service]\\nName=org.example.X\\nExec={program} /tmp/bus-arrived\\n"
    done = guest.ssh(
        "carol",
        f"mkdir /tmp/bus-services; printf '{service}' > /tmp/bus-services/org.example.X.service; cat > /tmp/bus.conf; "
        "dbus-daemon --config-file=/tmp/bus.conf --fork --print-pid >/tmp/bus.pid; DBUS_SESSION_BUS_ADDRESS="
        "unix:path=/tmp/bus-SOCKET dbus-send --print-reply --dest=org.example.X / org.example.X.Y 2>&1; "
        "kill $(cat /tmp/bus.pid)",
        stdin=BUS,
    )
    assert "org.freedesktop.DBus.Error" in done.out  # it tried: touch is no D-Bus service
    assert (guest.root("test -e /tmp/bus-arrived").code == 0) is arrives
    guest.must("rm -rf /tmp/bus*")


def test_a_name_cannot_drive_a_terminal(guest: Machine) -> None:
    name = r"$'/tmp/\e]0;owned\a\e[2Jx'"
    done = guest.ssh("alice", f"cp /usr/bin/true {name}; {name}; rm {name}", tty=True)
    assert r"persona: $'/tmp/\x1b]0;owned\x07\x1b[2Jx': denied" in done.out
    line = next(line for line in done.out.splitlines() if line.startswith("persona:"))
    assert "\x1b" not in line


@pytest.mark.parametrize("seconds", [20, pytest.param(3600, marks=[pytest.mark.soak, pytest.mark.timeout(2 * 3600)])])
def test_a_flood_of_questions_delays_nobody_else_and_grows_nothing(guest: Machine, seconds: int) -> None:
    agent = agents_pid(guest)
    guest.put(HELPERS / "flood.py", to="/usr/local/share/")
    guest.must("chmod 644 /usr/local/share/flood.py")
    size = f"sed -n 's/^VmRSS:[^0-9]*\\([0-9]*\\).*/\\1/p' /proc/{agent}/status"
    status = "from persona_guest.shell.client import Client; print(Client().call('status')['ok'])"
    with guest.session("alice") as hostile, guest.session("deploy") as other:
        other.ask("ls -d /etc")
        hostile.ask("python3 /usr/local/share/flood.py 3")
        before = int(guest.must(size))
        hostile.write(f"python3 /usr/local/share/flood.py {seconds}")
        time.sleep(3)
        slowest = 0.0
        for number in range(max(6, seconds // 30)):
            started = time.monotonic()
            assert other.ask(f"ls -d /etc; test -d /{number} || true") == "/etc\n"  # a question of its own
            assert other.ask(f'python3 -c "{status}"') == "True\n"
            slowest = max(slowest, time.monotonic() - started)
        assert int(re.findall(r"sent (\d+)", hostile.read(seconds + 100))[0]) > 100
        assert slowest < 20
        # KiB; no object stays, but each of a user's 16 connections may cost a thread's stack and its share of malloc's
        assert int(guest.must(size)) - before < 16 * 1024
    assert agents_pid(guest) == agent
    assert "could not be served" not in guest.must("journalctl -b -u persona-agent --no-pager")


def test_a_flood_of_refusals_hides_nobody_elses(guest: Machine) -> None:
    guest.ssh("alice", "for i in $(seq 150); do nmap; done 2>/dev/null", timeout=200)
    guest.ssh("deploy", "nmap --version")
    time.sleep(2)
    journal = guest.must("journalctl -b -u persona-agent --no-pager -n 500")
    assert re.search(r"exec: deploy: denied.*nmap --version", journal)
    assert re.search(r"\d+ more of session s-[0-9a-f]+ in a second", journal)
