"""One user fills /run: everybody else logs in, runs what they may, and the agent starts anew as ever."""

import contextlib
from collections.abc import Iterator

import pytest

from tests.guest_vm.login import Session
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import await_connected

STATE = "/run/persona/state"
# not a byte and not a file more: both run out apart from each other
FILL = """
import os
try:
    with open("/run/everybodys/big", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
except OSError as error:
    print(error.strerror)
try:
    for number in range(1 << 20):
        os.close(os.open(f"/run/everybodys/{number}", os.O_CREAT | os.O_WRONLY))
except OSError as error:
    print(error.strerror)
"""


@contextlib.contextmanager
def full_run(guest: Machine) -> Iterator[None]:
    """As it is where a package made a directory there for everybody, like screen's."""
    # few files, so that they are made soon; what a file takes is the same
    guest.must("mkdir -m 1777 /run/everybodys; mount -o remount,nr_inodes=3000 /run")
    try:
        told = guest.ssh("carol", "python3 -", stdin=FILL, timeout=300)
        assert told.out.count("No space left on device") == 2, told.text
        yield
    finally:
        guest.must("rm -rf /run/everybodys; mount -o remount,nr_inodes=100000 /run", timeout=120)


def leave_room_for_systemd(guest: Machine) -> None:
    """Little, but enough for a login: where logind cannot make a session's fifo, it never answers PAM (2 minutes)."""
    guest.must("cd /run/everybodys; rm -f $(seq 0 39); truncate -c -s -160K big")


def works(session: Session) -> None:
    assert session.ask("ls -d /etc", timeout=60) == "/etc\n"
    assert "denied" in session.ask("nmap --version", timeout=60)


def test_the_state_is_on_a_file_system_of_its_own(guest: Machine) -> None:
    assert guest.must(f"findmnt -n -o FSTYPE {STATE}") == "tmpfs\n"
    assert "of its own" not in guest.must("journalctl -b -u persona-agent -o cat --no-pager")
    assert guest.root("systemctl stop run-persona-state.mount").code != 0
    for name in ("pam.sock", "agent.sock", "standby.sock"):
        assert guest.must(f"readlink /run/persona/{name}") == f"state/{name}\n"


def test_a_full_run_keeps_nobody_out(guest: Machine) -> None:
    with guest.session("alice") as before, contextlib.ExitStack() as stack:
        works(before)
        stack.enter_context(full_run(guest))
        works(before)
        for how in ("systemctl restart persona-agent", "systemctl kill -s KILL persona-agent"):
            guest.must(how, timeout=120)
            await_connected(guest)
            works(before)
        stands_by = "persona status --json | grep -q '\"standby\": true'"
        wait = f"for i in $(seq 60); do {stands_by} && exit 0; sleep 1; done; exit 1"
        guest.must(f"systemctl kill -s KILL persona-standby; {wait}")
        works(before)
        leave_room_for_systemd(guest)
        for user in ("deploy", "alice"):
            with guest.session(user) as session:
                works(session)


@pytest.mark.parametrize("name", ["pam.sock", "agent.sock"])
def test_a_link_that_somebody_took_away_is_back_soon(guest: Machine, name: str) -> None:
    back = f"for i in $(seq 20); do test -S /run/persona/{name} && exit 0; sleep 1; done; exit 1"
    guest.must(f"rm /run/persona/{name}; {back}", timeout=60)
    assert guest.ssh("alice", "ls -d /etc").out == "/etc\n"
