"""What users share: no one of them can take the journal, the broker's ear or the agent's socket from the others."""

import json
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from persona_guest.audit import upload
from persona_guest.audit.journal import PER_SECOND, Journal
from persona_guest.audit.room import Room
from persona_guest.audit.spool import Spool
from persona_guest.broker.client import _bounded
from persona_guest.broker.fair_queue import FairQueue
from persona_guest.broker.http import BrokerError, Connection
from persona_guest.ipc import users
from persona_guest.ipc.users import Call, Respond, UserSocket, Whois
from persona_guest.loop import Loop
from persona_guest.settings import Broker
from persona_guest.system.accounts import caller_of

from persona import wire
from persona.codec import MAX_BODY, encode_request
from persona.decisions import Program, Request, Subject
from persona.problems import Reason
from persona.record_codec import Record


def test_a_flood_of_one_delays_nobody_else() -> None:
    queue: FairQueue[str] = FairQueue(share_max=100, total_max=1000)
    assert all(queue.put("alice", f"a{number}") for number in range(100))
    assert not queue.put("alice", "one too many")
    assert queue.put("bob", "b0")
    assert queue.put("bob", "b1")
    assert [queue.get() for _ in range(4)] == ["a0", "b0", "a1", "b1"]
    assert [queue.get() for _ in range(98)] == [f"a{number}" for number in range(2, 100)]


def test_all_together_are_bounded_and_get_waits() -> None:
    queue: FairQueue[int] = FairQueue(share_max=5, total_max=12)
    assert sum(queue.put(f"user{number % 10}", number) for number in range(50)) == 12
    for _ in range(12):
        queue.get()
    timer = threading.Timer(0.1, lambda: queue.put("late", 7))
    timer.start()
    assert queue.get() == 7


def record(session: str, event: str = "exec", decision: str = "denied") -> Record:
    return Record(0, session, "u", "/bin/x", ("x",), decision, None, None, None, None, event, False, False)


def test_a_flood_of_refusals_leaves_room_in_the_journal_and_is_counted() -> None:
    now = [100.0]
    lines: list[tuple[str, dict[str, str]]] = []
    journal = Journal(lambda text, fields: lines.append((text, fields)), lambda: now[0])
    for _ in range(5000):
        journal.add(record("s-a"))
    journal.add(record("s-b"))
    journal.add(record("s-a", "session_end"))
    journal.add(record("s-a", "exec", "granted"))
    assert [fields["PERSONA_SESSION"] for _, fields in lines].count("s-a") == PER_SECOND + 1
    assert "s-b" in {fields["PERSONA_SESSION"] for _, fields in lines}
    now[0] += 1
    journal.add(record("s-b"))
    assert any("4981 more of session s-a" in text for text, _ in lines)


def test_a_command_line_that_json_makes_too_long_is_one_that_is_too_long() -> None:
    long = Request(Subject("u", (), "v"), "s", Program("/x", (), ()), ("\x01" * 60_000,), "/", True)
    assert len(json.dumps(encode_request(long))) > MAX_BODY
    bounded = _bounded(long)
    assert not bounded.argv_complete
    assert len(json.dumps(encode_request(bounded))) < MAX_BODY
    plain = Request(Subject("u", (), "v"), "s", Program("/x", (), ()), ("x" * 60_000,), "/", True)
    assert _bounded(plain) is plain


class Served:
    """A user socket in a thread of its own, whose handler is a fake."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls: list[Call] = []
        self.held: list[Respond] = []
        self.loop = Loop()
        self.whois: Whois = caller_of
        self.socket = UserSocket(self.loop, path, self._handle, lambda uid: self.whois(uid))
        self._thread = threading.Thread(target=self.loop.run)
        self._thread.start()

    def _handle(self, call: Call, answer: Respond) -> None:
        self.calls.append(call)
        if call.op == "later":
            self.held.append(answer)
        elif call.op == "broken":
            raise KeyError("unforeseen")
        else:
            answer({"ok": True})

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(5)
        connection.connect(str(self.path))
        return connection

    def stop(self) -> None:
        deadline = time.monotonic() + 2
        while self.socket._count and time.monotonic() < deadline:  # until it has seen that they hung up
            time.sleep(0.01)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    found = Served(tmp_path / "sock")
    yield found
    found.stop()


def ask(connection: socket.socket, op: str) -> dict[str, Any]:
    connection.send(json.dumps({"op": op}).encode())
    answer: dict[str, Any] = json.loads(connection.recv(1000))
    return answer


def test_nobody_asks_faster_than_he_is_answered(served: Served) -> None:
    with served.connect() as connection:
        for _ in range(50):
            connection.send(b'{"op": "later"}')
        time.sleep(0.3)
        assert len(served.calls) == 1
        for number in range(1, 51):
            served.loop.call_soon_threadsafe(lambda: served.held.pop()({"ok": True}))
            assert json.loads(connection.recv(1000)) == {"ok": True}
            deadline = time.monotonic() + 2
            while len(served.calls) < min(number + 1, 50) and time.monotonic() < deadline:
                time.sleep(0.002)
            assert len(served.calls) == min(number + 1, 50)


def test_whoever_hangs_up_before_his_answer_is_forgotten(served: Served) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(40):  # more than one user may have at once
        with served.connect() as connection:
            connection.send(b'{"op": "later"}')
            while not served.held:
                time.sleep(0.002)
        answer = served.held.pop()
        time.sleep(0.01)
        served.loop.call_soon_threadsafe(lambda answer=answer: answer({"ok": True}))  # type: ignore[misc]
    time.sleep(0.2)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    with served.connect() as connection:
        assert ask(connection, "now") == {"ok": True}


def test_an_error_of_the_agents_own_ends_neither_it_nor_the_connection(served: Served) -> None:
    with served.connect() as connection:
        assert ask(connection, "broken")["code"] == "internal"
        assert ask(connection, "now") == {"ok": True}


def test_a_user_has_only_so_many_connections(served: Served) -> None:
    held = [served.connect() for _ in range(30)]
    assert ask(held[0], "now") == {"ok": True}
    with pytest.raises(OSError):
        ask(held[29], "now")
        held[29].recv(10)
    for connection in held:
        connection.close()


def test_a_descriptor_whose_closing_waits_for_its_sender_delays_nobody(served: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        full = socket.create_connection(server.getsockname())
        full.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        full.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                full.send(bytes(1 << 16))
        full.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
        with served.connect() as other, served.connect() as mine:  # now: neither may last longer than 8 s
            held, closed = threading.Event(), threading.Event()

            def hold() -> None:
                held.set()
                closed.wait(20)

            served.loop.call_soon_threadsafe(hold)  # or its copy might be closed before ours, which then waits
            assert held.wait(5)
            socket.send_fds(mine, [b'{"op": "now"}'], [full.fileno()])
            os.close(full.detach())  # the copy that was sent is the last
            closed.set()
            began = time.monotonic()
            assert ask(other, "now") == {"ok": True}
            assert time.monotonic() - began < 4  # and not 30
            assert json.loads(mine.recv(1000))["code"] == "bad_request"


def test_a_user_database_that_takes_its_time_delays_only_who_asks(served: Served) -> None:
    asked, knows = threading.Event(), threading.Event()

    def slow(_uid: int) -> None:
        asked.set()
        knows.wait(20)

    served.whois = slow
    with served.connect() as mine, served.connect() as other:
        mine.send(b'{"op": "status"}')
        assert asked.wait(5)
        served.whois = caller_of
        assert ask(other, "status") == {"ok": True}
        assert [call.caller.user for call in served.calls if call.caller] == ["root"]
        knows.set()
        assert json.loads(mine.recv(1000)) == {"ok": True}
        assert served.calls[-1].caller is None


@pytest.mark.parametrize("op", ["release", "plan", "list", "greeting", "explain", "listener", "no such op"])
def test_the_user_database_is_asked_only_for_what_needs_it(served: Served, op: str) -> None:
    """The emergency exit above all: what makes it needed may be that the database is away."""
    knows = threading.Event()

    def away(_uid: int) -> None:
        knows.wait(20)

    served.whois = away
    with served.connect() as connection:
        connection.settimeout(2)
        try:
            assert ask(connection, op) == {"ok": True}
        finally:
            knows.set()
    assert served.calls[-1].caller is None


@pytest.mark.parametrize("op", ["gate", "status"])
def test_what_needs_to_know_who_asks_is_told(served: Served, op: str) -> None:
    with served.connect() as connection:
        assert ask(connection, op) == {"ok": True}
    assert served.calls[-1].caller == caller_of(os.geteuid())


@pytest.mark.parametrize(
    "data", [b"{", b"[1]", b"{}", b'{"op": 1}', b"[" * 60_000, b"\xff", b'{"op": "' + b"x" * 65536]
)
def test_what_is_no_request_is_refused_and_the_next_one_served(served: Served, data: bytes) -> None:
    with served.connect() as connection:
        connection.send(data)
        assert json.loads(connection.recv(1000))["code"] in ("bad_request", "too_large")
        assert ask(connection, "now") == {"ok": True}


def test_an_o_path_descriptor_comes_through(served: Served) -> None:
    with served.connect() as connection:
        program = os.open("/usr/bin/true", os.O_PATH)
        socket.send_fds(connection, [b'{"op": "now"}'], [program])
        os.close(program)
        assert json.loads(connection.recv(1000)) == {"ok": True}
        assert len(served.calls[-1].fds) == 1


def test_a_descriptor_whose_path_is_too_long_to_be_told_is_refused(served: Served, tmp_path: Path) -> None:
    """readlink(2) of it fails: in a thread of the agent's, whose end would be the agent's."""
    here = os.open(tmp_path, os.O_PATH)
    for number in range(22):
        name = f"{number:x<200}"
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_PATH, dir_fd=here)
        os.close(here)
        here = below
    deep = os.open("file", os.O_CREAT | os.O_RDWR, dir_fd=here)
    try:
        with pytest.raises(OSError, match="File name too long"):
            os.readlink(f"/proc/self/fd/{deep}")
        with served.connect() as connection:
            socket.send_fds(connection, [b'{"op": "now"}'], [deep])
            assert json.loads(connection.recv(1000))["code"] == "bad_request"
            assert ask(connection, "now") == {"ok": True}
    finally:
        os.close(deep)
        os.close(here)


def test_an_error_while_a_request_is_read_is_answered(served: Served) -> None:
    def broken(_uid: int) -> None:
        raise RuntimeError("a module of the user database")

    served.whois = broken
    with served.connect() as connection:
        assert ask(connection, "status")["code"] == "internal"
        assert ask(connection, "now") == {"ok": True}


def test_one_with_many_uids_leaves_room_for_root(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    uids = iter([*range(1000, 1030), 0])
    monkeypatch.setattr(users, "peer_credentials", lambda _connection: (1, next(uids), 1))
    monkeypatch.setattr(users, "_TOTAL_MAX", 20)
    held = [served.connect() for _ in range(31)]
    assert ask(held[19], "now") == ask(held[30], "now") == {"ok": True}
    with pytest.raises(OSError):
        ask(held[20], "now")
        held[20].recv(10)
    for connection in held:
        connection.close()


def test_a_flood_of_one_while_the_broker_is_away_costs_nobody_elses_records(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[dict[str, Any]] = []
    away = threading.Event()
    away.set()

    def call(_self: Connection, _method: str, _path: str, body: Any, _deadline: float) -> tuple[int, None]:
        if away.is_set():
            raise BrokerError(Reason.BROKER_UNREACHABLE, "away")
        said = body(wire.CURRENT)
        kept.extend(said["records"])
        assert said["lost"] == 0
        return 204, None

    monkeypatch.setattr(Connection, "call", call)
    journal: list[Record] = []
    recorder = upload.Recorder(Broker(), journal.append, Spool(bound=64 * 1024))
    for _ in range(300):
        recorder.add(record("s-a"))
    for _ in range(5):
        recorder.add(replace(record("s-b"), user="other"))
    deadline = time.monotonic() + 5
    while len(journal) < 305 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(journal) == 305
    away.clear()
    recorder.close()
    assert sum(item["session"] == "s-b" for item in kept) == 5
    flood = sum(item["session"] == "s-a" for item in kept)
    assert 20 <= flood <= 60
    (lost,) = (item["lost"] for item in kept if item["event"] == "lost")
    assert flood + lost["last"] - lost["first"] + 1 == 300
    numbers = [*(item["number"] for item in kept), *range(lost["first"], lost["last"] + 1)]
    assert sorted(numbers) == list(range(1, 307))


@pytest.mark.parametrize("decision", ["denied", "granted"])
def test_a_flood_of_one_while_the_journal_hangs_costs_nobody_elses_records(
    monkeypatch: pytest.MonkeyPatch, decision: str
) -> None:
    monkeypatch.setattr(upload, "_QUEUE_MAX", 100)
    hangs = threading.Event()
    journal: list[Record] = []
    spool = Spool()

    def write(record: Record) -> None:
        hangs.wait(10)
        journal.append(record)

    recorder = upload.Recorder(Broker(), write, spool)
    for _ in range(500):
        recorder.add(record("s-a", decision=decision))
    refusal = recorder.refusal("u")
    assert refusal is not None and refusal.reason is Reason.AUDIT_FULL
    assert recorder.refusal("other") is None
    for _ in range(5):
        recorder.add(replace(record("s-b"), user="other"))
    hangs.set()
    recorder.close()
    assert sum(found.user == "other" for found in journal) == 5
    lost = spool.status().lost["queue_full"]
    assert len(journal) + lost == 505
    assert 25 <= len(journal) <= 35


def test_denials_find_room_where_granted_starts_find_none() -> None:
    room = Room(1000)
    for user in map(str, range(300)):
        while room.has(user, 10, grant=True):
            room.take(user, 10, grant=True)
    assert room.used <= 750
    assert room.has("new", 50, grant=False) and not room.has("new", 50, grant=True)
    assert room.has("0", 10, grant=False)


def test_each_that_takes_all_they_can_leaves_four_fifths_of_what_was_free() -> None:
    chance = random.Random(3)  # noqa: S311 - the same each time
    for _ in range(50):
        room = Room(chance.randrange(2000, 100_000))
        taken: dict[tuple[str, bool], int] = {}
        greedy = chance.randrange(1, 9)
        for _ in range(3000):
            user, grant, size = f"u{chance.randrange(greedy)}", chance.random() < 0.5, chance.randrange(1, 200)
            if chance.random() < 0.1 and taken.get((user, grant), 0) >= size:
                room.give_back(user, size, grant=grant)
                taken[user, grant] -= size
            elif room.has(user, size, grant=grant):
                room.take(user, size, grant=grant)
                taken[user, grant] = taken.get((user, grant), 0) + size
            assert room.used == sum(taken.values()) <= room.bound
        free = room.bound * 0.8 ** (2 * greedy)  # of either kind
        assert room.bound - room.used >= free
        assert room.has("new", int(free) // 5 - 1, grant=False)
        for (user, grant), size in taken.items():
            room.give_back(user, size, grant=grant)
        assert room.used == 0 and room.has("new", room.bound * 3 // 20 - 1, grant=True)
