"""How long the standby waits for an agent that starts: while it makes progress, and never for ever."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from persona_guest.kernel import seccomp
from persona_guest.system.start_progress import LOADER, Progress, Start

from tests.guest.test_standby import NAME, Running, ended, handed_over
from tests.guest.test_supervisor import outcome

PATIENT = (0.1, 0.6, 4.0)  # between two signs of life, and in all


class Awaiting:
    """A session without an agent in enforce mode, its exec waiting, and a standby with ``PATIENT``."""

    def __init__(self, directory: Path) -> None:
        (directory / "gate.state").write_text("mode=enforce\nuid_min=1000\n")
        self.running = Running(directory, waits=PATIENT)
        self.pid, self.agent = handed_over(self.running)

    def lose(self) -> None:
        self.agent.close()

    def starts(self, process: int | str, count: int) -> None:
        self.running.starting.write_text(f"{process} {count}".ljust(31) + "\n")


@pytest.fixture
def awaiting(tmp_path: Path) -> Iterator[Awaiting]:
    found = Awaiting(tmp_path)
    yield found
    found.running.stop()


@pytest.mark.long
def test_a_start_that_makes_progress_is_waited_for(awaiting: Awaiting) -> None:
    awaiting.lose()
    for count in range(10):
        awaiting.starts(7, count)
        assert not ended(awaiting.pid, 0.2)
    back = awaiting.running.agent()
    listener = back.take()[NAME]
    for count in range(10, 14):
        awaiting.starts(7, count)
        assert not ended(awaiting.pid, 0.2)
    awaiting.running.starting.unlink()
    back.ready()
    assert not ended(awaiting.pid, 1.5)  # it is the agent's now, however long that takes
    notification = seccomp.receive(listener, bytearray(seccomp.NOTIF_SIZE))
    assert notification is not None
    seccomp.respond_continue(listener, notification.id)
    assert outcome(awaiting.pid) == 0
    os.close(listener)
    back.close()


def test_the_load_of_the_kernel_layer_is_waited_for_and_the_start_after_it(awaiting: Awaiting) -> None:
    awaiting.lose()
    for who in (LOADER, 7):
        for count in range(8):
            awaiting.starts(who, count)
            assert not ended(awaiting.pid, 0.2)
    assert outcome(awaiting.pid) == 13  # it hangs from here on


@pytest.mark.parametrize("connected", [False, True])
def test_a_start_that_hangs_is_found_soon(awaiting: Awaiting, *, connected: bool) -> None:
    awaiting.lose()
    awaiting.starts(7, 1)
    back = awaiting.running.agent()
    if connected:
        os.close(back.take()[NAME])
    began = time.monotonic()
    assert outcome(awaiting.pid) == 13
    assert time.monotonic() - began < 3
    back.close()


@pytest.mark.long
def test_a_start_takes_no_longer_than_a_start_may(awaiting: Awaiting) -> None:
    awaiting.lose()
    began, count = time.monotonic(), 0
    while not ended(awaiting.pid, 0.1) and time.monotonic() - began < 12:
        awaiting.starts(7, count := count + 1)
    assert 3 < time.monotonic() - began < 8
    assert outcome(awaiting.pid) == 13


def test_starts_that_fail_again_and_again_are_no_progress(awaiting: Awaiting) -> None:
    """Also where each of them came as far as to take the listeners."""
    awaiting.lose()
    began, process = time.monotonic(), 7
    while not ended(awaiting.pid, 0.05) and time.monotonic() - began < 12:
        awaiting.starts(process := process + 1, 1)
        back = awaiting.running.agent()
        for fd in back.take().values():
            os.close(fd)
        back.close()
    assert time.monotonic() - began < 3
    assert outcome(awaiting.pid) == 13


def test_what_a_killed_start_left_is_no_start(awaiting: Awaiting) -> None:
    awaiting.starts(7, 12)
    awaiting.lose()
    began = time.monotonic()
    assert outcome(awaiting.pid) == 13
    assert time.monotonic() - began < 3


@pytest.mark.long
def test_a_start_tells_while_it_does_anything_and_only_then(tmp_path: Path) -> None:
    start = Start(tmp_path)
    progress = Progress(tmp_path / "starting")
    progress.begin()
    assert progress.is_starting
    moved = 0
    until = time.monotonic() + 2
    while time.monotonic() < until:
        sum(range(1000))
        moved += progress.has_moved()
    assert moved >= 3
    time.sleep(0.6)
    progress.has_moved()
    time.sleep(1.0)  # it hangs
    assert not progress.has_moved()
    with pytest.raises(OSError, match="runs already"):
        Start(tmp_path)
    start.ready()
    assert not progress.is_starting
    start.close()
    Start(tmp_path).close()
    assert os.listdir(tmp_path) == []
