"""The agent's side against real maps of this machine's kernel; only the programs that would read them are missing."""

import ctypes
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from persona_guest.core.file_id import Image
from persona_guest.kernel import bpf
from persona_guest.loop import Loop
from persona_guest.lsm import abi
from persona_guest.lsm.abi import Event
from persona_guest.lsm.layer import AttachedLayer, HangsOn, KernelLayer
from persona_guest.lsm.quota import Quota
from persona_guest.program.exec_request import ExecRequest, Stage
from persona_guest.program.identity import Identified
from persona_guest.program.shebang import Format
from persona_guest.settings import Mode, Paths, Settings

from persona.decisions import Program

HASH, ARRAY, RINGBUF, NO_PREALLOC = 1, 2, 27, 1
MAPS = {
    "approvals": (HASH, 4, abi.APPROVAL.size, 64, 0),
    "arguments": (HASH, 8, abi.PAGE_BYTES, 64, NO_PREALLOC),
    "settings": (ARRAY, 4, abi.SETTINGS.size, 1, 0),
    "counters": (ARRAY, 4, 8, len(abi.COUNTERS), 0),
    "events": (RINGBUF, 0, 0, abi.EVENTS_BYTES, 0),
}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making and pinning maps takes root")


class _Options(ctypes.Structure):  # struct bpf_map_create_opts, the part up to map_flags
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("btf_fds", ctypes.c_uint32 * 3),
        ("value_type_id", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("extra", ctypes.c_uint64),
    )


def make(kind: int, key: int, value: int, entries: int, flags: int, pin: Path) -> None:
    library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    options = _Options(sz=ctypes.sizeof(_Options), map_flags=flags)
    fd = library.bpf_map_create(kind, pin.name.encode(), key, value, entries, ctypes.byref(options))
    assert fd >= 0, os.strerror(ctypes.get_errno())
    assert library.bpf_obj_pin(fd, str(pin).encode()) == 0, os.strerror(ctypes.get_errno())
    os.close(fd)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[str]:
    """A bpf file system with the layer's maps; directories stand in for the links of its programs."""
    subprocess.run(["mount", "-t", "bpf", "none", str(tmp_path)], check=True, timeout=20)
    try:
        home = tmp_path / "persona" / abi.LAYOUT
        (home / "links").mkdir(parents=True)
        for name, shape in MAPS.items():
            make(*shape, home / name)
        for program in abi.PROGRAMS:
            (home / "links" / program).mkdir()
        yield str(tmp_path / "persona")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=20)


def exec_request(argv: tuple[bytes, ...], complete: bool = True) -> ExecRequest:
    image = Image(8, 99)
    found = Identified(image, (7, 99), Program("/bin/x", ("x",), ("/bin/x",)), True, True, False, Format.ELF)
    return ExecRequest(b"/bin/x", argv, complete, (Stage(found, argv, b"/bin/x"),))


def pinned(directory: str, name: str) -> bpf.Map:
    _, key, value, _, _ = MAPS[name]
    return bpf.Map(bpf.open_pinned(f"{directory}/{abi.LAYOUT}/{name}"), key, value)


def test_an_approval_as_the_kernel_finds_it(directory: str) -> None:
    layer, approvals = AttachedLayer(directory), pinned(directory, "approvals")
    layer.approve(42, 1000, exec_request((b"x",)))
    value = approvals.lookup(struct.pack("=I", 42))
    assert value is not None
    expires, count, argc, size, _, device, inode = struct.unpack_from("=QIIIIQQ", value)
    assert 0 < expires - time.monotonic_ns() <= 5_000_000_000
    assert (count, argc, size, device, inode) == (1, 0, 0, 7, 99)
    layer.withdraw(42)
    layer.withdraw(42)
    assert approvals.lookup(struct.pack("=I", 42)) is None


@pytest.mark.parametrize("argv", [(), (b"x",), (b"x", b"", b"y" * 4092), (b"x", b"y" * 9000), (b"",) * 1024])
def test_arguments_in_pages(directory: str, argv: tuple[bytes, ...]) -> None:
    layer, arguments = AttachedLayer(directory), pinned(directory, "arguments")
    layer.approve(42, 1000, exec_request(argv), hangs_on=HangsOn.ARGUMENTS)
    value = pinned(directory, "approvals").lookup(struct.pack("=I", 42))
    assert value is not None
    argc, size = struct.unpack_from("=II", value, 12)
    flat = b"".join(word + b"\0" for word in argv or (b"",))
    assert (argc, size) == (max(1, len(argv)), len(flat))
    pages = [arguments.lookup(struct.pack("=II", 42, number)) for number in range((size + 4095) // 4096)]
    assert b"".join(page or b"" for page in pages) == flat.ljust(len(pages) * 4096, b"\0")


@pytest.mark.parametrize("argv", [(b"x",), (b"x", b"y"), (b"x" * 5000, b"y"), ()])
@pytest.mark.parametrize("complete", [True, False])
def test_a_name_alone(directory: str, argv: tuple[bytes, ...], complete: bool) -> None:
    """Also where the arguments are too many to read: the kernel compares no number of them."""
    layer, arguments = AttachedLayer(directory), pinned(directory, "arguments")
    layer.approve(42, 1000, exec_request(argv, complete), hangs_on=HangsOn.NAME)
    value = pinned(directory, "approvals").lookup(struct.pack("=I", 42))
    assert value is not None
    flat = (argv or (b"",))[0] + b"\0"
    assert struct.unpack_from("=II", value, 12) == (0, len(flat))
    pages = [arguments.lookup(struct.pack("=II", 42, number)) for number in range((len(flat) + 4095) // 4096)]
    assert b"".join(page or b"" for page in pages) == flat.ljust(len(pages) * 4096, b"\0")


@pytest.mark.parametrize(("argv", "complete"), [((b"x",), False), ((b"x" * abi.ARGV_MAX,), True)])
def test_what_cannot_be_compared_is_not_approved(directory: str, argv: tuple[bytes, ...], complete: bool) -> None:
    layer = AttachedLayer(directory)
    layer.approve(42, 1000, exec_request(argv, complete), hangs_on=HangsOn.ARGUMENTS)
    assert pinned(directory, "approvals").lookup(struct.pack("=I", 42)) is None


def test_a_full_map_is_tidied_and_takes_approvals_again(directory: str) -> None:
    layer, approvals = AttachedLayer(directory), pinned(directory, "approvals")
    for tid in range(64):
        approvals.update(struct.pack("=I", 1000 + tid), abi.approval(1, [(1, 2)], 0, 0))  # long expired
    layer.approve(42, 1000, exec_request((b"x",)))
    layer.approve(42, 1000, exec_request((b"x",)))
    assert list(approvals.keys(100)) == [struct.pack("=I", 42)]


def test_no_user_fills_the_maps_with_execs_that_fail(directory: str) -> None:
    layer, arguments = AttachedLayer(directory), pinned(directory, "arguments")
    layer._quota = Quota(layer._is_used, layer._forget, most=16)
    long = exec_request((b"x" * 4 * 4096,))  # five pages
    for tid in range(20):
        layer.approve(1000 + tid, 1000, long, hangs_on=HangsOn.ARGUMENTS)
    assert len(list(arguments.keys(100))) == 15
    layer.approve(42, 1001, long, hangs_on=HangsOn.ARGUMENTS)
    assert pinned(directory, "approvals").lookup(struct.pack("=I", 42)) is not None, "another user has his own share"
    pinned(directory, "approvals").delete(struct.pack("=I", 1000))
    for number in range(5):  # as the kernel does once they are compared
        arguments.delete(struct.pack("=II", 1000, number))
    layer.approve(2000, 1000, long, hangs_on=HangsOn.ARGUMENTS)
    assert pinned(directory, "approvals").lookup(struct.pack("=I", 2000)) is not None


def test_pages_of_an_exec_that_failed_go_with_the_threads_next_one(directory: str) -> None:
    layer, arguments = AttachedLayer(directory), pinned(directory, "arguments")
    layer.approve(42, 1000, exec_request((b"x" * 4 * 4096,)), hangs_on=HangsOn.ARGUMENTS)
    layer.approve(42, 1000, exec_request((b"x",)))
    assert list(arguments.keys(10)) == []


def test_tidying_removes_arguments_of_the_dead_and_no_others(directory: str) -> None:
    layer, arguments = AttachedLayer(directory), pinned(directory, "arguments")
    layer.approve(os.getpid(), 1000, exec_request((b"x",)), hangs_on=HangsOn.ARGUMENTS)
    layer.approve(4_194_303, 1000, exec_request((b"x",)), hangs_on=HangsOn.ARGUMENTS)  # no such process
    layer.sweep()
    assert list(arguments.keys(10)) == [struct.pack("=II", os.getpid(), 0)]
    assert len(list(pinned(directory, "approvals").keys(10))) == 2  # neither has expired


def test_the_settings_are_written_and_the_counters_read(directory: str) -> None:
    told: list[Event] = []
    settings = Settings(mode=Mode.ENFORCE, paths=Paths(bpf_dir=directory))
    kernel_layer = KernelLayer(settings, Loop(), told.append)
    value = pinned(directory, "settings").lookup(bytes(4))
    assert value is not None
    assert struct.unpack("=IIII", value)[:2] == (1, 1000)
    counters = pinned(directory, "counters")
    for number in range(4):
        counters.update(struct.pack("=I", number), struct.pack("=Q", number + 5))
    assert kernel_layer.layer.counts() == {"stopped": 5, "would_stop": 6, "killed": 7, "lost": 8}


def test_the_layer_is_taken_up_and_let_go_while_the_agent_runs(directory: str) -> None:
    links = Path(directory) / abi.LAYOUT / "links"
    (links / "inherit").rmdir()
    kernel_layer = KernelLayer(Settings(paths=Paths(bpf_dir=directory)), Loop(), lambda event: None)
    assert not kernel_layer.layer.active
    assert "not loaded" in kernel_layer.layer.why
    (links / "inherit").mkdir()
    kernel_layer.check()
    assert kernel_layer.layer.active
    kernel_layer.check()
    assert kernel_layer.layer.active
    (links / "check_file").rmdir()
    kernel_layer.check()
    assert not kernel_layer.layer.active
