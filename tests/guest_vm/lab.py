"""``scripts/lab``: a guest and its broker that stay up, found again through the files that they leave."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.guest_vm.image import cache_dir, say
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker, bring_up


def home() -> Path:
    """Where the running lab keeps its disk, keys and record."""
    return cache_dir() / "lab"


def start() -> tuple[Machine, Broker]:
    """A fresh lab that outlives this process; one that runs is stopped first."""
    if stop():
        say("stopped the lab that was running")
    home().mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        machine, broker = bring_up(home(), stack, outlive=True)
        stack.pop_all()  # it stays up
    (home() / "state.json").write_text(json.dumps({"ssh": machine.port}))
    return machine, broker


def attach() -> tuple[Machine, Broker]:
    """The running lab.  Raises ``FileNotFoundError`` without one."""
    state = json.loads((home() / "state.json").read_text())
    machine = Machine.attach(home() / "vm", int(state["ssh"]))
    return machine, Broker.attach(home() / "broker")


def stop() -> bool:
    """Ends guest and broker, however far they came, and removes everything; whether there was anything."""
    if not home().exists():
        return False
    Broker.attach(home() / "broker").end()
    Machine.attach(home() / "vm", 0).stop()
    shutil.rmtree(home())
    return True


def how_to(machine: Machine) -> str:
    """How to get in, and how to end it."""
    lab = "sudo scripts/lab" if "SUDO_USER" in os.environ else "scripts/lab"
    return (
        "The guest is up. As alice (gated), as bob (refused), as root (never gated):\n"
        f"    {lab} ssh alice\n"
        f"    {lab} load 82        # the host is busy now; '{lab} load 30' ends it\n"
        f"or: {' '.join(machine.ssh_argv('alice'))}\n"
        f"To stop it: {lab} stop"
    )


def main(words: list[str]) -> int:
    """One subcommand; the exit code."""
    try:
        if words[0] == "start":
            print(how_to(start()[0]))
        elif words[0] == "stop":
            print("stopped" if stop() else "nothing is running")
        elif words[0] == "status":
            machine, broker = attach()
            print(machine.root("persona status; uptime").text + broker.run("load", "show"))
        elif words[0] == "load" and len(words) == 2:
            attach()[1].load(float(words[1]))
        elif words[0] == "ssh" and len(words) >= 2:
            argv = attach()[0].ssh_argv(words[1])
            return subprocess.run([*argv, *words[2:]], check=False).returncode
        else:
            print("usage: scripts/lab start | stop | ssh USER [COMMAND] | load PERCENT | status", file=sys.stderr)
            return 2
    except FileNotFoundError:
        print("no lab is running: scripts/lab start", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
