"""An auditor reads a copy of the audit where nothing can be written, and nothing is left out without a word."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from persona_broker.audit import checkpoints, keys
from persona_broker.audit.chain import Chain
from persona_broker.audit.delivery import Delivery
from persona_broker.audit.index import Index
from persona_broker.store.sqlite import SqliteStore

from tests.broker.conftest import environment
from tests.broker.test_audit_chain import BEGAN, DAY_S, STREAM, Clock, numbered

COMMANDS = ("verify", "search --user alice", "tail", "export", "gaps")


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Path]:
    """A database and two days of an audit that is written to: the newest records are in the log."""
    directory = tmp_path / "live"
    directory.mkdir()
    clock = Clock()
    key, _ = keys.load_or_make(directory / "audit.key")
    with closing(SqliteStore(directory / "db")) as store, closing(Chain(directory / "audit", clock)) as chain:
        for day in range(2):
            clock.now = BEGAN + day * DAY_S
            chain.deliver([Delivery("vm-1", numbered(2 * day + 1, 2 * day + 2), STREAM)])
        chain.settle()
        for segment in chain.segments():
            Index(segment).close()
        made = checkpoints.make(chain, key)
        assert made is not None
        checkpoints.put(store, [made])
        yield directory


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system; ``sealed`` makes it read-only."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def sealed(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(OSError, match="Read-only"):
        (disk / "x").touch()


def run(directory: Path, command: str, user: int | None = None) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "persona_broker", "--db", str(directory / "db"), "audit", *command.split(), "--json"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment(), user=user)


def copy(source: Path, place: Path, *without: str) -> None:
    for file in sorted(source.rglob("*")):
        target = place / file.relative_to(source)
        if file.is_dir():
            target.mkdir(exist_ok=True)
        elif not file.name.endswith(without) or not without:
            shutil.copyfile(file, target)


def every(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_copy_with_its_logs_is_read_whole(live: Path, disk: Path, command: str) -> None:
    copy(live, disk)
    assert (disk / "audit" / "2026-09-22.db-wal").stat().st_size
    sealed(disk)
    before = every(disk)
    done = run(disk, command)
    assert (done.returncode, done.stderr) == (0, "")
    assert every(disk) == before
    if command == "export":
        assert [json.loads(line)["number"] for line in done.stdout.splitlines()] == [1, 2, 3, 4, 5, 6, 7]
    if command == "verify":
        assert (json.loads(done.stdout)["records"], json.loads(done.stdout)["checkpoints"]) == (7, 1)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_log_that_cannot_be_read_is_said(live: Path, disk: Path, command: str) -> None:
    copy(live, disk, "-shm")
    sealed(disk)
    done = run(disk, command)
    assert f"{disk}/audit/2026-09-22.db-wal has newer records, which cannot be read here" in done.stderr
    assert done.returncode == (1 if command == "verify" else 0), done.stderr
    assert f"{disk}/db-wal cannot be read where nothing can be written" in done.stderr
    if command == "verify":
        found = json.loads(done.stdout)["items"]
        assert ("broken", "2026-09-22.db-wal") in {(item["kind"], item["segment"]) for item in found}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_audit_alone_is_read_without_its_database(live: Path, disk: Path, command: str) -> None:
    with closing(Chain(live / "audit")) as chain:
        for segment in chain.segments():
            subprocess.run(["sqlite3", str(segment), f".backup {disk}/copy"], check=True)
            (disk / "audit").mkdir(exist_ok=True)
            (disk / "copy").rename(disk / "audit" / segment.name)
    sealed(disk)
    done = run(disk, command)
    assert done.returncode == 0, done.stderr
    assert f"there is no database {disk}/db" in done.stderr
    assert "cannot be read here" not in done.stderr
    if command == "verify":
        assert (json.loads(done.stdout)["whole"], json.loads(done.stdout)["records"]) == (True, 7)


def test_who_may_not_write_there_reads_all_the_same(live: Path, disk: Path) -> None:
    """Without a read-only disk: the files are another user's."""
    copy(live, disk, "audit.key")
    for path in [disk, *disk.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    for parent in disk.parents:
        if parent.stat().st_mode & 0o001 == 0:
            parent.chmod(parent.stat().st_mode | 0o011)
    readable = subprocess.run(
        [sys.executable, "-c", "import persona_broker"], env=environment(), user=65534, check=False
    )
    if readable.returncode:
        pytest.skip("another user cannot read this tree")
    assert os.geteuid() == 0
    for command in COMMANDS:
        done = run(disk, command, 65534)
        known = {"verify": 1}.get(command, 0)  # the checkpoint's key is not there
        assert (done.returncode, "cannot be read" in done.stderr) == (known, False), done.stderr
    (disk / "audit" / "2026-09-22.db-shm").unlink()
    assert "has newer records, which cannot be read here" in run(disk, "tail", 65534).stderr
