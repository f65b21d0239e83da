"""Backups of a database that is written to, and going back to one without undercutting what a guest has seen."""

import errno
import http.client
import json
import os
import sqlite3
import stat
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from persona_broker.policy.merge import ADD
from persona_broker.store.backup import backup, open_backup
from persona_broker.store.interface import Author, SessionRow
from persona_broker.store.restore import EPOCH_BITS, Removals, epoch_of, replace_lost, restore
from persona_broker.store.schema import MIGRATIONS
from persona_broker.store.sqlite import SqliteStore

from persona.decisions import Subject
from persona.documents import parse_document
from persona.problems import PersonaError
from tests.broker.conftest import VM, Broker, apply
from tests.broker.test_apply import persona, policy, write
from tests.broker.test_history import answer
from tests.broker.test_rollout import until
from tests.broker.test_schema import content, old, version

ANN = Author("ann")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database with a revision, guests, and sessions; ``backup`` beside it is of this moment."""
    path = tmp_path / "db"
    with closing(SqliteStore(path)) as store:
        for vm in ("vm-1", "vm-2", "vm-3"):
            store.add_guest(vm, f"token-of-{vm}")
            store.open_session(SessionRow(f"s-{vm}", vm, Subject("alice", (), vm), "sshd", "", 1.0, False))
        apply(store, [parse_document(item) for item in (persona("A", "ls"), policy("a"))])
    backup(path, tmp_path / "backup")
    return path


def goes_on(path: Path) -> dict[str, Any]:
    """What happens after the backup; what guests have seen of it."""
    with closing(SqliteStore(path)) as store:
        apply(store, [parse_document(item) for item in (persona("A", "nmap"), policy("a"), policy("b", "bob"))])
        apply(store, [parse_document(item) for item in (persona("A", "cat"), policy("a"))])
        store.remove_guest("vm-2")
        store.add_guest("vm-3", "another token")
        store.add_guest("vm-4", "a new guest")
        store.revoke("s-vm-1", end=True)
        version = store.version("Persona", "A")
        assert version is not None
        return {"generation": store.generation(), "revision": store.revision(), "version": version[0]}


def lose(path: Path) -> None:
    for file in path.parent.glob("db*"):
        file.unlink()


def shown(store: SqliteStore, number: int | None = None) -> list[Any]:
    return [document for document, _ in (store.documents() if number is None else store.documents_at(number))]


def test_a_backup_is_of_one_moment_while_others_write(path: Path, tmp_path: Path) -> None:
    stop = threading.Event()

    def write_on(number: int) -> None:
        with closing(SqliteStore(path)) as store:
            count = 0
            while not stop.is_set():
                count += 1
                store.add_lost(1)
                store.change([parse_document(persona(f"N{number}", f"x{count}"))], ADD, ANN)

    threads = [threading.Thread(target=write_on, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(5):
            backup(path, tmp_path / f"b{number}")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    sizes = []
    for number in range(5):
        file = tmp_path / f"b{number}"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        open_backup(file).close()
        with closing(SqliteStore(file)) as store:
            newest = store.revision()
            sizes.append(newest)
            assert sorted(map(str, shown(store))) == sorted(map(str, shown(store, newest)))
            assert store.generation() == newest + 1  # each change-set raised it once
    assert sizes == sorted(sizes)
    assert not list(tmp_path.glob("*.part"))


def test_a_backup_overwrites_nothing(path: Path, tmp_path: Path) -> None:
    before = (tmp_path / "backup").read_bytes()
    with pytest.raises(PersonaError, match="is there already, and no backup is overwritten"):
        backup(path, tmp_path / "backup")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(PersonaError, match="is there already"):
        backup(path, tmp_path / "link")
    assert (tmp_path / "backup").read_bytes() == before
    with pytest.raises(OSError, match="No such file"):
        backup(path, tmp_path / "no folder" / "x")


def test_a_disk_without_links_has_backups_too(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "as vfat says")

    monkeypatch.setattr(os, "link", refuse)
    backup(path, tmp_path / "b2")
    open_backup(tmp_path / "b2").close()
    assert not list(tmp_path.glob("*.part"))
    lose(path)
    restore(path, tmp_path / "b2", ANN)
    with closing(SqliteStore(path)) as store:
        assert store.count() == 2


def test_of_a_database_that_is_not_migrated_there_is_a_backup(tmp_path: Path) -> None:
    before = content(old(tmp_path / "db"))
    backup(tmp_path / "db", tmp_path / "b")
    assert content(tmp_path / "db") == before
    open_backup(tmp_path / "b").close()
    assert version(tmp_path / "b") == 0


def test_what_is_there_still_goes_back_and_undercuts_nothing(path: Path, tmp_path: Path) -> None:
    seen = goes_on(path)
    done = restore(path, tmp_path / "backup", Author("ann", "oops"))
    with closing(SqliteStore(path)) as store:
        assert shown(store) == [parse_document(persona("A", "ls")), parse_document(policy("a"))]
        assert done.generation == store.generation() > seen["generation"]
        assert (epoch_of(done.generation) > 0, done.generation % (1 << EPOCH_BITS)) == (True, 0)
        assert (done.revision, store.revision(), done.backup_revision) == (seen["revision"] + 1,) * 2 + (1,)
        newest = store.history(1)[0]
        assert (
            newest.author.message.startswith("restore of a backup of 20")
            and "(revision 1): oops" in newest.author.message
        )
        assert [(item.name, item.before, item.after) for item in newest.items] == [("A", 3, 1)]
        assert len(store.history(100)) == 4  # nothing of the history is gone
        assert not store.is_behind()
        assert set(store.guests()) == {"vm-1", "vm-3"}  # who was removed, or came since, is not there
        assert "another token" not in store.tokens() and len(store.tokens()) == 2
        assert sorted(store.tokens().values()) == ["vm-1", "vm-3"]
        assert {row.id: row.ending for row in store.sessions()} == {"s-vm-1": True, "s-vm-3": False}
        assert (done.gone, done.quarantined, store.quarantined()) == (("vm-4",), (), {})
        assert store.change([parse_document(persona("A", "new"))], ADD, ANN).revision == done.revision + 1
        assert store.version("Persona", "A") == (4, parse_document(persona("A", "new")))  # no number is used twice
        again = restore(path, tmp_path / "backup", ANN)
        assert epoch_of(again.generation) > epoch_of(done.generation)


def test_which_domain_a_guest_is_stays_where_the_database_is_there_and_comes_back_where_it_is_lost(
    path: Path, tmp_path: Path
) -> None:
    """And what concerned some guests before concerns them all after it."""
    with closing(SqliteStore(path)) as store:
        store.bind("vm-1", "u1")
        store.bind("vm-2", "u2")
    backup(path, tmp_path / "bound")
    with closing(SqliteStore(path)) as store:
        store.unbind("vm-2")
        store.bind("vm-3", "u3")
        store.raise_generation_for(["vm-1"])
    for lost, uuids in ((False, {"vm-1": "u1", "vm-3": "u3"}), (True, {"vm-1": "u1", "vm-2": "u2"})):
        if lost:
            lose(path)
        restore(path, tmp_path / "bound", ANN)
        with closing(SqliteStore(path)) as store:
            assert {guest: binding.uuid for guest, binding in store.bindings().items()} == uuids
            assert store.shared_generation() == store.generation()


def test_the_token_of_before_a_renewal_never_comes_back(path: Path, tmp_path: Path) -> None:
    with closing(SqliteStore(path)) as store:
        before = {name: key for key, name in store.tokens().items()}
        goes_on(path)
        restore(path, tmp_path / "backup", ANN)
        after = {name: key for key, name in store.tokens().items()}
    assert (before["vm-3"] != after["vm-3"], before["vm-1"] == after["vm-1"]) == (True, True)


def test_what_is_lost_comes_back_with_all_guests_in_quarantine(path: Path, tmp_path: Path) -> None:
    seen = goes_on(path)
    lose(path)
    done = restore(path, tmp_path / "backup", ANN)
    assert done.quarantined == ("vm-1", "vm-2", "vm-3")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with closing(SqliteStore(path)) as store:
        assert store.generation() == done.generation > seen["generation"]
        assert done.revision == store.revision() > seen["revision"]
        assert shown(store) == shown(store, done.revision) == shown(store, 1)
        store.change([parse_document(persona("A", "another"))], ADD, ANN)
        found = store.version("Persona", "A")
        assert found is not None and found[0] > seen["version"] + 1  # the lost one gave that number to another text
        assert store.revision() == done.revision + 1
        before = store.generation()
        assert store.readmit(["vm-1", "stranger"]) == ["vm-1"]
        assert (store.generation() > before, set(store.quarantined())) == (True, {"vm-2", "vm-3"})
        store.remove_guest("vm-2")
        assert set(store.quarantined()) == {"vm-3"}
        assert store.rows("SELECT 1 FROM meta WHERE key = 'backup_at'") == []
    assert list(tmp_path.glob(".restore-*")) == []


def test_what_the_audit_tells_is_taken_again_and_nobody_waits(path: Path, tmp_path: Path) -> None:
    goes_on(path)
    lose(path)
    known = Removals(frozenset({"vm-2"}), frozenset({"s-vm-3"}), frozenset({"s-vm-1"}), complete=True)
    with closing(open_backup(tmp_path / "backup")) as source:
        done = replace_lost(path, source, ANN, known)
    with closing(SqliteStore(path)) as store:
        assert (done.gone, done.quarantined, store.quarantined()) == (("vm-2",), (), {})
        assert store.guests() == ["vm-1", "vm-3"]
        assert {row.id: (row.revoked, row.ending) for row in store.sessions()} == {
            "s-vm-1": (True, True), "s-vm-3": (True, False),
        }  # fmt: skip


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 4096)


def _torn(file: Path) -> None:
    size = file.stat().st_size
    with file.open("r+b") as opened:
        for page in range(2, size // 4096):
            opened.seek(page * 4096)
            opened.write(b"\xff" * 600)


def _sql(text: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        with closing(sqlite3.connect(file)) as db, db:
            db.executescript(text)

    return change


_BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (_cut, "it is cut: "),
    "cut to nothing": (lambda file: os.truncate(file, 0), "it is no database"),
    "another file": (lambda file: file.write_text("hello" * 1000), "it is no database"),
    "in use": (lambda file: file.with_name("backup-wal").write_bytes(b"x"), "so it is in use"),
    "torn": (_torn, "it is damaged"),
    "newer": (_sql(f"PRAGMA user_version = {len(MIGRATIONS) + 1}"), "was written by a newer one"),
    "a dump": (_sql("PRAGMA user_version = 0"), "and no version"),
    "somebody's": (_sql("DROP TABLE applied; PRAGMA user_version = 1"), "it is no broker's database"),
    "another text": (_sql("UPDATE documents SET body = replace(body, 'ls', 'lz')"), "not what was applied: Persona A"),
    "a trigger": (_sql("CREATE TRIGGER x AFTER INSERT ON guests BEGIN DELETE FROM sessions; END"), "no broker made x"),
    "a view": (_sql("CREATE VIEW x AS SELECT 1"), "no broker made x"),
    "no site": (_sql("DELETE FROM meta WHERE key = 'site'"), "says of no site that it is of"),
    "another site": (_sql("UPDATE meta SET value = '\"abc\"' WHERE key = 'site'"), "is of another site than"),
    "another past": (_sql("UPDATE change_sets SET at = 7"), "has another history"),
}


@pytest.mark.parametrize("name", _BAD)
def test_what_is_not_fit_is_named_and_overwrites_nothing(path: Path, tmp_path: Path, name: str) -> None:
    spoil, said = _BAD[name]
    goes_on(path)
    file = tmp_path / "backup"
    spoil(file)
    before = content(path)
    with pytest.raises(PersonaError) as caught:
        restore(path, file, ANN)
    assert str(file) in caught.value.message and said in caught.value.message
    assert "othing was changed" in caught.value.message
    assert content(path) == before
    if "site" not in name and name != "another past":  # which only an existing database can contradict
        lose(path)
        with pytest.raises(PersonaError):
            restore(path, file, ANN)
        assert not path.exists() and list(tmp_path.glob(".restore-*")) == []


def test_a_database_that_is_broken_is_left_to_whoever_may_save_it(path: Path, tmp_path: Path) -> None:
    _torn(path)
    before = path.read_bytes()
    with pytest.raises(PersonaError, match=f"{path} cannot be used .*; stop the service, move {path}, {path}-wal"):
        restore(path, tmp_path / "backup", ANN)
    assert path.read_bytes() == before
    lose(path)
    (tmp_path / "db-wal").write_bytes(b"of the lost one")
    with pytest.raises(PersonaError, match="db-wal is left of the lost database; move it away"):
        restore(path, tmp_path / "backup", ANN)
    assert not path.exists()


def test_a_text_that_was_damaged_long_ago_keeps_nobody_from_a_restore(cli: Broker, path: Path, tmp_path: Path) -> None:
    """It is no version of anything: nothing shows it as one, and what is applied is whole."""
    goes_on(path)
    _sql("UPDATE documents SET body = '{' WHERE version = 1 AND name = 'A'")(path)
    done = cli.run("backup", str(tmp_path / "b2"), "--json")
    assert (done.returncode, json.loads(done.stdout)["damaged"]) == (1, ["Persona A (version 1)"])
    lose(path)
    assert cli.run("restore", str(tmp_path / "b2"), "--yes").returncode == 0
    assert "cannot be read" in cli.run("show", "A", "--version", "1").stderr


@pytest.mark.parametrize("schema", [0, 2, 3])
def test_a_copy_of_an_older_version_is_restored_where_nothing_is(tmp_path: Path, schema: int) -> None:
    file = old(tmp_path / "old")
    with closing(sqlite3.connect(file)) as db, db:
        for statement in (text for migration in MIGRATIONS[1:schema] for text in migration):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {schema}")
    done = restore(tmp_path / "db", file, ANN)
    with closing(SqliteStore(tmp_path / "db")) as store:
        assert (store.guests(), done.quarantined) == (["analytics-1"], ("analytics-1",))
        assert len(store.rows("SELECT 1 FROM records")) == 10
    with pytest.raises(PersonaError, match="says of no site"):
        restore(tmp_path / "db", file, ANN)


def test_the_commands(cli: Broker, path: Path, tmp_path: Path) -> None:
    file = tmp_path / "b2"
    value = answer(cli, "backup", str(file))
    assert (value["revision"], value["size"], value["damaged"]) == (1, file.stat().st_size, [])
    cli.run("apply", write(tmp_path / "x.yaml", persona("A", "nmap"), policy("a")))
    done = cli.run("restore", str(file))
    assert (done.returncode, "there is no terminal on which to ask" in done.stderr) == (4, True)
    assert answer(cli, "history", "-n", "1")["items"][0]["revision"] == 2
    assert answer(cli, "restore", str(file), "--yes", "-m", "why")["revision"] == 3
    assert cli.run("show", "A").stdout.startswith("# Persona A, version 1")
    lose(path)
    done = cli.run("restore", str(file), "--yes")
    assert (done.returncode, "3 guests in quarantine" in done.stdout) == (0, True), done.stderr
    assert "vm-1  quarantined 20" in cli.run("guest", "list").stdout
    explained = cli.run("explain", "--user", "alice", "--vm", "vm-1", "--", "ls").stdout
    assert explained.endswith("vm-1 is in quarantine since a restore: it is denied everything until 'guest readmit'\n")
    assert json.loads(cli.run("rollout", "1", "--json").stdout)["since_s"] < 60  # until the restore
    assert cli.run("guest", "readmit").returncode == 1
    assert "not in quarantine: nobody; nothing was changed" in cli.run("guest", "readmit", "vm-1", "nobody").stderr
    assert answer(cli, "guest", "readmit", "vm-1") == {"ok": True, "readmitted": ["vm-1"]}
    assert [item["quarantined_at"] is None for item in answer(cli, "guest", "list")["items"]] == [True, False, False]
    assert cli.run("guest", "readmit", "--all").stdout == "vm-2 readmitted\nvm-3 readmitted\n"
    assert cli.run("restore", str(tmp_path / "none"), "--yes").returncode == 3


def of_another_epoch(response: http.client.HTTPResponse, than: int) -> int:
    """The first generation of an event stream in a later epoch; conditions raise it within one, too."""
    while epoch_of(found := int(json.loads(response.readline())["generation"])) == epoch_of(than):
        assert found >= than
    assert found > than
    return found


def test_guests_of_a_running_broker_go_on_above_what_they_have_seen(tmp_path: Path) -> None:
    """Restored while it serves, then lost and restored: a guest that was told of everything is told of more."""
    broker = Broker(tmp_path)
    broker.start()
    subject = {"user": "alice", "groups": [], "vm": VM}
    program = {"path": "/usr/bin/ls", "names": ["ls"], "paths": ["/usr/bin/ls"]}
    request = {
        "subject": subject, "session": "s-1", "program": program, "argv": ["ls"], "cwd": "/", "argv_complete": True,
    }  # fmt: skip

    def ask(generation: int) -> dict[str, Any]:
        status, found = broker.call("POST", "/v1/decisions", {"request": request, "min_generation": generation})
        assert status == 200, found
        return dict(found)

    try:
        assert broker.run("load", "set", "cpu=30").returncode == 0
        assert broker.run("backup", str(tmp_path / "backup")).returncode == 0
        assert (
            broker.run(
                "apply", "--yes", "--prune", write(tmp_path / "x.yaml", persona("Only"), policy("only", "eve", "Only"))
            ).returncode
            == 0
        )
        connection, response = broker.stream()
        seen = json.loads(response.readline())["generation"]
        assert ask(seen)["decision"] == "denied"
        assert broker.run("restore", str(tmp_path / "backup"), "--yes").returncode == 0
        newest = of_another_epoch(response, seen)
        until(lambda: ask(newest)["decision"], "granted")  # once the load is known
        connection.close()
    finally:
        broker.stop()
    lose(tmp_path / "db")
    assert broker.run("restore", str(tmp_path / "backup"), "--yes").returncode == 0
    broker.start(applied=())
    try:
        connection, response = broker.stream()
        last = int(json.loads(response.readline())["generation"])
        assert epoch_of(last) > epoch_of(newest)
        denied = ask(last)
        assert (denied["decision"], denied["reason"]) == ("denied", "guest_quarantined")
        assert "persona-broker guest readmit" in denied["help"]
        opened = {"session": "s-2", "subject": subject, "service": "sshd", "remote": ""}
        status, refused = broker.call("POST", "/v1/sessions", opened)
        assert (status, refused["admitted"], refused["denied"]["reason"]) == (200, False, "guest_quarantined")
        assert broker.run("guest", "readmit", VM).returncode == 0
        until(lambda: ask(last)["decision"], "granted")
        assert broker.call("POST", "/v1/sessions", opened)[0] == 201
        connection.close()
    finally:
        broker.stop()
