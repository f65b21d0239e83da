"""What needs a real guest: the cost of a login, and how soon a change is felt in a live session."""

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from persona_broker.store.sqlite import SqliteStore

from tests.bench import limits
from tests.bench.row import Missing, Row, measured, median, pairs, percentile
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import ROOT, Broker, await_connected, site

LOGINS = 50
CHANGES = 50
SPAWNS, ROUNDS = 200, 5
NETWORK_ROUNDS = 101


def layer(machine: Machine, command: str) -> None:
    """Loads or unloads the kernel layer, and waits until the agent works with it, or without."""
    machine.must(f"persona-agent {command} && systemctl restart persona-agent")
    await_connected(machine)


# Another sshd, whose PAM stack is this one's without the module.  It sets no login uid: the kernel layer lets in
# whoever has none.
PLAIN = """
set -e
pam-auth-update --package --remove persona
for stack in account auth password session; do cp /etc/pam.d/common-$stack /etc/pam.d/plain-$stack; done
pam-auth-update --package
sed 's/@include common-/@include plain-/; /pam_loginuid/d' /etc/pam.d/sshd > /etc/pam.d/sshd-plain
cp /usr/sbin/sshd /usr/local/sbin/sshd-plain
systemd-run -q --unit sshd-plain -p KillMode=process /usr/local/sbin/sshd-plain -D -p 2222 -o PidFile=none
loginctl enable-linger alice # her user manager would start and stop in between
"""


def login(machine: Machine) -> float:
    """Seconds for ``ssh host true`` as alice."""
    began = time.perf_counter()
    if machine.ssh("alice", "true").code:
        raise RuntimeError("the login failed")
    return time.perf_counter() - began


def login_ratio(machine: Machine) -> Row:
    """With the module in the PAM stack and without, in turn, on two ports."""
    machine.must(PLAIN)
    plain = Machine.attach(machine.directory, machine.forward(2222))
    if plain.ssh("alice", "nmap --version").code or machine.ssh("alice", "nmap --version").code != 126:
        raise RuntimeError("one port should be gated and the other one should not")
    ours, theirs, ratio = pairs(lambda: login(machine), lambda: login(plain), LOGINS)
    machine.must("systemctl stop sshd-plain; loginctl disable-linger alice")
    return Row("login.ratio", ours, "s", "without the module", theirs, ratio, "< 1.15, target 1.05")


def revoke(machine: Machine, broker: Broker) -> Row:
    """From the load's change in the database to the first refusal of a program that runs in a loop."""
    store = SqliteStore(broker.directory / "broker.db")
    seconds = []
    with machine.session("alice") as session:
        for _ in range(CHANGES):
            store.put_set_load({"cpu": 30.0})
            session.ask("until git --version >/dev/null 2>&1; do :; done")
            session.write("while git --version >/dev/null 2>&1; do :; done")
            time.sleep(0.3)
            began = time.perf_counter()
            store.put_set_load({"cpu": 82.0})
            session.read()
            seconds.append(time.perf_counter() - began)
    p99 = percentile(seconds, 99)
    return Row("revoke.s", p99, "s", "median", median(seconds), p99 / median(seconds), "< 1.0, target 0.2")


MAIN = """
#include <stdio.h>
#include <stdlib.h>
double spawn_many(const char *path, int count);
int main(int argc, char **argv)
{
    printf("%.9f\\n", spawn_many(argv[1], atoi(argv[2])));
    return argc != 3;
}
"""


def kernel(machine: Machine, broker: Broker) -> list[Row]:
    """What the kernel layer costs: a gated user's program starts and an ungated one's, with it and without, in turn."""
    with tempfile.TemporaryDirectory() as scratch:
        main, binary = Path(scratch) / "main.c", Path(scratch) / "spawn"
        main.write_text(MAIN)
        source = Path(__file__).with_name("spawn.c")
        subprocess.run(["cc", "-O2", "-static", "-o", str(binary), str(source), str(main)], check=True, timeout=60)
        machine.put(binary, to="/usr/local/bin/spawn")
    machine.must("chmod 755 /usr/local/bin/spawn")
    broker.documents(ROOT / "tests" / "guest_vm" / "documents")  # carol may run it

    def spawns(user: str) -> float:
        return float(machine.ssh(user, f"spawn /usr/bin/true {SPAWNS}").out)

    found: dict[str, list[tuple[float, float]]] = {"carol": [], "root": []}
    for _ in range(ROUNDS):
        measured = []
        for command in ("load-kernel", "unload-kernel"):
            layer(machine, command)
            measured.append({user: min(spawns(user) for _ in range(3)) for user in found})
        for user, pair in found.items():
            pair.append((measured[0][user], measured[1][user]))
    layer(machine, "load-kernel")
    rows = []
    for name, user, target in (
        ("gate.kernel_ratio", "carol", "< 1.03"),
        ("kernel.ungated_ratio", "root", "< 1.01"),
    ):
        with_layer, without = (median(values) for values in zip(*found[user], strict=True))
        ratio = median([a / b for a, b in found[user]])
        rows.append(Row(name, with_layer * 1e6, "us", "without the layer", without * 1e6, ratio, target))
    return rows


def network(machine: Machine) -> list[Row]:
    """``net.*`` in the guest, by its own kernel, with the code that is installed there."""
    names = ["tests/bench/net.py", "tests/bench/row.py", "tests/guest/netns.py", "tests/guest/netprobe.py"]
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        subprocess.run(["tar", "-cf", archive.name, "-C", str(ROOT), *names], check=True, timeout=60)
        machine.put(Path(archive.name), to="/root/bench.tar")
    run = f"python3 -m tests.bench.net {NETWORK_ROUNDS}"
    text = machine.must(f"mkdir -p bench && cd bench && tar -xf ../bench.tar && {run}", timeout=1200)
    found = [Row(**row) for row in json.loads(text)]
    return [replace(row, name=row.name.replace("net.", "net.guest_")) for row in found]


def rows(directory: Path | None = None) -> Iterator[Row | Missing]:
    """login.*, revoke.*, cgroup.*, exec.*, follow.*, net.guest_*, *kernel*"""
    with site(directory) as (machine, broker):
        machine.must("loginctl terminate-user alice || true")
        yield from measured(
            ("login.ratio", lambda: login_ratio(machine)),
            ("revoke.s", lambda: revoke(machine, broker)),
            ("cgroup.*, exec.*, follow.*", lambda: limits.rows(machine, broker)),
            ("net.guest_*", lambda: network(machine)),
            ("gate.kernel_ratio, kernel.ungated_ratio", lambda: kernel(machine, broker)),
        )
