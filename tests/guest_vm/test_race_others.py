"""The race where the kernel does not have the last word, with arguments and with a link that is swapped.

Measured with the layer off, as ``test_race.py``; what is seen is killed and recorded.
"""

import json
import time

import pytest

from tests.guest_vm.conftest import Compiler
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import ROOT, await_connected, status

TRIES = 60

# alice may run 'told fine FILE' only; 'told evil FILE' creates the file
TOLD = r"""
#include <fcntl.h>
#include <string.h>
int main(int c, char **v)
{
	return c > 2 && strcmp(v[1], "evil") == 0 ? open(v[2], O_CREAT, 0644) < 0 : 0;
}
"""
RACE = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile char *word;

static void pause_a_little(void)
{
	for (volatile int i = 0; i < 2000; i++) ;
	__asm__ volatile("" ::: "memory");
}

static void *flip(void *unused)
{
	for (;;) {
		memcpy((char *)word, "fine", 5);
		pause_a_little();
		memcpy((char *)word, "evil", 5);
		pause_a_little();
	}
	return unused;
}

int main(int argc, char **argv)
{
	pthread_t thread;
	word = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pthread_create(&thread, 0, flip, 0);
	for (int i = 0; i < atoi(argv[1]); i++) {
		char file[64];
		snprintf(file, sizeof file, "/tmp/argued-%d", i);
		pid_t pid = fork();
		if (pid == 0) {
			char *args[] = { "told", (char *)word, file, 0 }, *none[] = { 0 };
			for (int t = 0; t < 50; t++) execve("/usr/local/bin/told", args, none);
			_exit(1);
		}
		waitpid(pid, 0, 0);
	}
	return 0;
}
"""
SWAP = """
import os, sys
while True:
    for target in ("/usr/bin/true", "/usr/local/bin/forbidden"):
        os.symlink(target, "next")
        os.rename("next", "link")
"""


@pytest.fixture(autouse=True)
def _without_the_layer(guest: Machine) -> None:
    guest.must("persona-agent unload-kernel; systemctl restart persona-agent")
    await_connected(guest)


def killed(guest: Machine) -> tuple[int, int]:
    """(recorded in the journal, counted): how many starts were killed since the machine came up."""
    time.sleep(2)
    found = status(guest)
    lines = guest.must("journalctl -u persona-agent -b --no-pager | grep -c 'killed:' || true")
    return int(lines), int(found["verified"]["wrong"])


def report(name: str, won: int, seen: int) -> None:
    file = ROOT / "build" / "race-others.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, name: {"tries": TRIES, "won": won, "killed": seen}}) + "\n")


def test_arguments_that_change_after_the_check(guest: Machine, static_c: Compiler) -> None:
    guest.put(static_c.compile("told", TOLD), static_c.compile("argrace", RACE), to="/usr/local/bin/")
    guest.must("chmod 755 /usr/local/bin/told /usr/local/bin/argrace; rm -f /tmp/argued-*; sleep 2")
    refused = guest.ssh("alice", "told evil /tmp/argued-x")
    assert refused.code == 126
    assert "with these arguments" in refused.err
    before, counted_before = killed(guest)
    done = guest.ssh("alice", f"argrace {TRIES}", timeout=300)
    assert done.code == 0, done.text
    won = int(guest.must("ls /tmp | grep -c argued- || true"))
    recorded, counted = killed(guest)
    report("arguments", won, counted - counted_before)
    assert recorded - before == counted - counted_before


def test_a_link_that_changes_after_the_check(guest: Machine) -> None:
    guest.must("rm -f /tmp/linked-*")
    before, counted_before = killed(guest)
    loop = f"for i in $(seq {TRIES}); do ./link /tmp/linked-$i; done 2>/dev/null"
    swapping = f"cd $(mktemp -d); cat > swap.py; python3 swap.py & sleep 1; {loop}; kill $! && echo swapped"
    assert guest.ssh("alice", swapping, stdin=SWAP, timeout=300).out == "swapped\n"
    won = int(guest.must("ls /tmp | grep -c linked- || true"))
    recorded, counted = killed(guest)
    report("link", won, counted - counted_before)
    assert recorded - before == counted - counted_before
