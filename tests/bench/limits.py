"""What it costs to bind processes: moving one, an exec under another persona, and how soon what runs follows."""

import time

from persona_broker.store.sqlite import SqliteStore

from tests.bench.row import Row, median, percentile
from tests.guest_vm import far
from tests.guest_vm.bound import CGROUPS, USER, apply, cgroup, persona, policy
from tests.guest_vm.login import Session
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker

CHANGES = 200

# Moves a process back and forth between two cgroups of two controllers, and prints each move's seconds.
MOVES = """
import os, subprocess, time
root = "/sys/fs/cgroup/user.slice/"
for name in ("bench-a", "bench-b"): os.mkdir(root + name)
child = subprocess.Popen(["sleep", "100"])
for n in range(200):
    fd = os.open(root + ("bench-a", "bench-b")[n % 2] + "/cgroup.procs", os.O_WRONLY)
    began = time.perf_counter()
    os.write(fd, str(child.pid).encode())
    print(time.perf_counter() - began)
    os.close(fd)
child.kill(); child.wait()
for name in ("bench-a", "bench-b"): os.rmdir(root + name)
"""

# Starts two programs in turn and prints the seconds of each: the same persona's, and another's.
STARTS = """
import subprocess, time
for _ in range(60):
    for program in ("tail", "head"):
        began = time.perf_counter()
        subprocess.run([program, "-c0", "/dev/null"])
        print(program, time.perf_counter() - began)
"""


def moves(machine: Machine) -> Row:
    """``cgroup.move_us``"""
    machine.must("cat > /root/moves.py", stdin=MOVES)
    seconds = [float(line) for line in machine.must("python3 /root/moves.py").split()]
    p99 = percentile(seconds, 99)
    value = median(seconds)
    return Row("cgroup.move_us", value * 1e6, "us", "p99", p99 * 1e6, value / p99, "")


def starts(machine: Machine, broker: Broker) -> Row:
    """``exec.other_persona_us``: what a start costs more where its persona is not its parent's."""
    apply(
        broker,
        persona("Wide", {"pids": 77}, ["**", "!head"]),
        persona("Narrow", {"pids": 33}, ["head"]),
        policy("wide", "Wide"),
        policy("narrow", "Narrow"),
    )
    machine.must("install -m 644 /dev/stdin /tmp/starts.py", stdin=STARTS)
    with machine.session(USER) as session:
        session.ask("head -c0 /dev/null; tail -c0 /dev/null")
        found: dict[str, list[float]] = {"head": [], "tail": []}
        for line in session.ask("python3 /tmp/starts.py").splitlines():
            program, seconds = line.split()
            found[program].append(float(seconds))
    same, other = median(found["tail"]), median(found["head"])
    return Row("exec.other_persona_us", other * 1e6, "us", "its parent's persona", same * 1e6, other / same, "")


def follow(machine: Machine, broker: Broker) -> list[Row]:
    """``follow.*p99_s``: from a change of the load in the record to what it does to a session that is open.

    A limit: the running shell's new cgroup.  The network: a connection that is refused, or made again.
    ``on_revoke: freeze``: what runs and may not any more stands still, or goes on.
    """
    apply(
        broker,
        persona("Work", {"pids": 77, "memory": "300MiB"}, on_revoke="freeze"),
        persona("Rest", {"pids": 33}, ["**", "!sleep"], network_access=[]),
        policy("work", "Work", when={"host_load": {"cpu": {"below": 70, "again_below": 60}}}),
        policy("rest", "Rest"),
    )
    store = SqliteStore(broker.directory / "broker.db")
    found = []
    # not the broker: asked for so many connections, it would be late with what is measured
    far.set_up(machine)
    reach = f"(exec 3<>/dev/tcp/{far.FAR4}/443) 2>/dev/null"
    with machine.session(USER) as session, machine.session("root") as root:
        session.ask("exec 9<> <(:); ls /; sleep 10000 &")  # 9: a pipe to wait at, which takes no CPU
        root.ask("exec 9<> <(:)")
        scope = cgroup(session.ask("cat /proc/self/cgroup")).rpartition("/")[0]
        frozen = f"[[ $(cat {CGROUPS}{scope}/*/cgroup.events) == *'frozen 1'* ]]"
        for name, who, rest, work in (
            ("follow.p99_s", session, _lives_in("Rest"), _lives_in("Work")),
            ("follow.network_p99_s", session, f"! {reach}", reach),
            ("follow.freeze_p99_s", root, frozen, f"! {frozen}"),
        ):
            seconds = [
                _change(who, store, until, load) for until, load in [(rest, 82.0), (work, 30.0)] * (CHANGES // 2)
            ]
            p99, half = percentile(seconds, 99), median(seconds)
            found.append(Row(name, p99, "s", "median", half, p99 / half, "< 1.0"))
        root.ask("pkill -x sleep")  # or the login would not end: it has its output
    return found


def _lives_in(name: str) -> str:
    return f"{{ read -r at < /proc/$$/cgroup; [[ $at == */{name} ]]; }}"


def _change(session: Session, store: SqliteStore, until: str, load: float) -> float:
    session.write(f"until {until}; do read -rt 0.01 -u 9; done")
    time.sleep(0.2)
    began = time.perf_counter()
    store.put_set_load({"cpu": load})
    session.read()
    return time.perf_counter() - began


def rows(machine: Machine, broker: Broker) -> list[Row]:
    """cgroup.*, exec.*, follow.*"""
    return [moves(machine), starts(machine, broker), *follow(machine, broker)]
