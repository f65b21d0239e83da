"""The look after the start: right, wrong, gone, and a process that goes on to its next program."""

import os
import subprocess
import time
from collections.abc import Iterator

import pytest
from persona_guest.core.file_id import Image
from persona_guest.gate.hang_watchdog import HangWatchdog
from persona_guest.gate.post_exec_check import Expectation, Verifier
from persona_guest.kernel.fd_inode import kernel_image
from persona_guest.kernel.task import Process, Task
from persona_guest.loop import Loop
from persona_guest.session.model import Session

from persona.decisions import Subject
from tests.guest.headless import headless


def image(path: str) -> Image:
    status = os.stat(path)
    return Image(status.st_dev, status.st_ino)


def loader() -> tuple[int, int]:
    fd = os.open("/lib64/ld-linux-x86-64.so.2", os.O_PATH)
    try:
        return kernel_image(fd, os.fstat(fd))
    finally:
        os.close(fd)


SESSION = Session("s-1", Subject("u", (), "vm"), 54321, "t", "", "/bin/sh", 1, None, 0)
GUARD = HangWatchdog(lambda: None)
SLEEP, TRUE, PYTHON = image("/usr/bin/sleep"), image("/usr/bin/true"), image("/usr/bin/python3")
LOADER = loader()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["/usr/bin/sleep", "60"])
    time.sleep(0.05)
    yield process
    process.kill()
    process.wait()


def settle(verifier: Verifier, loop: Loop, seconds: float = 0.3) -> None:
    loop.call_later(seconds, loop.stop)
    loop.run()


def watch(pid: int, *expectations: Expectation) -> tuple[Verifier, list[str]]:
    loop = Loop()
    verifier = Verifier(loop, time.monotonic, GUARD)
    found: list[str] = []
    for expected in expectations:
        verifier.expect(Process(Task(pid)), expected, SESSION, lambda wrong: found.append(wrong.what))
    settle(verifier, loop)
    return verifier, found


def test_right(sleeper: subprocess.Popen[bytes]) -> None:
    verifier, found = watch(sleeper.pid, Expectation(PYTHON, SLEEP, None, None, LOADER))
    assert (verifier.counts.right, found) == (1, [])
    assert sleeper.poll() is None


def test_another_program_is_killed(sleeper: subprocess.Popen[bytes]) -> None:
    verifier, found = watch(sleeper.pid, Expectation(PYTHON, TRUE, None, None, LOADER))
    assert verifier.counts.wrong == 1
    assert "another program" in found[0]
    assert sleeper.wait(5) == -9


@pytest.mark.parametrize(
    ("argv", "killed"),
    [(b"/usr/bin/sleep\x0060\0", False), (b"/usr/bin/sleep\x0061\0", True), (b"/usr/bin/sleep\0", True)],
)
def test_arguments(sleeper: subprocess.Popen[bytes], argv: bytes, killed: bool) -> None:
    _, found = watch(sleeper.pid, Expectation(PYTHON, SLEEP, argv, None, LOADER))
    assert found == (["other arguments"] if killed else [])
    assert (sleeper.poll() is not None or sleeper.wait(5) == -9) if killed else sleeper.poll() is None


@pytest.mark.parametrize("expected", [None, (1, 2)])
def test_another_loader_is_killed(sleeper: subprocess.Popen[bytes], expected: tuple[int, int] | None) -> None:
    verifier, found = watch(sleeper.pid, Expectation(PYTHON, SLEEP, None, None, expected))
    assert verifier.counts.wrong == 1
    assert "another loader" in found[0]
    assert sleeper.wait(5) == -9


def test_the_next_program_of_the_same_process_is_not_the_last_ones_fault(sleeper: subprocess.Popen[bytes]) -> None:
    first, second = Expectation(PYTHON, TRUE, None, None, LOADER), Expectation(TRUE, SLEEP, None, None, LOADER)
    verifier, found = watch(sleeper.pid, first, second)
    assert (verifier.counts.right, found) == (2, [])


def test_a_next_program_that_begins_from_a_wrong_one_is_killed(sleeper: subprocess.Popen[bytes]) -> None:
    first, second = Expectation(PYTHON, TRUE, None, None, LOADER), Expectation(SLEEP, SLEEP, None, None, LOADER)
    _, found = watch(sleeper.pid, first, second)
    assert "another program" in found[0]
    assert sleeper.wait(5) == -9


def test_a_leader_that_ends_at_once_hides_nothing() -> None:
    with headless() as process:
        verifier, found = watch(process.pid, Expectation(SLEEP, TRUE, None, None, LOADER))
        assert verifier.counts.wrong == 1
        assert "another program" in found[0]
        assert process.wait(5) == -9
    with headless() as process:
        verifier, found = watch(process.pid, Expectation(SLEEP, PYTHON, b"other\0", None, LOADER))
        assert (verifier.counts.wrong, found) == (1, ["other arguments"])


def test_gone() -> None:
    process = subprocess.Popen(["/usr/bin/true"])
    held = Process(Task(process.pid))
    process.wait()
    loop = Loop()
    verifier = Verifier(loop, time.monotonic, GUARD)
    verifier.expect(held, Expectation(PYTHON, TRUE, None, None, LOADER), SESSION, lambda _: None)
    settle(verifier, loop, 0.05)
    assert verifier.counts.gone == 1
