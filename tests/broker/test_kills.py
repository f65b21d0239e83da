"""SIGKILL at random moments of an apply, a backup and a restore; full disks, and some that nobody can write to."""

import contextlib
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest
from persona_broker.policy.merge import WHOLE
from persona_broker.store.backup import backup, open_backup
from persona_broker.store.interface import Author, StoreError
from persona_broker.store.restore import restore
from persona_broker.store.sqlite import SqliteStore

from persona.documents import Document, parse_document
from tests.broker.conftest import Broker
from tests.broker.test_apply import persona, policy, write
from tests.waiting import until

KILLS = [25, pytest.param(200, marks=pytest.mark.soak)]
ANN = Author("ann")
AT_ONCE = 12  # documents of a change-set


def numbered(number: int) -> list[Document]:
    """Documents that all say the same number."""
    values = [persona(f"P{index}", f"x{number}") for index in range(AT_ONCE)]
    return [parse_document(value) for value in (*values, policy("a", persona="P0"))]


def numbers(store: SqliteStore) -> set[str]:
    """The numbers that the applied documents say: one, where a change-set is whole."""
    return {match for _, _, _, text in store.texts() for match in re.findall(r'"(x\d+)"', text or "")}


def change(path: Path, what: str, number: int) -> None:
    """What a child does over and over until it is killed; ``lost`` once, and says that it is done."""
    if what == "lost":
        for file in path.parent.glob("db*"):
            file.unlink()
        restore(path, path.with_name("backup"), ANN)
        path.with_name("done").touch()
        signal.pause()
    elif what == "backup":
        backup(path, path.with_name(f"backup-{number}"))
    else:
        with closing(SqliteStore(path)) as store:
            store.change(numbered(number), WHOLE, ANN)
        if what == "restore":
            restore(path, path.with_name("backup"), ANN)


def killed(path: Path, what: str, number: int, after: float, there: Path | None = None) -> None:
    """Does it in a process of its own until that is killed; it opens the database itself.

    That is ``after`` so many seconds, which begin once the file ``there`` is.
    """
    if (pid := os.fork()) == 0:
        try:
            for each in count(number):
                change(path, what, each)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(1)
    try:
        if there is not None:
            until(there.exists)
        time.sleep(after)
    finally:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)  # it had not ended by itself


def made(path: Path) -> Path:
    with closing(SqliteStore(path)) as store:
        store.add_guest("vm-1")
        store.add_guest("vm-2")
        store.change(numbered(0), WHOLE, ANN)
    backup(path, path.with_name("backup"))
    return path


def is_whole(path: Path) -> SqliteStore:
    """The store after a kill; what is wrong with it fails the test."""
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    store = SqliteStore(path)
    assert len(numbers(store)) == 1  # a change-set is whole
    assert not store.is_behind()  # and so is what tells of it
    newest = store.history(1)[0]
    assert (newest.revision, newest.generation) == (store.revision(), store.generation())
    assert store.count() == AT_ONCE + 1
    return store


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("what", ["apply", "restore"])
def test_a_kill_leaves_a_change_whole_or_absent(tmp_path: Path, what: str, kills: int) -> None:
    path, chance, generation, done = made(tmp_path / "db"), random.Random(), 0, set()  # noqa: S311 - moments
    for number in range(kills):
        killed(path, what, 1 + 1000 * number, chance.random() * 0.15)
        with closing(is_whole(path)) as store:
            assert store.generation() >= generation
            generation = store.generation()
            done |= numbers(store)
    assert len(done) > 1  # some got somewhere


@pytest.mark.parametrize("kills", KILLS)
def test_a_kill_leaves_a_backup_whole_or_absent(tmp_path: Path, kills: int) -> None:
    path, chance = made(tmp_path / "db"), random.Random()  # noqa: S311 - moments
    for number in range(kills):
        killed(path, "backup", 1000 * number, chance.random() * 0.15)
        for file in tmp_path.glob("backup-*[0-9]"):
            open_backup(file).close()
            file.unlink()
    assert len(list(tmp_path.glob("*.part"))) <= kills
    backup(path, tmp_path / "backup-0")


@pytest.mark.parametrize("kills", KILLS)
def test_a_kill_leaves_what_was_lost_restored_or_absent(tmp_path: Path, kills: int) -> None:
    path, chance, absent = made(tmp_path / "db"), random.Random(), 0  # noqa: S311 - moments
    for number in range(kills):
        (done := tmp_path / "done").unlink(missing_ok=True)
        killed(path, "lost", number, chance.random() * 0.15, done if number == kills - 1 else None)
        if not path.exists():
            absent += 1
            continue
        with closing(is_whole(path)) as store:
            if store.revision() > 1:  # it was restored once
                assert set(store.quarantined()) == {"vm-1", "vm-2"}
    assert absent < kills  # the last one was done
    restore_anew(path)


def restore_anew(path: Path) -> None:
    for file in path.parent.glob("db*"):
        file.unlink()
    restore(path, path.with_name("backup"), ANN)
    for folder in path.parent.glob(".restore-*"):  # of those that were killed
        shutil.rmtree(folder)


# --- disks --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "persona-test", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # commands leave files open until their end


def fill(folder: Path, leave: int) -> Path:
    """A file that takes all but so many bytes."""
    free = shutil.disk_usage(folder).free
    (folder / "full").write_bytes(b"\0" * max(free - leave, 0))
    return folder / "full"


def state(path: Path) -> tuple[set[str], int, int]:
    with closing(SqliteStore(path)) as store:
        return numbers(store), store.revision(), store.generation()


def test_on_a_full_disk_a_change_is_whole_or_absent(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "3m") as folder:
        path, failed = made(folder / "db"), 0
        for number, leave in enumerate([*range(0, 120_000, 4096), 1_000_000], 1):
            before = state(path)
            full = fill(folder, leave)
            try:
                with closing(SqliteStore(path)) as store:
                    try:
                        store.change(numbered(number), WHOLE, ANN)
                    except StoreError:
                        failed += 1
                        full.unlink()
                        assert (numbers(store), store.revision(), store.generation()) == before
                        store.change(numbered(1000 + number), WHOLE, ANN)  # the same connection goes on
            except StoreError as error:  # not even a connection
                assert "full" in str(error) or "disk I/O" in str(error), error
                failed += 1
            full.unlink(missing_ok=True)
            is_whole(path).close()
        assert 1 < failed < number


def test_on_a_full_disk_a_backup_is_not_there_and_a_restore_changes_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "3m") as folder:
        path = made(folder / "db")
        with closing(SqliteStore(path)) as store:
            store.change(numbered(7), WHOLE, ANN)
        before = state(path)
        for leave in (0, 4096, 50_000, 100_000):
            full = fill(folder, leave)
            with pytest.raises((StoreError, OSError)):
                backup(path, folder / "b2")
            with pytest.raises((StoreError, OSError)):
                restore(path, folder / "backup", ANN)
            full.unlink()
            assert {file.name for file in folder.iterdir()} <= {"db", "db-wal", "db-shm", "backup"}
            assert state(path) == before
        restore(path, folder / "backup", ANN)
        is_whole(path).close()


def test_a_disk_that_nobody_can_write_to_can_be_read(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "3m") as folder:
        broker, path = Broker(folder), made(folder / "db")
        assert broker.run("migrate").returncode == 0  # the audit has what was done
        assert broker.run("audit", "tail").returncode == 0  # whoever reads leaves SQLite's log, also where nobody can
        file = write(tmp_path / "x.yaml", persona("A"), policy("a", persona="A"))
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        before = path.read_bytes()
        reading = ["history", "show a", "export", "check", "guest list", "policies list", "rollout", "diff 0"]
        reading += ["audit tail", "audit search", "audit verify", "audit gaps", "audit export", "records tail"]
        for words in reading:
            done = broker.run(*words.split())
            assert done.returncode in (0, 1) and not done.stderr, (words, done.stderr)
        for words in (f"apply {file}", "guest add vm", f"backup {folder}/b", f"restore {folder}/backup -y"):
            done = broker.run(*words.split())
            assert (done.returncode, "ead-only" in done.stderr or "readonly" in done.stderr) == (3, True), (words, done)
        assert path.read_bytes() == before
        assert broker.run("backup", str(tmp_path / "b")).returncode == 0
