"""A user who makes the agent wait in his memory: he is ended, and the agent goes on."""

import contextlib
import ctypes
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from persona_guest.gate.hang_watchdog import HangWatchdog, kill_all_of
from persona_guest.gate.inflight import InFlight
from persona_guest.kernel import memory
from persona_guest.session.model import Session

from persona.decisions import Subject
from tests.guest.headless import headless

pytestmark = pytest.mark.root

UID = 54_321
_libc = ctypes.CDLL(None, use_errno=True)
MS_NOSUID, MS_NODEV, MNT_DETACH = 2, 4, 2
INIT, LOOKUP, GETATTR, OPEN, READ = 26, 1, 3, 14, 15  # linux/fuse.h
_IN = struct.Struct("=IIQQIIII")
_ATTRIBUTES = struct.pack("=QQQQQQIIIIIIIIII", 2, 4096, 8, 0, 0, 0, 0, 0, 0, 0o100444, 1, UID, UID, 0, 4096, 0)


def serve(fuse: int, asked: int) -> None:
    """A file system of one file whose content never comes: a fake only in that it is so small."""
    while True:
        request = os.read(fuse, 135_168)
        _, opcode, unique, _, _, _, _, _ = _IN.unpack_from(request)
        if opcode == INIT:
            answer = struct.pack("=IIIIHHIIHHI", 7, 31, 0, 0, 16, 12, 4096, 1, 0, 0, 0) + bytes(28)
        elif opcode == LOOKUP:
            answer = struct.pack("=QQQQII", 2, 0, 60, 60, 0, 0) + _ATTRIBUTES
        elif opcode == GETATTR:
            answer = struct.pack("=QII", 60, 0, 0) + _ATTRIBUTES
        elif opcode == OPEN:
            answer = struct.pack("=QII", 1, 0, 0)
        elif opcode == READ:
            os.write(asked, b"x")
            continue
        else:
            os.write(fuse, struct.pack("=IiQ", 16, -38, unique))
            continue
        os.write(fuse, struct.pack("=IiQ", 16 + len(answer), 0, unique) + answer)


@pytest.fixture
def hostage() -> Iterator[tuple[int, int, int]]:
    """(pid, address, pipe): memory of a process of UID that nobody delivers; the pipe tells who asks for it."""
    if not Path("/dev/fuse").exists():
        pytest.skip("this machine has no /dev/fuse")
    with tempfile.TemporaryDirectory() as directory:
        fuse = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={fuse},rootmode=40000,user_id={UID},group_id={UID}".encode()
        if _libc.mount(b"hostage", directory.encode(), b"fuse", MS_NOSUID | MS_NODEV, options) != 0:
            pytest.skip(f"FUSE cannot be mounted here: {os.strerror(ctypes.get_errno())}")
        asked, asking = os.pipe()
        ready, readying = os.pipe()
        server = os.fork()
        if server == 0:
            os.setresuid(UID, UID, UID)
            serve(fuse, asking)
        os.close(fuse)
        victim = os.fork()
        if victim == 0:
            os.setresgid(UID, UID, UID)
            os.setresuid(UID, UID, UID)
            pages = mmap.mmap(os.open(f"{directory}/f", os.O_RDONLY), 4096, mmap.MAP_SHARED, mmap.PROT_READ)
            buffer = ctypes.py_object(pages)
            address = ctypes.c_void_p()
            del buffer
            view = (ctypes.c_char * 48)()  # a Py_buffer: its first word is where the pages are
            ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(pages), view, 0)
            address = ctypes.c_void_p.from_buffer(view)
            os.write(readying, struct.pack("=Q", address.value or 0))
            time.sleep(60)
            os._exit(0)
        os.close(readying)
        (at,) = struct.unpack("=Q", os.read(ready, 8))
        try:
            yield victim, at, asked
        finally:
            for pid in (server, victim):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            _libc.umount2(directory.encode(), MNT_DETACH)
            for fd in (asked, asking, ready):
                os.close(fd)


def session(uid: int) -> Session:
    return Session("s-1", Subject("mallory", (), "vm"), uid, "sshd", "", "/bin/bash", 1, None, 0.0)


def test_who_makes_the_agent_wait_is_killed_and_the_agent_goes_on(hostage: tuple[int, int, int]) -> None:
    pid, address, asked = hostage
    gave_up: list[float] = []
    hang_watchdog = HangWatchdog(lambda: gave_up.append(time.monotonic()), limit_s=0.5)
    began = time.monotonic()
    outer = hang_watchdog.enter(session(UID))
    with pytest.raises(OSError, match=r"process_vm_readv|memory"):
        memory.read_call(pid, address, address + 64, 8)
    hang_watchdog.leave(outer)
    assert os.read(asked, 1) == b"x", "the page was really asked for"
    assert 0.5 <= time.monotonic() - began < 6
    assert not gave_up
    assert 5 < hang_watchdog.excluded_s(UID) <= 10
    assert hang_watchdog.excluded_s(UID + 1) == 0


def test_a_process_without_its_leader_is_found_too() -> None:
    with headless(UID) as process:
        kill_all_of(UID)
        assert process.wait(5) == -9


CHAIN = """
import os
os.setresuid({uid}, {uid}, {uid})
while True:
    if os.fork():
        os._exit(0)
"""


@pytest.fixture
def cgroup() -> Iterator[str]:
    """One of our own, in the hierarchy of this machine."""
    roots = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if line.split()[2] == "cgroup2"]
    directory = f"{roots[0]}/persona-test-{os.getpid()}"
    os.mkdir(directory)
    yield directory
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        Path(directory, "cgroup.kill").write_text("1")
        with contextlib.suppress(OSError):
            os.rmdir(directory)
            return
        time.sleep(0.05)


def test_a_chain_of_forks_does_not_outrun_the_end_of_its_cgroup(cgroup: str) -> None:
    code = f"import os\nopen('{cgroup}/cgroup.procs', 'w').write('0')" + CHAIN.format(uid=UID)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)

    def lives() -> bool:
        return "populated 1" in Path(cgroup, "cgroup.events").read_text()

    assert lives()
    kill_all_of(UID, [cgroup])
    time.sleep(0.1)
    assert not lives()


def test_who_does_it_again_and_again_is_kept_out_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    hang_watchdog = HangWatchdog(lambda: None)
    hang_watchdog.close()
    seconds = []
    for _ in range(8):
        hang_watchdog._exclude(UID)
        seconds.append(hang_watchdog.excluded_s(UID))
        now[0] += 1000
    assert seconds == [10, 20, 40, 80, 160, 320, 640, 640]
    now[0] += 4000
    hang_watchdog._exclude(UID)
    assert hang_watchdog.excluded_s(UID) == 10


def test_where_killing_does_not_help_the_agent_gives_up() -> None:
    gave_up: list[float] = []
    hang_watchdog = HangWatchdog(lambda: gave_up.append(time.monotonic()), limit_s=0.2)
    outer = hang_watchdog.enter(session(UID))
    time.sleep(0.8)
    assert not gave_up, "it may be a disk that is slow"
    time.sleep(1.5)
    assert gave_up
    hang_watchdog.leave(outer)


def test_what_two_agents_hung_in_is_not_read_again() -> None:
    table = InFlight()
    hung, waiting = table.put(b"s-1", bytes(80)), table.put(b"s-1", bytes(80))
    table.mark_read(waiting)
    second = InFlight(os.dup(table.fd))
    assert [(slot, readable) for slot, _, _, readable in second.left_over()] == [(hung, True), (waiting, True)]
    second.mark_read(waiting)
    third = InFlight(os.dup(table.fd))
    assert [(slot, readable) for slot, _, _, readable in third.left_over()] == [(hung, False), (waiting, True)]


def test_a_look_within_another_leaves_the_outer_one_watched() -> None:
    gave_up: list[float] = []
    hang_watchdog = HangWatchdog(lambda: gave_up.append(time.monotonic()), limit_s=0.1)
    outer = hang_watchdog.enter(session(UID))
    hang_watchdog.leave(hang_watchdog.enter(session(UID)))
    time.sleep(1.5)
    hang_watchdog.leave(outer)
    assert gave_up


def test_what_waits_for_the_kernel_only_is_nobodys_fault() -> None:
    gave_up: list[float] = []
    hang_watchdog = HangWatchdog(lambda: gave_up.append(time.monotonic()), limit_s=0.1)
    outer = hang_watchdog.enter(session(UID))
    within = hang_watchdog.rest()
    time.sleep(1.5)
    hang_watchdog.resume(within)
    time.sleep(0.3)
    assert not gave_up
    time.sleep(1.5)
    hang_watchdog.leave(outer)
    assert gave_up


def test_an_error_within_a_look_ends_the_watch() -> None:
    gave_up: list[float] = []
    hang_watchdog = HangWatchdog(lambda: gave_up.append(time.monotonic()), limit_s=0.1)
    with pytest.raises(KeyError), hang_watchdog.watching(session(UID)):
        raise KeyError("gone in the middle of it")
    time.sleep(1.5)
    assert not gave_up
