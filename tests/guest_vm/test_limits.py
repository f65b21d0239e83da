"""What a persona's numbers do to real processes in the real guest, measured there."""

import json
import re
import shlex
import statistics
import time

import pytest

from tests.guest_vm.bound import CGROUPS, USER, apply, bound, cgroup, persona, policy
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker, await_connected, status

# Burns with N processes and prints the percentage of a core that the whole cgroup got, over 4 s.
BURN = """
import os, signal, sys, time
children = []
for _ in range(int(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        while True: pass
    children.append(pid)
path = "/sys/fs/cgroup" + open("/proc/self/cgroup").read().strip().split("::")[1] + "/cpu.stat"
used = lambda: int(open(path).readline().split()[1])
time.sleep(1)
a, t = used(), time.monotonic()
time.sleep(4)
b, u = used(), time.monotonic()
for pid in children: os.kill(pid, signal.SIGKILL)
print((b - a) / 1e4 / (u - t))
"""

# Prints the median seconds of 40 program starts.
LATENCY = """
import statistics, subprocess, time
def once():
    began = time.monotonic()
    subprocess.run(["true"])
    return time.monotonic() - began
once()
print(statistics.median(once() for _ in range(40)))
"""


def python(source: str, *arguments: str) -> str:
    """A shell command line."""
    return shlex.join(["python3", "-c", source, *arguments])


# Prints what a cgroup (its path is the argument) took of one CPU in five seconds, in percent.
SHARE = """
import sys, time
used = lambda: int(open(sys.argv[1] + "/cpu.stat").readline().split()[1])
a, t = used(), time.monotonic()
time.sleep(5)
print((used() - a) / 1e4 / (time.monotonic() - t))
"""

# A bomb's persona, and what its cgroup may take at most.  The kernel throttles a task on its way back to user mode, so
# what it does in an exit or an OOM kill comes on top.
BOMB_CPU, BOMB_SHARE_MAX = "30%", 45

# alice starts programs in at most so many times the time.  A memory bomb makes it twice, whatever its limit of CPU:
# the kernel prints some 60 lines to the guest's serial console for each OOM kill.
SLOWER_AT_MOST = 4


def bombed(guest: Machine, bomb: str) -> tuple[float, float, str]:
    """How many times slower alice is beside a bomb of bob's, what of a CPU the bomb took (%), what bob was told."""
    idle = statistics.median(float(guest.ssh("alice", python(LATENCY)).out) for _ in range(3))
    with guest.session(USER) as session:
        place = cgroup(session.ask("cat /proc/self/cgroup"))
        session.write(bomb)
        time.sleep(3)
        share = float(guest.must(python(SHARE, CGROUPS + place)))
        under = statistics.median(float(guest.ssh("alice", python(LATENCY)).out) for _ in range(3))
        answered = status(guest)
        assert answered["ok"]
        guest.must(f"echo 1 > {CGROUPS}{place}/cgroup.kill")  # pkill does not catch up with a fork bomb
    said = guest.must("journalctl -u persona-agent --no-pager -n 200 -g 'limit:' || true")
    return under / idle, share, said


# --- where commands live ---------------------------------------------------------------------------


def test_a_command_is_under_its_persona_before_it_begins(guest: Machine) -> None:
    done = guest.ssh("alice", "cat /proc/self/cgroup; cat /proc/$$/cgroup; grep . /proc/$PPID/cgroup")
    here, shell, sshd = (cgroup(line) for line in done.out.splitlines())
    assert re.fullmatch(r"user\.slice/user-1000\.slice/session-\w+\.scope/DataAnalyst", here)
    assert shell == here
    assert sshd == here.replace("DataAnalyst", "login")


def test_systemd_still_knows_its_sessions(guest: Machine, broker: Broker) -> None:
    with bound(broker, {"memory": "300MiB"}), guest.session(USER) as session:
        assert session.ask("loginctl show-session $XDG_SESSION_ID -p Name") == f"Name={USER}\n"
        shown = session.ask("loginctl session-status --no-pager")  # found by the caller's cgroup
        assert re.search(r"Bound\n.*\n?.*bash", shown), shown
        assert session.ask("systemctl --user is-system-running") in ("running\n", "degraded\n")
        limit = f"cat {CGROUPS}user.slice/user-1001.slice/user@1001.service/memory.max"
        assert session.ask(f"systemd-run --user --wait --pipe -q {limit}") == f"{300 << 20}\n"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and guest.root("loginctl show-user bob").code == 0:
        time.sleep(0.5)
    assert guest.root("loginctl show-user bob").code != 0
    assert guest.must(f"find {CGROUPS}user.slice/user-1001.slice -mindepth 1 -type d") == ""


def test_sessions_without_a_scope_have_a_house(guest: Machine) -> None:
    su = cgroup(guest.must("su - alice -c 'cat /proc/self/cgroup'"))
    assert re.fullmatch(r"user\.slice/persona-sessions\.service/user-1000/s-\w+:DataAnalyst", su)
    wait = "for i in 1 2 3 4 5 6 7 8; do sleep 1; test -s at.out && break; done; cat at.out"
    at = guest.ssh("alice", f"rm -f at.out; echo 'cat /proc/self/cgroup > at.out 2>&1' | at now; {wait}").out
    assert re.fullmatch(r"user\.slice/persona-sessions\.service/user-1000/s-\w+:DataAnalyst", cgroup(at))
    guest.must("echo '@reboot cat /proc/self/cgroup > /tmp/cron.out' | crontab -u alice -; rm -f /run/crond.reboot")
    try:
        guest.must("rm -f /tmp/cron.out; systemctl restart cron")
        cron = guest.must(wait.replace("at.out", "/tmp/cron.out"))
    finally:
        guest.must("crontab -u alice -r")
    assert re.fullmatch(r"user\.slice/persona-sessions\.service/user-1000/s-\w+:DataAnalyst", cgroup(cron))
    time.sleep(2)
    assert guest.root("ls -d /sys/fs/cgroup/user.slice/persona-sessions.service/user-*/s-*").code != 0


def test_nobody_moves_himself_out(guest: Machine, broker: Broker) -> None:
    with bound(broker, {"pids": 50}), guest.session(USER) as session:
        here = CGROUPS + cgroup(session.ask("cat /proc/self/cgroup"))
        for elsewhere in (f"{here}/../login", f"{here}/..", f"{here}/../..", "/sys/fs/cgroup"):
            assert "ermission denied" in session.ask(f"echo $$ > {elsewhere}/cgroup.procs")
        assert "ermission denied" in session.ask(f"echo max > {here}/pids.max")
        assert "ermission denied" in session.ask(f"mkdir {here}/x")
        scope = cgroup(session.ask("cat /proc/self/cgroup")).split("/")[2]
        attach = (
            "busctl call org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager "
            f"AttachProcessesToUnit ssau {scope} /login 1 $$"
        )
        session.ask(attach)
        assert CGROUPS + cgroup(session.ask("cat /proc/self/cgroup")) == here


def test_two_commands_of_one_login_in_two_personas(guest: Machine, broker: Broker) -> None:
    apply(
        broker,
        persona("Wide", {"pids": 77}, ["**", "!head"]),
        persona("Narrow", {"pids": 33}, ["head"]),
        policy("wide", "Wide"),
        policy("narrow", "Narrow"),
    )
    with guest.session(USER) as session:
        assert cgroup(session.ask("cat /proc/self/cgroup")).endswith("/Wide")
        assert cgroup(session.ask("head /proc/self/cgroup")).endswith("/Narrow")
        assert session.ask("head /sys/fs/cgroup/$(head /proc/self/cgroup | cut -d: -f3)/pids.max") == "33\n"
        assert cgroup(session.ask("cat /proc/self/cgroup")).endswith("/Wide")


def test_limits_per_persona_are_shared(guest: Machine, broker: Broker) -> None:
    with bound(broker, {"memory": "200MiB", "pids": 40, "per": "persona"}):
        with guest.session(USER) as one, guest.session(USER) as other:
            places = [cgroup(session.ask("cat /proc/self/cgroup")) for session in (one, other)]
            assert places[0] != places[1]
            parents = {place.rpartition("/")[0] for place in places}
            assert parents == {"user.slice/persona-sessions.service/shared-Bound"}
            assert guest.must(f"cat {CGROUPS}{parents.pop()}/pids.max") == "40\n"
        time.sleep(2)
        assert guest.root("ls -d /sys/fs/cgroup/user.slice/persona-sessions.service/shared-Bound/s-*").code != 0


# --- the numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", [20, 60])
def test_cpu(guest: Machine, broker: Broker, percent: int) -> None:
    with bound(broker, {"cpu": f"{percent}%"}):
        got = float(guest.ssh(USER, python(BURN, "3")).out)
    assert abs(got - percent) <= percent / 10, got


def test_memory_kills_inside_the_session_only(guest: Machine, broker: Broker) -> None:
    with bound(broker, {"memory": "128MiB"}), guest.session(USER) as other:
        other.ask("sleep 60 >/dev/null 2>&1 & echo started")
        with guest.session(USER) as session:
            said = session.ask("python3 -c 'x = bytearray(500 << 20)'; echo $?")
            assert "137\n" in said
            assert "still here\n" in session.ask("echo still here")
        assert "Running" in other.ask("jobs")


def test_an_oom_kill_is_told_and_recorded(guest: Machine, broker: Broker) -> None:
    with bound(broker, {"memory": "96MiB"}):
        began = guest.moment()
        done = guest.ssh(USER, "python3 -c 'x = bytearray(500 << 20)'; sleep 1; echo $?", tty=True)
        line = "persona: out of memory, a program was killed: persona Bound allows 96 MiB"
        assert done.out.count(line) == 1, done.text
        time.sleep(2)
        assert ("limit", "memory_limit") in {(one["event"], one["reason"]) for one in broker.records(began)}


def test_a_full_pids_limit_is_told(guest: Machine, broker: Broker) -> None:
    with bound(broker, {"pids": 20}):
        done = guest.ssh(USER, "for i in $(seq 30); do sleep 3 & done; sleep 1; wait", tty=True)
        assert done.out.count("persona: no more processes: persona Bound allows 20 at once") == 1, done.text


@pytest.mark.parametrize(("key", "argument"), [("write_bps", "of"), ("read_bps", "if")])
def test_disk_bytes(guest: Machine, broker: Broker, key: str, argument: str) -> None:
    guest.must("dd if=/dev/zero of=/var/tmp/bob bs=1M count=40 conv=fsync 2>/dev/null; chown bob /var/tmp/bob")
    other, flag = ("if=/dev/zero", "oflag=direct") if argument == "of" else ("of=/dev/null", "iflag=direct")
    with bound(broker, {"disk_io": {key: "8MB"}}):
        done = guest.ssh(USER, f"LC_ALL=C dd {other} {argument}=/var/tmp/bob bs=256k count=160 {flag} conv=notrunc")
    seconds = float(re.findall(r"copied, ([\d.]+) s", done.err)[0])
    got = 160 * 256 * 1024 / seconds
    assert abs(got - 8e6) <= 8e6 * 0.15, got


def test_disk_operations(guest: Machine, broker: Broker) -> None:
    guest.must("dd if=/dev/zero of=/var/tmp/bob bs=1M count=40 conv=fsync 2>/dev/null; chown bob /var/tmp/bob")
    with bound(broker, {"disk_io": {"read_iops": 100}}):
        done = guest.ssh(USER, "LC_ALL=C dd if=/var/tmp/bob of=/dev/null bs=4k count=500 iflag=direct")
    seconds = float(re.findall(r"copied, ([\d.]+) s", done.err)[0])
    assert abs(500 / seconds - 100) <= 15, seconds


def test_priority_is_a_weight_between_users(guest: Machine, broker: Broker) -> None:
    with bound(broker, {}, priority=200), guest.session(USER), guest.session("alice") as alice:
        alice.ask("ls /")
        weights = guest.must("cd /sys/fs/cgroup/user.slice; cat user-1001.slice/cpu.weight user-1000.slice/cpu.weight")
    assert weights == "400\n100\n"


def test_a_fork_bomb_stays_inside(guest: Machine, broker: Broker) -> None:
    with bound(broker, {"cpu": BOMB_CPU, "memory": "256MiB", "pids": 64}):
        slower, share, said = bombed(guest, "bomb() { bomb | bomb & }; bomb 2>/dev/null")
    assert share < BOMB_SHARE_MAX, share
    assert slower < SLOWER_AT_MOST, slower
    assert "pids_limit" in said


def test_a_memory_bomb_stays_inside(guest: Machine, broker: Broker) -> None:
    eat = "python3 -c 'x = []\nwhile True: x.append(bytearray(1 << 20))'"
    with bound(broker, {"cpu": BOMB_CPU, "memory": "128MiB", "pids": 64}):
        slower, share, said = bombed(guest, f"while :; do {eat}; done")
    assert share < BOMB_SHARE_MAX, share
    assert slower < SLOWER_AT_MOST, slower
    assert "memory_limit" in said


# --- what is shown ---------------------------------------------------------------------------------


def test_status_shows_use_against_limit(guest: Machine, broker: Broker) -> None:
    with bound(broker, {"cpu": "150%", "memory": "512MiB", "pids": 100}):
        done = guest.ssh(USER, "persona status --json; persona status", tty=True)
        place = json.loads(done.out.splitlines()[0])["places"][0]
        assert place["persona"]["name"] == "Bound"
        assert 0 < place["use"]["memory"] < 512 << 20
        assert 2 <= place["use"]["pids"] <= 10
        assert set(place["use"]["pressure"]) == {"cpu", "memory", "io"}
        assert re.search(r"memory +\[#*\.+\] [\d.]+ MiB of 512 MiB; pressure [\d.]+ %", done.out), done.out
    assert "[" not in guest.ssh("alice", "persona status").out


def test_the_plan_is_empty_when_all_is_as_it_should_be(guest: Machine) -> None:
    with guest.session("alice") as session:
        here = cgroup(session.ask("cat /proc/self/cgroup"))
        for _ in range(10):  # whoever was here before may not be quite gone
            plan = json.loads(guest.must("persona-agent plan --json"))
            if plan["plan"] == []:
                break
            time.sleep(0.5)
        assert plan["plan"] == []
        assert here in [place["cgroup"] for place in plan["places"]]
        # at once: it is looked after every 30 s
        plan = json.loads(guest.must(f"echo 77 > {CGROUPS}{here}/pids.max; persona-agent plan --json"))["plan"]
        # of her session only: what her memory may be together changes with what she uses
        steps = [(step["op"], step["value"], step["before"]) for step in plan if step.get("cgroup") == here]
        assert steps == [("cgroup.set", "256", "77")]


def test_a_restarted_agent_puts_right_what_it_finds(guest: Machine) -> None:
    with guest.session("alice") as session:
        here = cgroup(session.ask("cat /proc/self/cgroup"))
        guest.must(f"systemctl kill -s KILL persona-agent; echo max > {CGROUPS}{here}/memory.max")
        stray = here.replace("DataAnalyst", "Stray")
        guest.must(f"mkdir {CGROUPS}{stray}; sleep 1")
        await_connected(guest)
        assert guest.must(f"cat {CGROUPS}{here}/memory.max") == f"{2 << 30}\n"
        assert guest.root(f"test -e {CGROUPS}{stray}").code == 1
        assert cgroup(session.ask("cat /proc/self/cgroup")) == here


def test_what_sshd_starts_as_root_is_under_no_persona(guest: Machine) -> None:
    guest.must(
        "printf '#!/bin/sh\\ncat /proc/self/cgroup > /tmp/where\\n' > /usr/local/bin/where;"
        " chmod 755 /usr/local/bin/where; sleep 2;"
        " echo 'session optional pam_exec.so /usr/local/bin/where' >> /etc/pam.d/sshd"
    )
    try:
        assert cgroup(guest.ssh("alice", "cat /proc/self/cgroup").out).endswith(".scope/DataAnalyst")
        assert cgroup(guest.must("cat /tmp/where")).endswith(".scope")  # though alice may run sh and cat
    finally:
        guest.must("sed -i '/pam_exec/d' /etc/pam.d/sshd; rm /usr/local/bin/where")


def test_limits_come_back_after_systemd_reloads(guest: Machine, broker: Broker) -> None:
    with bound(broker, {"pids": 60, "cpu": "50%"}), guest.session(USER) as session:
        here = cgroup(session.ask("cat /proc/self/cgroup"))
        guest.must("systemctl daemon-reload")
        assert guest.must(f"cd {CGROUPS}{here}; cat pids.max cpu.max") == "60\n50000 100000\n"


def test_release_leaves_no_cgroup_behind(guest: Machine, broker: Broker) -> None:
    with guest.session("alice") as session:
        session.ask("sleep 60 >/dev/null 2>&1 & ls /")
        scope = cgroup(session.ask("cat /proc/self/cgroup")).rpartition("/")[0]
        job = guest.must("su - alice -c 'sleep 300 >/dev/null 2>&1 & sleep 1; cat /proc/$!/cgroup'")
        assert "persona-sessions" in job
        guest.must("persona-agent unload-kernel; persona-agent release")  # as the package's removal does
        assert "login" not in guest.must(f"ls {CGROUPS}{scope}")
        assert cgroup(session.ask("cat /proc/self/cgroup")) == scope
        assert guest.root(f"ls {CGROUPS}user.slice/persona-sessions.service/*/*").code != 0
        assert guest.must("cat /proc/$(pgrep -fx 'sleep 300')/cgroup").strip().endswith(".scope")
        guest.must("pkill -fx 'sleep 300'; persona-agent load-kernel; systemctl restart persona-agent")
