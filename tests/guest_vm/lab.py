"""``scripts/lab``: a guest and its broker that stay up, found again through the files that they leave."""

import contextlib
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from tests.guest_vm.image import cache_dir, say
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import ROOT, Broker, bring_up, environment


class BusyError(Exception):
    """Another process is starting the lab."""


def home() -> Path:
    """Where the running lab keeps its disk, keys and record."""
    return cache_dir().absolute() / "lab"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One process at a time that starts the lab, or plays the demo in it.  Raises ``BusyError``."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with open(home().with_suffix(".lock"), "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise BusyError(
                f"another lab or demo is just starting (process {lock.read().strip()}, {home()});"
                " wait, or set PERSONA_CACHE to another directory"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def start() -> tuple[Machine, Broker]:
    """A fresh lab of fresh packages that outlives this process; one that runs is stopped first.  Be ``alone``."""
    _build_packages()
    if stop():
        say("stopped the lab that was running")
    home().mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        machine, broker = bring_up(home(), stack, outlive=True)
        stack.pop_all()  # it stays up
    (home() / "state.json").write_text(json.dumps({"ssh": machine.port}))
    return machine, broker


def _build_packages() -> None:
    """What the guest will install.  Not before it is certain that no other is installing it."""
    say("building the Debian packages")
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if subprocess.run([str(ROOT / "scripts" / "build-debs")], env=ours, check=False).returncode:
        sys.exit(1)  # it said why


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
        f"    {lab} broker apply my.yaml   # personas and policies of your own: docs/lab.md\n"
        f"or: {' '.join(machine.ssh_argv('alice'))}\n"
        f"To stop it: {lab} stop"
    )


def set_load(word: str) -> int:
    """The host's load from now on, as it is typed; the exit code."""
    try:
        load = float(word)
    except ValueError:
        load = math.nan
    if not 0 <= load <= 100:
        print(f"scripts/lab load: '{word}' is no load, give a number from 0 to 100 (percent)", file=sys.stderr)
        return 2
    attach()[1].load(load)
    return 0


def become_broker(words: list[str]) -> NoReturn:
    """``persona-broker`` on the lab's record instead of this process, in the caller's directory."""
    argv = attach()[1].argv(*words)
    os.chdir(os.environ.get("PERSONA_CALLER", "."))
    os.execve(argv[0], argv, {**environment(), "PYTHONSAFEPATH": "1"})  # nothing is imported from that directory


def main(words: list[str]) -> int:
    """One subcommand; the exit code."""
    try:
        if words == ["start"]:
            with alone():
                print(how_to(start()[0]))
        elif words == ["stop"]:
            print("stopped" if stop() else "nothing is running")
        elif words == ["status"]:
            machine, broker = attach()
            print(machine.root("persona status; uptime").text + broker.run("load", "show"))
        elif words[:1] == ["load"] and len(words) == 2:
            return set_load(words[1])
        elif words[:1] == ["broker"]:
            become_broker(words[1:])
        elif words[:1] == ["ssh"] and len(words) >= 2:
            argv = attach()[0].ssh_argv(words[1])
            return subprocess.run([*argv, *words[2:]], check=False).returncode
        else:
            print("usage: see scripts/lab --help", file=sys.stderr)
            return 2
    except FileNotFoundError:
        print("no lab is running: scripts/lab start", file=sys.stderr)
        return 1
    except BusyError as busy:
        print(busy, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
