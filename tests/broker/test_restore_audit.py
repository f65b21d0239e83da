"""What a restore does to the audit, and what a restore of a lost database learns from it."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from persona_broker.audit import checkpoints, holds, keys
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.format import split
from persona_broker.audit.delivery import Delivery
from persona_broker.audit.inbox import take_over, waiting
from persona_broker.audit.search import Wanted, each
from persona_broker.store.interface import Author, SessionRow
from persona_broker.store.sqlite import SqliteStore

from persona.decisions import Subject
from tests.broker.conftest import Broker
from tests.broker.test_apply import persona, policy, write
from tests.broker.test_audit_chain import said

ANN = Author("ann")


@pytest.fixture
def site(cli: Broker) -> Iterator[Broker]:
    """Guests, sessions, a key and a checkpoint; ``backup`` is of then, and the audit has what was done after it."""
    with closing(SqliteStore(cli.directory / "db")) as store, closing(Chain(cli.directory / "audit")) as chain:
        for vm in ("vm-1", "vm-2", "vm-3"):
            store.add_guest(vm, f"token-of-{vm}")
            store.open_session(SessionRow(f"s-{vm}", vm, Subject("alice", (), vm), "sshd", "", 1.0, False))
        holds.add(store, "user", "bob", ANN)
        take_over(store, chain)
        chain.deliver([Delivery("vm-1", [split(said())])])
        checkpoint(cli, store, chain)
        store.put_set_load({"cpu": 1.0}, ANN)  # it waits, in the backup too
        assert cli.run("backup", str(cli.directory / "backup")).returncode == 0
        store.remove_guest("vm-2", ANN)
        store.add_guest("vm-3", "another token", ANN)
        store.add_guest("vm-4", author=ANN)
        store.revoke("s-vm-1", end=True, author=ANN)
        holds.remove(store, "user", "bob", ANN)
        holds.add(store, "session", "s-9", ANN)
        take_over(store, chain)
    yield cli


def checkpoint(broker: Broker, store: SqliteStore, chain: Chain) -> None:
    key, _ = keys.load_or_make(broker.directory / "audit.key")
    made = checkpoints.make(chain, key)
    assert made is not None
    checkpoints.put(store, [made])


def lose(broker: Broker) -> None:
    for file in broker.directory.glob("db*"):
        file.unlink()


def restore(broker: Broker, *words: str) -> dict[str, Any]:
    done = broker.run("restore", str(broker.directory / "backup"), "--yes", "--json", *words)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def events(broker: Broker, name: str) -> list[dict[str, Any]]:
    with closing(Chain(broker.directory / "audit")) as chain:
        return [one.record for one in each(chain, Wanted(event=name, guests_only=False))]


def holds_of(broker: Broker) -> list[tuple[str, str]]:
    with closing(SqliteStore(broker.directory / "db")) as store:
        return [(item.kind, item.name) for item in holds.holds(store)]


def revoked(broker: Broker) -> tuple[frozenset[str], frozenset[str]]:
    with closing(SqliteStore(broker.directory / "db")) as store:
        return store.revoked(), store.ending()


@pytest.mark.parametrize("kept", [False, True])
def test_what_the_audit_says_was_taken_is_taken_again(site: Broker, kept: bool) -> None:
    lose(site)
    done = restore(site, *(("--audit-kept",) if kept else ()))
    assert done["gone"] == ["vm-2", "vm-3", "vm-4"]  # vm-3 has a token that no backup has
    assert done["quarantined"] == ([] if kept else ["vm-1"])
    assert site.run("guest", "list").stdout.startswith("vm-1" if kept else "vm-1  quarantined")
    assert revoked(site) == (frozenset({"s-vm-1"}), frozenset({"s-vm-1"}))
    assert holds_of(site) == [("session", "s-9")]


def test_each_guest_is_bound_to_the_domain_that_it_was_bound_to_last(cli: Broker) -> None:
    with closing(SqliteStore(cli.directory / "db")) as store, closing(Chain(cli.directory / "audit")) as chain:
        for number in range(1, 8):
            store.add_guest(f"vm-{number}")
        for number in (1, 2, 3, 5, 6, 7):
            store.bind(f"vm-{number}", f"U{number}", ANN)
        store.remove_guest("vm-7", ANN)  # so shortly before the backup that it may be without it
        store.add_guest("vm-7", author=ANN)
        take_over(store, chain)
        checkpoint(cli, store, chain)
        assert cli.run("backup", str(cli.directory / "backup")).returncode == 0
        store.unbind("vm-2", ANN)  # two were mixed up
        store.bind("vm-1", "U2", ANN)
        store.bind("vm-2", "U1", ANN)
        store.unbind("vm-3", ANN)
        store.bind("vm-4", "U9", ANN)
        store.bind("vm-4", "U3", ANN)
        store.bind("vm-5", "U10", ANN)
        store.remove_guest("vm-5", ANN)
        store.add_guest("vm-8", author=ANN)  # with a token that no backup has
        store.bind("vm-8", "U8", ANN)
        take_over(store, chain)
    lose(cli)
    done = restore(cli, "--audit-kept")
    assert (done["gone"], done["quarantined"]) == (["vm-5", "vm-8"], [])
    with closing(SqliteStore(cli.directory / "db")) as store:
        found = {guest: binding.uuid for guest, binding in store.bindings().items()}
        assert "vm-7" in store.guests()
    assert found == {"vm-1": "U2", "vm-2": "U1", "vm-4": "U3", "vm-6": "U6"}


def test_the_chain_goes_on_after_a_restore_and_tells_of_it_once(site: Broker) -> None:
    before = json.loads(site.run("audit", "verify", "--json").stdout)
    lose(site)
    done = restore(site, "-m", "the disk died")
    after = json.loads(site.run("audit", "verify", "--json").stdout)
    assert (after["whole"], after["checkpoints"], after["last"]) == (True, 1, before["last"] + 2)
    (told,) = events(site, "database_restored")
    assert (told["lost"], told["revision"], told["quarantined"]) == (True, done["revision"], ["vm-1"])
    assert told["message"] == "the disk died"
    assert [one["revision"] for one in events(site, "change_set")] == [done["revision"]]
    assert len(events(site, "load_set")) == 1  # it waited in the backup, and was in the audit already
    assert restore(site)["quarantined"] == []  # where the database is there
    assert [one["lost"] for one in events(site, "database_restored")] == [True, False]
    with closing(SqliteStore(site.directory / "db")) as store:
        assert waiting(store) == 0


def test_where_the_audit_is_lost_too_a_new_one_begins_and_the_loss_is_told(site: Broker) -> None:
    lose(site)
    (site.directory / "audit").rename(site.directory / "audit-of-before")
    done = restore(site)
    assert (done["gone"], done["quarantined"]) == ([], ["vm-1", "vm-2", "vm-3"])
    assert [one["lost"] for one in events(site, "database_restored")] == [True]
    assert len(events(site, "load_set")) == 1  # from the backup, in which it waited
    value = json.loads(site.run("audit", "verify", "--json").stdout)
    assert (value["whole"], [item["kind"] for item in value["items"]]) == (False, ["checkpoint"])


def _cut(site: Broker) -> None:
    (segment,) = Chain(site.directory / "audit").segments()
    with closing(sqlite3.connect(segment)) as db, db:
        db.execute("DELETE FROM records WHERE number = 3")


def _another(site: Broker) -> None:
    for file in (site.directory / "audit").glob("*.db*"):
        file.unlink()
    with closing(Chain(site.directory / "audit")) as chain:
        chain.deliver([Delivery("vm-1", [split(said())] * 20)])


def _unreadable(site: Broker) -> None:
    (segment,) = Chain(site.directory / "audit").segments()
    for file in (site.directory / "audit").glob("*.db-*"):
        file.unlink()
    segment.write_bytes(b"no database" * 1000)


def _no_checkpoint(site: Broker) -> None:
    with closing(sqlite3.connect(site.directory / "backup")) as db, db:
        db.execute("DELETE FROM audit_checkpoints")


@pytest.mark.parametrize("harm", [_cut, _another, _unreadable, _no_checkpoint])
def test_an_audit_that_cannot_tell_all_is_not_taken_for_it(site: Broker, harm: Any) -> None:
    lose(site)
    harm(site)
    done = site.run("restore", str(site.directory / "backup"), "--yes", "--audit-kept")
    assert done.returncode in (1, 3) and "cannot tell all that was taken" in done.stderr, done.stderr
    assert not (site.directory / "db").exists()
    assert "vm-1" in restore(site)["quarantined"]


def test_what_a_command_did_is_in_the_audit_when_it_ends(cli: Broker, tmp_path: Path) -> None:
    file = write(tmp_path / "x.yaml", persona("A"), policy("a", persona="A"))
    for words in (f"apply {file}", "guest add vm", "load set cpu=3", "guest remove vm"):
        assert cli.run(*words.split()).returncode == 0
    with closing(Chain(cli.directory / "audit")) as chain:
        found = [one.record["event"] for one in each(chain, Wanted(guests_only=False))]
    assert found == ["segment_opened", "change_set", "guest_added", "load_set", "guest_removed"]


def test_a_command_does_what_it_does_where_the_audit_cannot_take_it(cli: Broker) -> None:
    assert cli.run("guest", "add", "vm").returncode == 0
    for file in (cli.directory / "audit").iterdir():
        file.unlink()
    (cli.directory / "audit").rmdir()
    (cli.directory / "audit").write_text("in the way")
    done = cli.run("guest", "remove", "vm")
    assert (done.returncode, "done, but it waits in the database" in done.stderr) == (0, True), done.stderr
    (cli.directory / "audit").unlink()
    assert cli.run("migrate").stdout == "1 record moved into the audit\n"
    assert [one["vm"] for one in events(cli, "guest_removed")] == ["vm"]
