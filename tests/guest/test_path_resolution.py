"""A walk for another task leads where the kernel's own would."""

import errno
import os
from pathlib import Path

import pytest
from persona_guest.kernel.path_resolution import walk

FLAGS = os.O_PATH | os.O_DIRECTORY


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree of files and links."""
    (tmp_path / "root/a/b").mkdir(parents=True)
    for name in ("outside", "root/x", "root/a/x", "root/a/b/x"):
        (tmp_path / name).write_text(name)
    for link, target in (
        ("root/a/up", "../x"), ("root/a/abs", "/x"), ("root/a/far", "../../../../../x"), ("root/a/b/back", "../up"),
        ("root/a/dir", "b"), ("root/a/loop", "loop"), ("root/a/proc", "/proc/self/exe"), ("root/a/none", "nothing"),
        ("root/a/chain0", "x"), *((f"root/a/chain{n}", f"chain{n - 1}") for n in range(1, 45)),
    ):  # fmt: skip
        (tmp_path / link).symlink_to(target)
    return tmp_path


def look(start: Path, root: Path, path: str) -> tuple[int, int]:
    first, top = os.open(start, FLAGS), os.open(root, FLAGS)
    before = len(os.listdir("/proc/self/fd"))
    try:
        found = walk(first, top, path.encode())
        status = os.fstat(found)
        os.close(found)
        return status.st_dev, status.st_ino
    finally:
        after = len(os.listdir("/proc/self/fd"))
        os.close(first)
        os.close(top)
        assert after <= before, "a descriptor was left open"  # fewer: what an earlier test left was collected now


PATHS = ["x", "./x", "b/x", "../x", "b/../x", "b/../../x", "up", "dir/x", "dir/../x", "dir/back", "b/back", "chain39",
         "../a/b/../up", "..//a///x", "../../outside"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_as_the_kernel_without_a_root_of_its_own(tree: Path, path: str) -> None:
    status = os.stat(tree / "root/a" / path)
    assert look(tree / "root/a", Path("/"), path) == (status.st_dev, status.st_ino)


@pytest.mark.parametrize(
    ("path", "leads"),
    [("abs", "root/x"), ("far", "root/x"), ("../../x", "root/x"), ("../../../outside", None), ("up", "root/x")],
)
def test_nothing_is_above_the_root(tree: Path, path: str, leads: str | None) -> None:
    if leads is None:
        with pytest.raises(FileNotFoundError):
            look(tree / "root/a", tree / "root", path)
    else:
        status = os.stat(tree / leads)
        assert look(tree / "root/a", tree / "root", path) == (status.st_dev, status.st_ino)


@pytest.mark.parametrize(
    ("path", "number"),
    [("loop", errno.ELOOP), ("chain44", errno.ELOOP), ("proc", errno.ELOOP), ("none", errno.ENOENT),
     ("x/y", errno.ENOTDIR), ("nothing/..", errno.ENOENT), ("n" * 300, errno.ENAMETOOLONG)],
)  # fmt: skip
def test_errors_are_the_kernels(tree: Path, path: str, number: int) -> None:
    with pytest.raises(OSError) as error:
        look(tree / "root/a", Path("/"), path)
    assert error.value.errno == number
