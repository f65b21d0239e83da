"""The database's schema version: every old database becomes a new one, whole or not at all, and a newer one is left."""

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from persona_broker.store import schema
from persona_broker.store.interface import StoreError
from persona_broker.store.schema import MIGRATIONS, NewerSchemaError
from persona_broker.store.sqlite import SqliteStore

from scripts.completions import parser_of, read
from tests import releases
from tests.broker.conftest import ROOT, environment, here

RECORDS = 20_000
BODY = '{"user": "alice", "decision": "denied", "reason": "no_matching_policy"}'
OPEN = """
import sys
from pathlib import Path
from persona_broker.store.sqlite import SqliteStore
SqliteStore(Path(sys.argv[1]))
"""


def old(path: Path, records: int = 10) -> Path:
    """A database as 0.1.0 leaves it behind."""
    with closing(sqlite3.connect(path)) as db, db:
        for statement in MIGRATIONS[0]:
            db.execute(statement)
        db.execute("UPDATE meta SET value = '7' WHERE key = 'generation'")
        db.execute("INSERT INTO guests VALUES ('analytics-1', 'abc')")
        db.executemany("INSERT INTO records (guest, body) VALUES ('analytics-1', ?)", [(BODY,)] * records)
    return path


def content(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as db:
        return list(db.iterdump())


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def test_a_new_database_has_the_newest_version(tmp_path: Path) -> None:
    SqliteStore(tmp_path / "db").close()
    assert version(tmp_path / "db") == len(MIGRATIONS)


def test_one_of_0_1_0_keeps_everything(tmp_path: Path) -> None:
    before = content(old(tmp_path / "db"))
    store = SqliteStore(tmp_path / "db")
    assert (store.generation(), store.guests()) == (7, ["analytics-1"])
    store.close()
    assert version(tmp_path / "db") == len(MIGRATIONS)
    assert {line for line in before if line.startswith("INSERT")} <= set(content(tmp_path / "db"))


def test_what_0_1_0_itself_made_keeps_everything(tmp_path: Path) -> None:
    """Its own code fills it: documents in two versions, guests, a session, records."""
    tree, path = releases.unpack(tmp_path), tmp_path / "db"
    (tmp_path / "x.yaml").write_text("{kind: Persona, name: A, command_whitelist: [ls]}\n")
    head = [sys.executable, "-m", "persona_broker", "--db", str(path)]
    for words in (("apply", str(tmp_path / "x.yaml")), ("apply", str(tree / "examples")), ("guest", "add", "vm-1")):
        subprocess.run([*head, *words], env=environment(tree), check=True, capture_output=True)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("INSERT INTO sessions VALUES ('s', 'vm-1', 'alice', '[\"g\"]', 'sshd', '::1', 7.5, 1)")
        db.execute("INSERT INTO records (guest, body) VALUES ('vm-1', ?)", (BODY,))
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        before = {name: db.execute(f"SELECT * FROM {name}").fetchall() for name in tables}  # noqa: S608 - its own
    assert broker(path, "migrate").returncode == 0
    with closing(sqlite3.connect(path)) as db:
        for name in set(tables) - {"records"}:
            assert set(before[name]) <= set(db.execute(f"SELECT * FROM {name}").fetchall()), name  # noqa: S608
    assert json.loads(broker(path, "records", "tail", "--json").stdout)["reason"] == "no_matching_policy"
    assert before["documents"] and before["guests"] and before["meta"]
    assert broker(path, "check").returncode == 0
    assert "what was applied before there were revisions" in broker(path, "history").stdout


def test_a_newer_one_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "db"
    SqliteStore(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE moons (phase TEXT)")
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    before = content(path)
    with pytest.raises(NewerSchemaError, match=f"{path} has schema version {len(MIGRATIONS) + 1}"):
        SqliteStore(path)
    assert content(path) == before
    done = here([sys.executable, "-m", "persona_broker", "--db", str(path), "guest", "list"])
    assert done.returncode == 3
    assert "was written by a newer one; install that version again, or restore a backup" in done.stderr


READING: tuple[tuple[str, ...], ...] = (
    ("check",), ("check", "--merged", str(ROOT / "examples")), ("check", "--upgrade"),
    ("apply", "--dry-run", str(ROOT / "examples")), ("rollback", "1", "--dry-run"), ("history",), ("show", "A"),
    ("export",), ("diff", "1"), ("explain", "--user", "u", "--vm", "v", "--", "ls"), ("policies", "list"),
    ("sets", "list"), ("guest", "list"), ("load", "show"), ("health",), ("sessions", "list"), ("records", "tail"),
    ("audit", "verify"), ("audit", "search"), ("audit", "tail"), ("audit", "export"), ("audit", "gaps"),
    ("audit", "key"), ("audit", "hold", "list"), ("audit", "prune", "--before", "2026-01-01", "--dry-run"),
    ("rollout",), ("coverage",),
)  # fmt: skip
WRITING = {
    "serve", "apply", "rollback", "migrate", "backup", "restore", "guest add", "guest remove", "guest readmit",
    "guest bind", "guest unbind",
    "load set", "sessions revoke", "tls init", "audit erase", "audit hold add", "audit hold remove",
    "audit prune", "audit acknowledge-loss",
}  # fmt: skip


def broker(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return here([sys.executable, "-m", "persona_broker", "--db", str(path), *words])


def test_each_command_either_reads_or_writes() -> None:
    top = read(parser_of("persona-broker"))
    commands = {command.path.strip() for command in top.all() if not command.below}
    reading = {name for name in commands for words in READING if f"{' '.join(words)} ".startswith(f"{name} ")}
    assert reading | WRITING == commands
    assert reading & WRITING == {"apply", "rollback", "audit prune"}  # with --dry-run


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_who_only_reads_writes_nothing(tmp_path: Path, words: tuple[str, ...]) -> None:
    """No migration either: the service may run as an older version still."""
    path = old(tmp_path / "db")
    path.chmod(0o400)
    before = path.read_bytes()
    done = broker(path, *words)
    if words == ("check", "--upgrade"):  # is for just that moment
        assert done.returncode == 0, done.stderr
    else:
        fix = f"{path} has schema version 0, and this persona-broker wants {len(MIGRATIONS)}; 'persona-broker migrate'"
        assert (done.returncode, fix in done.stderr) == (3, True), done.stderr
    assert path.read_bytes() == before
    path.unlink()
    assert broker(path, "guest", "add", "vm").returncode == 0
    assert broker(path, "apply", str(ROOT / "examples"), "-m", "why").returncode == 0
    before = path.read_bytes()
    assert broker(path, *words).returncode in (0, 1)
    assert path.read_bytes() == before


def test_a_dry_run_makes_no_database(tmp_path: Path) -> None:
    done = broker(tmp_path / "db", "apply", "--dry-run", str(ROOT / "examples"))
    assert (done.returncode, "added: " in done.stdout) == (0, True), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_migrate_says_what_it_did(tmp_path: Path) -> None:
    path = old(tmp_path / "db")
    moved = "10 records moved into the audit"
    assert broker(path, "migrate").stdout == f"schema version 0 -> {len(MIGRATIONS)}\n{moved}\n"
    assert broker(path, "migrate").stdout == "nothing to do\n"
    assert broker(path, "guest", "list").stdout == "analytics-1\n"
    assert broker(tmp_path / "none", "migrate").returncode == 3


@pytest.mark.parametrize("known", range(len(MIGRATIONS) + 1))
def test_what_a_dump_lost_is_said_and_not_made_up(tmp_path: Path, known: int) -> None:
    """sqlite3's .dump leaves the version out: such a database is a later one that looks like 0.1.0's."""
    with closing(sqlite3.connect(tmp_path / "made")) as db, db:
        for migration in MIGRATIONS[:known]:
            for statement in migration:
                db.execute(statement)
    with closing(sqlite3.connect(tmp_path / "db")) as db, db:
        db.executescript("\n".join(content(tmp_path / "made")))
    before = content(tmp_path / "db")
    done = broker(tmp_path / "db", "migrate")
    if known < 3:  # whose migrations make only what is not there
        assert done.returncode == 0, done.stderr
        return
    assert (done.returncode, f'"PRAGMA user_version = {known}"' in done.stderr) == (3, True), done.stderr
    assert content(tmp_path / "db") == before
    with closing(sqlite3.connect(tmp_path / "db")) as db:
        db.execute(f"PRAGMA user_version = {known}")
    assert broker(tmp_path / "db", "migrate").returncode == 0
    assert version(tmp_path / "db") == len(MIGRATIONS)


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(old(tmp_path / "db"))
    broken = ("CREATE TABLE moons (phase TEXT)", "DELETE FROM records", "INSERT INTO moon VALUES (1)")
    monkeypatch.setattr(schema, "MIGRATIONS", (*MIGRATIONS, broken))
    with pytest.raises(StoreError, match="no such table: moon"):
        SqliteStore(tmp_path / "db")
    assert (content(tmp_path / "db"), version(tmp_path / "db")) == (before, 0)
    monkeypatch.undo()
    SqliteStore(tmp_path / "db").close()
    assert version(tmp_path / "db") == len(MIGRATIONS)


def test_on_a_full_disk_nothing_changes(tmp_path: Path) -> None:
    before = content(old(tmp_path / "db", 2000))
    with closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(sqlite3.OperationalError, match="full"):
            schema.migrate(db)
    assert (content(tmp_path / "db"), version(tmp_path / "db")) == (before, 0)


def test_of_many_at_once_one_migrates(tmp_path: Path) -> None:
    old(tmp_path / "db", 2000)
    with ThreadPoolExecutor(8) as pool:
        for store in pool.map(lambda _: SqliteStore(tmp_path / "db"), range(8)):
            store.close()
    assert version(tmp_path / "db") == len(MIGRATIONS)


def test_of_many_that_make_a_database_at_once_each_has_it(tmp_path: Path) -> None:
    """As gunicorn's workers may: SQLite waits for nobody while the write-ahead log is turned on."""
    with ThreadPoolExecutor(8) as pool:
        for number in range(60):
            path = tmp_path / f"db{number}"
            for store in pool.map(lambda _, path=path: SqliteStore(path), range(8)):
                store.close()
            assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.soak)])
def test_a_kill_at_any_moment_leaves_the_old_one_or_the_new_one(tmp_path: Path, kills: int) -> None:
    whole = old(tmp_path / "whole", RECORDS)
    tables = len(content(whole)) - 1
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", OPEN, str(old(tmp_path / "first", RECORDS))],
        check=True,
        env=environment(ROOT),
        timeout=60,
    )
    takes = time.monotonic() - began
    versions = []
    for number in range(kills):
        path = tmp_path / f"db{number}"
        path.write_bytes(whole.read_bytes())
        with subprocess.Popen([sys.executable, "-c", OPEN, str(path)], env=environment(ROOT)) as process:
            time.sleep(takes * (number + random.random()) / kills)  # noqa: S311 - a moment, no secret
            process.send_signal(signal.SIGKILL)
        versions.append(version(path))
        with closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            assert db.execute("SELECT count(*) FROM records").fetchone()[0] == RECORDS
            added = db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'records_denied'").fetchone()[0]
        assert (versions[-1], added) in ((0, 0), (len(MIGRATIONS), 1))
        SqliteStore(path).close()
        assert len(content(path)) > tables
    assert 0 in versions
