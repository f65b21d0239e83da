"""The database: versions, what is of one moment, what is bounded, and who may read the file."""

import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from persona_broker.store.interface import SessionRow, StoreError
from persona_broker.store.sqlite import SqliteStore
from persona_broker.view import State

from persona.decisions import Subject
from persona.documents import parse_document
from tests.broker.conftest import apply


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "db")
    yield store
    store.close()


def documents(*patterns: str) -> list[Any]:
    return [
        parse_document({"kind": "Persona", "name": "A", "command_whitelist": list(patterns)}),
        parse_document({"kind": "Policy", "name": "a", "subjects": {"users": ["alice"]}, "persona": "A"}),
    ]


def test_a_version_is_new_only_where_the_content_is(store: SqliteStore) -> None:
    assert apply(store, documents("ls")).added == ("Persona A", "Policy a")
    first = store.generation()
    assert not apply(store, documents("ls"))
    assert store.generation() == first  # no lease ends for nothing
    assert not apply(store, documents("ls")[::-1])  # a persona has no place
    assert store.generation() == first
    assert apply(store, documents("cat")).changed == ("Persona A",)
    assert apply(store, documents("ls")).changed == ("Persona A",)
    assert store.version("Persona", "A") == (3, documents("ls")[0])  # going back is a new version
    assert store.version("Persona", "A", 1) == (1, documents("ls")[0])
    assert store.version("Persona", "A", 2) == (2, documents("cat")[0])
    assert store.version("Persona", "A", 4) is store.version("Policy", "A") is None
    assert store.generation() > first
    assert apply(store, documents("ls")[:1]).removed == ("Policy a",)


def test_nobody_else_reads_it(store: SqliteStore, tmp_path: Path) -> None:
    apply(store, documents("ls"))
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.glob("db*")} == {0o600}


def test_sessions_are_bounded(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_broker.store.sessions.SESSIONS_KEPT", 5)
    for guest in ("vm", "other"):
        for number in range(8):
            ident = f"{guest}-{number}"
            assert store.open_session(SessionRow(ident, guest, Subject("a", (), guest), "", "", number, False))
            if number == 0:
                store.revoke(ident)
    # the newest of each, and the revoked one: who floods does not become free by it
    assert {s.id for s in store.sessions() if s.guest == "vm"} == {"vm-0", "vm-4", "vm-5", "vm-6", "vm-7"}
    assert store.revoked() == {"vm-0", "other-0"}


def test_two_guests_cannot_share_a_session(store: SqliteStore) -> None:
    row = SessionRow("s", "vm", Subject("alice", (), "vm"), "", "", 1.0, False)
    assert store.open_session(row)
    assert store.open_session(row)
    assert not store.open_session(SessionRow("s", "other", Subject("bob", (), "other"), "", "", 1.0, False))
    assert not store.end_session("s", "other")
    assert store.end_session("s", "vm")


def test_no_thread_answers_from_before_a_change(tmp_path: Path) -> None:
    """Whoever knows of a change gets an answer from after it, also while another thread is busy loading it."""
    writer, state = SqliteStore(tmp_path / "db"), State(SqliteStore(tmp_path / "db"), 15)
    stop, late = threading.Event(), []
    written = writer.generation()

    def ask() -> None:
        while not stop.is_set():
            known = written
            found = state.current(known).generation
            if found < known:
                late.append((found, known))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        written = writer.raise_generation()
    stop.set()
    for thread in threads:
        thread.join()
    assert late == []


def test_a_change_that_nobody_was_told_of_is_seen_at_once_too(tmp_path: Path) -> None:
    writer, state = SqliteStore(tmp_path / "db"), State(SqliteStore(tmp_path / "db"), 15)
    for _ in range(20):
        state.current()
        written = writer.raise_generation()
        time.sleep(0.005)
        assert state.current().generation == written


def test_a_record_that_cannot_be_read_decides_nothing(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "db")
    state = State(store, 15)
    assert state.current().generation == 1
    store.close()
    time.sleep(0.005)
    with pytest.raises(StoreError):
        state.current()


def test_a_user_is_revoked_everywhere_and_their_sessions_end_where_asked(store: SqliteStore) -> None:
    for guest, ident, user in (("vm", "s-1", "alice"), ("vm", "s-2", "bob"), ("other", "s-3", "alice")):
        assert store.open_session(SessionRow(ident, guest, Subject(user, (), guest), "", "", 1.0, False))
    first = store.generation()
    assert [session.id for session in store.revoke("nobody")] == []
    assert (store.revoke("alice", "third"), store.generation()) == ([], first)
    assert [session.id for session in store.revoke("alice", "other", end=True)] == ["s-3"]
    assert store.generation() == first + 1
    assert store.revoked() == store.ending() == {"s-3"}
    with store.writing() as db:  # what cannot be read of a session does not keep it from being revoked
        db.execute("UPDATE sessions SET groups = 'torn {'")
    assert [session.id for session in store.revoke("alice")] == ["s-1", "s-3"]
    assert store.revoked() == {"s-1", "s-3"}
    assert store.ending() == {"s-3"}
    assert store.end_session("s-3", "other")
    assert store.ending() == frozenset()


def test_what_a_guest_left_is_over(store: SqliteStore) -> None:
    for guest in ("vm", "other", "removed"):
        store.add_guest(guest)
        for number in range(3):
            row = SessionRow(f"{guest}-{number}", guest, Subject("a", (), guest), "", "", 100.0 * number, False)
            assert store.open_session(row)
    store.revoke("vm-0", end=True)
    assert store.end_all_but("vm", ["vm-1", "other-0"], 150.0) == 1  # it has vm-1, and vm-2 is too young
    assert {session.id for session in store.sessions() if session.guest != "removed"} == {
        "vm-1", "vm-2", "other-0", "other-1", "other-2",
    }  # fmt: skip
    assert (store.revoked(), store.ending()) == (frozenset(), frozenset())
    assert store.remove_guest("removed")
    assert "removed" not in {session.guest for session in store.sessions()}
    with store.writing() as db:  # as a broker of before did
        db.execute("DELETE FROM guests WHERE name = 'other'")
    assert store.end_strays() == 3
    assert {session.id for session in store.sessions()} == {"vm-1", "vm-2"}
