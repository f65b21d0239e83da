"""``scripts/demo``: plays real ssh sessions in the lab's guest and prints what a person would see."""

import subprocess
import sys
import time

from tests.guest_vm import lab
from tests.guest_vm.machine import Machine


def heading(text: str) -> None:
    """One part of the story."""
    print(f"\n=== {text}", flush=True)


def play(machine: Machine, user: str, command: str, *, tty: bool = False, typed: str = "") -> None:
    """A login that runs one command line, printed as typed, with its output and exit code."""
    print(f"\n{user}$ {command}", flush=True)
    try:
        done = machine.ssh(user, command, tty=tty, stdin=typed or None, timeout=60)
    except subprocess.TimeoutExpired:
        print("    (no end within 60 s)")
        return
    text = done.out + done.err
    for line in text.replace("\r", "").splitlines():
        clean = "".join(char for char in line if char.isprintable())
        if clean.strip() and not clean.startswith("Connection to"):
            print(f"    {clean}")
    if done.code:
        print(f"    (exit {done.code})")


def main(words: list[str]) -> int:
    """Brings the lab up, tells the story, and leaves the lab running unless told otherwise."""
    machine, broker = lab.start()
    heading("alice's persona is DataAnalyst: plain work goes on as ever")
    play(machine, "alice", "ls -ld /etc /home")
    play(machine, "alice", "ps ax | grep -c . | sed 's/^/processes: /'")
    play(
        machine,
        "alice",
        "printf '#!/bin/sh\\necho a script, run by $0; date +%%Y\\n' > hi.sh; chmod +x hi.sh; ./hi.sh",
    )
    play(machine, "alice", "git init -q repo && git -C repo status --short --branch")
    script = "echo $0 is interactive\nls /etc/host\t\npersona status\nexit\n"
    play(machine, "alice", "bash -il", tty=True, typed=script)
    heading("what is not on its whitelist does not start, by whatever road")
    play(machine, "alice", "nmap localhost")
    play(machine, "alice", "vim -c ':!nmap localhost' -c ':q'", tty=True, typed="\n\n")
    play(machine, "alice", "find . -maxdepth 0 -exec nmap localhost ';'")
    play(machine, "alice", "systemd-run --user --wait --pipe nmap localhost")
    play(machine, "alice", "echo nmap localhost | at now; sleep 3; cat /var/mail/alice 2>/dev/null | tail -n 3")
    play(machine, "alice", "persona explain nmap localhost")
    heading("the host gets busy: CPU at 82 %, DataAnalyst holds below 70 %")
    broker.load(82)
    time.sleep(1)
    play(machine, "alice", "git --version")
    play(machine, "alice", "ls -d /etc; persona status | head -n 1")
    heading("and calm again: 40 %")
    broker.load(40)
    time.sleep(1)
    play(machine, "alice", "git --version")
    heading("bob matches no policy; root is never locked out")
    play(machine, "bob", "true")
    play(machine, "root", "id -un; nmap --version | head -n 1")
    heading("what the broker recorded")
    print(broker.run("records", "tail", "-n", "12"))
    if "--stop" in words:
        lab.stop()
    else:
        print(lab.how_to(machine))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
