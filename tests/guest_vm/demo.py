"""``scripts/demo``: plays real ssh sessions in the lab's guest, prints what a person would see, and checks it.

The story is a test as well (``test_demo.py``): what it prints is never only hoped for.
"""

import re
import subprocess
import sys
import time

from tests.guest_vm import lab
from tests.guest_vm.image import say
from tests.guest_vm.login import Terminal, shown
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker

PROMPT = "$ "


class Story:
    """Sessions of one guest, printed as they go; ``wrong`` collects what did not come out as told."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.wrong: list[str] = []
        self.scenes = 0

    def play(self, user: str, command: str, told: str, *, tty: bool = False) -> None:
        """A login that runs one command line: as typed, its output, its exit code; ``told`` is a pattern in them."""
        print(f"\n{user}$ {command}", flush=True)
        terminal = Terminal([*self.machine.ssh_argv(user, "-tt" if tty else "-T"), "--", command], term="dumb")
        try:
            terminal.type("\n" if tty else "")  # for "Press ENTER"
            code = terminal.end(60)
            self._show(command, shown(terminal.transcript) + (f"(exit {code})" if code else ""), told)
        except subprocess.TimeoutExpired:
            self._show(command, f"{shown(terminal.transcript)}(no end within 60 s)", told)
        finally:
            terminal.close()

    def type(self, user: str, scene: list[tuple[str, str]], told: str) -> None:
        """An interactive login: keys and what must be seen before the next ones."""
        print(f"\nssh {user}@analytics-1", flush=True)
        terminal = Terminal(self.machine.ssh_argv(user, "-tt"), term="dumb")
        try:
            for keys, seen in scene:
                terminal.type(keys)
                terminal.expect(seen)
            terminal.type("exit\n")
            terminal.end()
        except (TimeoutError, subprocess.TimeoutExpired) as stuck:
            print(f"    ({stuck})")
        finally:
            terminal.close()
        self._show("the interactive login", shown(terminal.transcript), told)

    def recorded(self, broker: Broker, command: str, told: str) -> None:
        """The broker's last record of a command line, for what had nobody to tell it to."""
        lines = [line for line in broker.run("records", "tail", "-n", "50").splitlines() if line.endswith(command)]
        self._show(f"the record of {command}", f"recorded: {lines[-1] if lines else 'nothing'}", told)

    def _show(self, what: str, text: str, told: str) -> None:
        self.scenes += 1
        for line in text.splitlines():
            if line.strip() and not line.startswith("Connection to"):
                print(f"    {line.rstrip()}")
        if not re.search(told, text, re.DOTALL):
            self.wrong.append(what)
            print(f"    ^^^ not as it should be: expected {told}", flush=True)


def refused(program: str, why: str = "no_matching_policy") -> str:
    """The line of a denial under DataAnalyst, and no sign that the program ran."""
    under = r"under persona DataAnalyst, policy analysts-by-day \(\S+:\d+\)"
    return rf"\A(?!.*Nmap done).*persona: {program}: denied, {why} {under}"


def tell(machine: Machine, broker: Broker) -> Story:
    """The whole story; leaves the load at 40 %."""
    story = Story(machine)
    print("\n=== alice's persona is DataAnalyst: plain work goes on as ever")
    story.play("alice", "ls -ld /etc /home", r"root root .* /home")
    story.play("alice", "ps ax | grep -c . | sed 's/^/processes: /'", r"processes: \d+")
    script = r"printf '#!/bin/sh\necho a script, run by $0\n' > hi.sh; chmod +x hi.sh; ./hi.sh"
    story.play("alice", script, r"run by \./hi\.sh")
    story.play("alice", "git init -q repo; git -C repo status --short --branch", "No commits yet")
    story.type(
        "alice",
        [
            ("", PROMPT),
            ("ls -d /etc/hostn\t", "hostname"),  # Tab completes it
            ("\n", PROMPT),
            ("sleep 60\n", "sleep 60"),
            ("\x1a", "Stopped"),  # ^Z
            ("kill %1\n", PROMPT),
            ("persona status\n", "generation"),
            ("", PROMPT),
        ],
        r"DataAnalyst v\d+ on analytics-1.*/etc/hostname\n.*Stopped.*policy analysts-by-day",
    )
    print("\n=== what is not on its whitelist does not start, by whatever road")
    story.play("alice", "nmap localhost", refused("nmap"))
    story.play("alice", "vim -c ':!nmap localhost' -c ':q'", refused("nmap"), tty=True)
    story.play("alice", "find . -maxdepth 0 -exec nmap localhost ';'", refused("nmap"))
    story.play("alice", "systemd-run --user --wait --pipe nmap localhost", refused("nmap"))
    job = "echo 'nmap localhost > at.txt 2>&1; echo nmap ended with $? >> at.txt' | at now; sleep 4; cat at.txt"
    story.play("alice", job, "nmap ended with 126")
    story.recorded(broker, "nmap localhost", "denied +no_matching_policy +DataAnalyst")
    story.play("alice", "persona explain nmap localhost", "would be denied, no_matching_policy")
    print("\n=== the host gets busy: CPU at 82 %, DataAnalyst holds below 70 %")
    broker.load(82)
    time.sleep(1)
    story.play("alice", "git --version", refused("git", "load_exceeds_threshold"))
    story.play("alice", "ls -d /etc; persona status | head -n 1", r"/etc\n.*AnalystOnBusyHost")
    print("\n=== and calm again: 40 %")
    broker.load(40)
    time.sleep(1)
    story.play("alice", "git --version", "git version")
    print("\n=== bob matches no policy; root is never locked out")
    story.play("bob", "true", "bob may not log in to analytics-1, no_matching_policy")
    story.play("root", "id -un; nmap --version | head -n 1", r"root\nNmap version")
    print("\n=== what the broker recorded last")
    print(broker.run("records", "tail", "-n", "8"))
    return story


def main(words: list[str]) -> int:
    """Brings the lab up, tells the story, leaves the lab running unless told otherwise; 1 where it went otherwise."""
    try:
        with lab.alone():
            return _play(stop="--stop" in words)
    except lab.BusyError as busy:
        print(busy, file=sys.stderr)
        return 1


def _play(*, stop: bool) -> int:
    machine, broker = lab.start()
    try:
        story = tell(machine, broker)
    except BaseException:
        lab.stop()
        raise
    say(f"{story.scenes - len(story.wrong)} of {story.scenes} scenes came out as they should")
    if stop:
        lab.stop()
    else:
        print(lab.how_to(machine))
    return 1 if story.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
