"""What the other guest tests rely on: a guest that is put back, and nothing left behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.guest_vm.login import shown
from tests.guest_vm.machine import Machine, process_of
from tests.guest_vm.site import Broker, await_connected, configure


def test_a_thawed_guest_is_as_it_was_frozen_and_knows_the_time(guest: Machine, broker: Broker) -> None:
    guest.must("touch /root/trace; apt-get remove -y -q persona-guest", timeout=300)
    guest.thaw()
    configure(guest, broker)
    assert guest.root("test -e /root/trace").code == 1
    assert abs(float(guest.must("date +%s")) - time.time()) < 5
    assert guest.ssh("alice", "nmap --version").code == 126
    assert guest.ssh("alice", "ls -d /etc").out == "/etc\n"
    await_connected(guest)


def test_a_pid_file_whose_number_is_anothers_names_nobody(tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    assert process_of(pidfile) is None
    pidfile.write_text(str(os.getpid()))
    assert process_of(pidfile) is None  # lives, but nothing in its command line says that it is ours
    tell_and_wait = [sys.executable, "-c", "print(flush=True); input()", str(tmp_path)]
    with subprocess.Popen(tell_and_wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as ours:
        if ours.stdout is not None:
            ours.stdout.readline()  # it has executed its program
        pidfile.write_text(str(ours.pid))
        assert process_of(pidfile) == ours.pid
        ours.communicate(b"\n")
    assert process_of(pidfile) is None


def test_what_a_terminal_shows() -> None:
    typed = "\x1b[?2004h\x1b]0;alice@host: ~\x07alice$ ls\r\n\x1b[0m\x1b[01;34metc\x1b[0m\r\n\x07"
    assert shown(typed) == "alice$ ls\netc\n"
