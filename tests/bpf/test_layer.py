"""What of the kernel layer can be tested without a kernel that runs it: its layout, its adapters, its choices."""

import os
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from persona_guest.kernel import bpf
from persona_guest.kernel.fd_inode import kernel_device, kernel_image
from persona_guest.loop import Loop
from persona_guest.lsm import abi, loader
from persona_guest.lsm.layer import KernelLayer, NoKernelLayer
from persona_guest.lsm.loader import KernelLayerError, Machine
from persona_guest.settings import Paths, Settings

from persona.problems import Reason

SOURCES = Path(__file__).parents[2] / "guest" / "bpf"

SIZES = """
#include <linux/types.h>
#include <stddef.h>
#include <stdio.h>
#include "layer.h"
int main(void)
{
	printf("%zu %zu ", sizeof(struct approval), sizeof(struct page_key));
	printf("%zu %zu %zu\\n", sizeof(struct page), sizeof(struct settings), sizeof(struct event));
	printf("%zu %zu ", offsetof(struct approval, count), offsetof(struct approval, argv_bytes));
	printf("%zu %zu\\n", offsetof(struct approval, chain), offsetof(struct event, path));
	printf("%d %d %u\\n", CHAIN_MAX, PAGES_MAX * PAGE_BYTES, COUNTERS);
	return 0;
}
"""


def test_python_and_c_agree_on_the_layout(tmp_path: Path) -> None:
    (tmp_path / "sizes.c").write_text(SIZES)
    binary = tmp_path / "sizes"
    subprocess.run(["cc", f"-I{SOURCES}", "-o", str(binary), str(tmp_path / "sizes.c")], check=True, timeout=60)
    out = subprocess.run([str(binary)], capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    sizes = abi.APPROVAL, abi.PAGE_KEY, abi.PAGE_BYTES, abi.SETTINGS, abi.EVENT
    assert out[0].split() == [str(size if isinstance(size, int) else size.size) for size in sizes]
    value = abi.approval(7, [(1, 2)], 3, 4)
    count, argv_bytes, chain, _ = map(int, out[1].split())
    assert struct.unpack_from("=I", value, count) == (1,)
    assert struct.unpack_from("=I", value, argv_bytes) == (4,)
    assert struct.unpack_from("=QQ", value, chain) == (1, 2)
    assert out[2].split() == [str(abi.CHAIN_MAX), str(abi.ARGV_MAX), str(len(abi.COUNTERS))]


def test_the_object_has_the_programs_that_the_loader_attaches(tmp_path: Path) -> None:
    subprocess.run(["make", "-s", "-C", str(SOURCES)], check=True, timeout=120)
    symbols = subprocess.run(
        ["readelf", "-sW", str(SOURCES / "persona.bpf.o")], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    functions = {line.split()[-1] for line in symbols.splitlines() if " FUNC " in line and " GLOBAL " in line}
    assert functions == set(abi.PROGRAMS)


@given(st.integers(1, 4095), st.integers(0, (1 << 20) - 1))
def test_a_device_as_the_kernel_numbers_it(major: int, minor: int) -> None:
    assert kernel_device(os.makedev(major, minor)) == major << 20 | minor


def test_an_event_is_read() -> None:
    raw = abi.EVENT.pack(3, 1, 10, 11, 1000, 1000, abi.NO_ID, 0, 5, 6, b"bash", b"/bin/\xff")
    event = abi.event(raw)
    assert (event.reason, event.enforced, event.tid, event.tgid) == (Reason.OTHER_FILE, True, 10, 11)
    assert (event.login, event.audit_session, event.comm) == (1000, None, "bash")
    assert os.fsencode(event.path) == b"/bin/\xff"
    with pytest.raises(struct.error):
        abi.event(raw[:-1])
    with pytest.raises(KeyError):
        abi.event(b"\x09" + raw[1:])


@pytest.mark.parametrize("place", ["/", "/dev/shm", "/proc/self"])
def test_an_inode_as_the_kernel_has_it(place: str, tmp_path: Path) -> None:
    fd = os.open(place, os.O_PATH)
    try:
        device, inode = kernel_image(fd, os.fstat(fd))
    finally:
        os.close(fd)
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    where = "/proc" if place.startswith("/proc") else place
    expected = [words[2] for words in mounts if words[4] == where]
    assert f"{device >> 20}:{device & 0xFFFFF}" in expected or (place == "/dev/shm" and not expected)
    assert inode == os.stat(place).st_ino


def machine(tmp_path: Path, lsm: str | None, btf: bool = True) -> Machine:
    if lsm is not None:
        (tmp_path / "lsm").write_text(lsm)
    if btf:
        (tmp_path / "btf").touch()
    return Machine(str(tmp_path / "lsm"), str(tmp_path / "btf"))


def test_what_a_kernel_lacks_is_said(tmp_path: Path) -> None:
    inside = str(tmp_path / "persona")
    assert machine(tmp_path, "lockdown,capability,landlock,bpf").lacks(inside) is None
    assert "no bpf file system" in str(machine(tmp_path, "bpf").lacks("/nonexistent/persona"))
    (tmp_path / "btf").unlink()
    assert "type information" in str(machine(tmp_path, "bpf", btf=False).lacks(inside))
    assert "lsm=" in str(machine(tmp_path, "capability,apparmor").lacks(inside))
    (tmp_path / "lsm").unlink()
    assert "No such file" in str(Machine(str(tmp_path / "lsm"), str(tmp_path / "btf")).lacks(inside))


def test_a_broken_object_is_refused_and_leaves_nothing_attached(tmp_path: Path) -> None:
    (tmp_path / "object.o").write_bytes(b"no ELF file")
    paths = Paths(bpf_dir=str(tmp_path / "persona"), bpf_object=str(tmp_path / "object.o"))
    with pytest.raises(KernelLayerError):
        loader.load(Settings(paths=paths), machine(tmp_path, "bpf"))
    assert list((tmp_path / "persona").glob("*/links/*")) == []
    loader.unload(paths.bpf_dir)
    assert not os.path.exists(paths.bpf_dir)
    loader.unload(paths.bpf_dir)


def test_where_no_layer_is_wanted_none_is_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somebody" / "links").mkdir(parents=True)
    loader.unload("")
    assert (tmp_path / "somebody" / "links").exists()


@pytest.mark.parametrize("directory", ["", "/nonexistent/persona"])
def test_without_the_layer_something_stands_in_its_place(directory: str) -> None:
    kernel_layer = KernelLayer(Settings(paths=Paths(bpf_dir=directory)), Loop(), lambda event: None)
    kernel_layer.check()
    assert isinstance(kernel_layer.layer, NoKernelLayer)
    assert kernel_layer.layer.why
    assert not kernel_layer.layer.active


def fake_ring(size: int) -> int:
    """In place of the kernel's map, a file laid out like it: consumer, producer, the data twice (a fake)."""
    fd = os.memfd_create("ring")
    os.ftruncate(fd, 2 * 4096 + 2 * size)
    return fd


def produce(fd: int, size: int, at: int, data: bytes, flags: int = 0) -> int:
    record = struct.pack("=II", len(data) | flags, 0) + data
    for index, byte in enumerate(record):
        for copy in (0, size):
            os.pwrite(fd, bytes([byte]), 2 * 4096 + copy + (at + index) % size)
    end = at + (len(record) + 7 & ~7)
    os.pwrite(fd, struct.pack("=Q", end), 4096)
    return end


def test_the_ring_is_read_in_order_and_over_its_end() -> None:
    size = 4096
    fd = fake_ring(size)
    ring = bpf.RingBuffer(fd, size)
    at = 0
    for round_ in range(40):
        text = b"%d" % round_ * 60
        at = produce(fd, size, at, text)
        at = produce(fd, size, at, b"never mind", 1 << 30)
        assert ring.read(8) == [text]
    assert ring.read(8) == []
    produce(fd, size, at, b"not yet", 1 << 31)
    assert ring.read(8) == []
    ring.close()


def test_the_ring_is_read_in_portions() -> None:
    fd = fake_ring(4096)
    ring = bpf.RingBuffer(fd, 4096)
    at = 0
    for number in range(10):
        at = produce(fd, 4096, at, b"%d" % number)
    assert [len(ring.read(4)) for _ in range(4)] == [4, 4, 2, 0]
    ring.close()
