"""Sinks: everything arrives, in the form that its standard says, and none is ever in the way."""

import contextlib
import json
import os
import re
import socket
import sqlite3
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from persona_broker import pki
from persona_broker.audit import checkpoints, keys
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.format import split
from persona_broker.audit.delivery import Delivery
from persona_broker.audit.files import replace_file
from persona_broker.audit.sinks.interface import Line, Sink
from persona_broker.audit.sinks.journald import Journald
from persona_broker.audit.sinks.json_lines import JsonLines
from persona_broker.audit.sinks.runner import Runner
from persona_broker.audit.sinks.syslog import Syslog
from persona_broker.serve.audit_process import sinks_of
from persona_broker.settings import Audit
from persona_broker.store.sqlite import SqliteStore

from tests.broker.conftest import Broker
from tests.broker.test_audit_chain import said
from tests.waiting import until

RFC5424 = re.compile(
    rb"<(\d{1,3})>1 \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z (\S+) persona-broker (\d+) (record|checkpoint) - ([ -~]+)"
)


class Server:
    """A syslog server that takes octet-counted messages, over TLS where it has a certificate."""

    def __init__(self, certificate: Path | None = None, port: int = 0) -> None:
        self._listening = socket.create_server(("127.0.0.1", port))
        self.port = self._listening.getsockname()[1]
        self._context: ssl.SSLContext | None = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(certificate / "broker.crt", certificate / "broker.key")
        self.messages: list[bytes] = []
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self._listening.accept()
            except OSError:
                return
            try:
                connection = self._context.wrap_socket(plain, server_side=True) if self._context else plain
            except OSError:  # the client does not trust us
                plain.close()
                continue
            self._open.append(connection)
            with contextlib.suppress(OSError, ValueError), connection, connection.makefile("rb") as stream:
                while size := self._size(stream):
                    self.messages.append(stream.read(size))

    @staticmethod
    def _size(stream: object) -> int:
        digits = b""
        while (byte := stream.read(1)) not in (b" ", b""):  # type: ignore[attr-defined]
            digits += byte
        return int(digits or b"0")

    def end(self) -> None:
        """Closes everything: a server that is gone."""
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with closing(SqliteStore(tmp_path / "db")) as store:
        yield store


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    with closing(Chain(tmp_path / "audit")) as chain:
        chain.add([])
        yield chain


@contextlib.contextmanager
def running(sink: Sink, chain: Chain, store: SqliteStore, told: list[tuple[bool, int]] | None = None) -> Iterator[None]:
    found = told if told is not None else []
    runner = Runner(sink, chain, store, lambda failing, number: found.append((failing, number)))
    runner.start()
    until(lambda: bool(found))
    try:
        yield
    finally:
        runner.stop(5)


def append(chain: Chain, *users: str) -> None:
    chain.deliver([Delivery("vm-1", [split(said(user)) for user in users])])


def sent(lines: list[bytes] | list[str]) -> list[str]:
    """The users of the records in what arrived."""
    values = [json.loads(line) for line in lines]
    return [value["record"]["user"] for value in values if "record" in value]


@pytest.mark.parametrize("tls", [False, True])
def test_syslog(tmp_path: Path, chain: Chain, store: SqliteStore, tls: bool) -> None:
    pki.make(tmp_path / "tls", ["127.0.0.1", "localhost"])
    server = Server(tmp_path / "tls" if tls else None)
    append(chain, "before")  # what was there before a sink was named is for 'audit export'
    with running(
        Syslog("127.0.0.1", server.port, str(tmp_path / "tls" / "ca.pem") if tls else None, "host"), chain, store
    ):
        append(chain, "alice", "new\nline", "\udc80")
        chain.deliver([Delivery("vm-1", [split(said("bob", decision="denied"))])])
        until(lambda: len(server.messages) >= 4)
        key, _ = keys.load_or_make(tmp_path / "audit.key")
        made = checkpoints.make(chain, key)
        assert made is not None
        checkpoints.put(store, [made])
        until(lambda: len(server.messages) >= 5)
    server.end()
    found = [RFC5424.fullmatch(message) for message in server.messages]
    assert all(found)
    parts = [match.groups() for match in found if match]
    assert [int(priority) for priority, *_ in parts] == [110, 110, 110, 108, 109]  # log audit: info, warning, notice
    assert {(host, int(pid)) for _, host, pid, *_ in parts} == {(b"host", os.getpid())}
    assert sent([text for *_, text in parts]) == ["alice", "new\nline", "\udc80", "bob"]
    assert json.loads(parts[-1][-1]) == {"checkpoint": made.to_mapping()}


def test_a_server_that_nobody_vouches_for_gets_nothing(tmp_path: Path, chain: Chain, store: SqliteStore) -> None:
    pki.make(tmp_path / "tls", ["127.0.0.1"])
    pki.make(tmp_path / "other", ["127.0.0.1"])
    server = Server(tmp_path / "tls")
    told: list[tuple[bool, int]] = []
    with running(Syslog("127.0.0.1", server.port, str(tmp_path / "other" / "ca.pem"), "host"), chain, store, told):
        append(chain, "alice")
        until(lambda: told[-1][0])
    server.end()
    assert server.messages == []


def test_a_server_that_is_away_gets_everything_when_it_is_back(
    chain: Chain, store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    told: list[tuple[bool, int]] = []
    with running(Syslog("127.0.0.1", server.port, None, "host"), chain, store, told):
        append(chain, "one")
        until(lambda: len(server.messages) == 1)
        server.end()
        began = time.monotonic()
        append(chain, *(f"u{number}" for number in range(700)))
        assert time.monotonic() - began < 1  # nobody waits for it
        until(lambda: told[-1][0])
        assert "sink syslog does not work" in caplog.text
        again = Server(port=server.port)
        until(lambda: len(again.messages) >= 700)
        until(lambda: not told[-1][0])
    again.end()
    users = sent([message.partition(b" - ")[2] for message in [*server.messages, *again.messages]])
    assert users == ["one", *(f"u{number}" for number in range(700))]


def test_a_server_that_takes_nothing_is_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_broker.audit.sinks.syslog._TIMEOUT_S", 0.5)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    sink = Syslog("127.0.0.1", listening.getsockname()[1], None, "host")
    lines = [Line(1, 0, "record", 6, json.dumps("x" * 200_000))] * 50
    with closing(listening), pytest.raises(TimeoutError):
        sink.send(lines)


def test_a_file(tmp_path: Path, chain: Chain, store: SqliteStore) -> None:
    path = tmp_path / "audit.jsonl"
    with running(JsonLines(path), chain, store):
        append(chain, "one", "two")
        until(lambda: path.exists() and path.read_text().count("\n") == 2)
        path.rename(tmp_path / "rotated")  # logrotate
        append(chain, "three")
        until(lambda: path.exists() and path.read_text().count("\n") == 1)
        with path.open("a") as file:
            file.write('{"torn')  # as a full disk leaves it
        append(chain, "four")
        until(lambda: path.read_text().count("\n") == 3)
    assert path.stat().st_mode & 0o077 == 0
    lines = path.read_text().splitlines()
    assert (sent([lines[0], lines[2]]), lines[1]) == (["three", "four"], '{"torn')


def test_it_goes_on_where_it_was(tmp_path: Path, chain: Chain, store: SqliteStore) -> None:
    path = tmp_path / "audit.jsonl"
    for user in ("one", "two", "three"):
        with running(JsonLines(path), chain, store):
            append(chain, user)
        append(chain, f"after {user}")  # while nothing runs
    with running(JsonLines(path), chain, store):
        until(lambda: path.read_text().count("\n") == 6)
    assert sent(path.read_text().splitlines()) == [
        "one", "after one", "two", "after two", "three", "after three",
    ]  # fmt: skip


@pytest.mark.parametrize("more", [0, 9])
@pytest.mark.parametrize("known", ["checkpoint", "no checkpoint", "no hash"])
def test_a_chain_that_was_put_back_is_noticed_and_nothing_is_left_out(
    tmp_path: Path, chain: Chain, store: SqliteStore, caplog: pytest.LogCaptureFixture, known: str, more: int
) -> None:
    """``more``: the chain has caught up with what the sink had, before the sink looks."""
    path, cursor = tmp_path / "audit.jsonl", tmp_path / "audit" / "sink-json_lines.json"
    key, _ = keys.load_or_make(tmp_path / "audit.key")
    backup = tmp_path / "backup"
    with running(JsonLines(path), chain, store):
        append(chain, "one", "two")
        made = checkpoints.make(chain, key)
        assert made is not None
        checkpoints.put(store, [made] if known != "no checkpoint" else [])
        append(chain, "three")
        until(lambda: path.exists() and path.read_text().count("\n") == (4 if known != "no checkpoint" else 3))
        (segment,) = chain.segments()
        with closing(sqlite3.connect(segment)) as db, closing(sqlite3.connect(backup)) as copy:
            db.backup(copy)
        append(chain, "lost", "lost too")
        until(lambda: "lost too" in path.read_text())
    if known == "no hash":  # as a version of before wrote it
        value = json.loads(cursor.read_text())
        del value["hash"]
        cursor.write_text(json.dumps(value))
    chain.close()
    chain = Chain(chain.directory)
    for file in (tmp_path / "audit").glob("*.db*"):
        file.unlink()
    backup.rename(segment)
    append(chain, *(f"new {number}" for number in range(1 + more)))
    later = checkpoints.make(chain, key)  # it proves nothing of what the sink got
    assert later is not None
    checkpoints.put(store, [later])
    path.rename(tmp_path / "before")
    with running(JsonLines(path), chain, store):
        append(chain, "last")
        until(lambda: path.exists() and "last" in path.read_text())
    chain.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = [one["record"] for one in records if "record" in one]
    users = [one["user"] for one in found if "user" in one]
    new = [f"new {number}" for number in range(1 + more)]
    if known == "no hash" and more:  # nobody can tell any more
        assert "was put back" not in caplog.text
        return
    missing = [] if known != "no checkpoint" else ["one", "two"]
    assert users == [*missing, "three", *new, "last"]
    (told,) = [one for one in found if one.get("event") == "sink_set_back"]
    assert (told["sink"], told["from"], told["to"]) == ("json_lines", 6, 3 if not missing else 0)
    assert "the chain was put back to before that" in caplog.text


def test_a_new_chain_is_sent_from_its_beginning(
    tmp_path: Path, chain: Chain, store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "audit.jsonl"
    with running(JsonLines(path), chain, store):
        append(chain, "one", "two")
        until(lambda: path.exists() and path.read_text().count("\n") == 2)
    chain.close()
    chain = Chain(chain.directory)
    for file in (tmp_path / "audit").glob("*.db*"):
        file.unlink()
    append(chain, "other")
    with running(JsonLines(path), chain, store):
        until(lambda: "other" in path.read_text())
    assert caplog.text.count("was put back") == 1
    caplog.clear()
    with running(JsonLines(path), chain, store):  # it was noticed once
        append(chain, "last")
        until(lambda: "last" in path.read_text())
    chain.close()
    assert "was put back" not in caplog.text


def test_a_full_disk_stops_a_file_and_nothing_else(tmp_path: Path, chain: Chain, store: SqliteStore) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], check=True)
    told: list[tuple[bool, int]] = []
    try:
        with running(JsonLines(small / "audit.jsonl"), chain, store, told):
            append(chain, *(f"u{number}" for number in range(400)))
            until(lambda: told[-1][0])
            append(chain, "last")
            subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
            until(lambda: not told[-1][0] and told[-1][1] == chain.head()[0])
        found = set()
        for line in (small / "audit.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # where the disk was full
                found.add(json.loads(line)["record"]["user"])
        assert found == {*(f"u{number}" for number in range(400)), "last"}
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_the_journal(tmp_path: Path, chain: Chain, store: SqliteStore) -> None:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as journal:
        journal.bind(str(tmp_path / "journal"))
        journal.settimeout(10)
        with running(Journald(str(tmp_path / "journal")), chain, store):
            append(chain, "ali\nce")
            fields = read_fields(journal.recv(65536))
    assert (fields["PERSONA_USER"], fields["PERSONA_VM"], fields["PRIORITY"]) == ("ali\nce", "vm-1", "6")
    assert (fields["SYSLOG_IDENTIFIER"], fields["PERSONA_PROGRAM"]) == ("persona-broker", "/usr/bin/ls")
    assert json.loads(fields["MESSAGE"])["record"]["user"] == "ali\nce"


def read_fields(data: bytes) -> dict[str, str]:
    """The journal's native protocol, with sizes."""
    found = {}
    while data:
        name, _, data = data.partition(b"\n")
        size = int.from_bytes(data[:8], "little")
        found[name.decode()], data = data[8 : 8 + size].decode(), data[8 + size + 1 :]
    return found


def test_the_broker_feeds_the_sinks_that_its_settings_name(cli: Broker) -> None:
    path = cli.directory / "audit.jsonl"
    (cli.directory / "broker.toml").write_text(f'[audit]\njson_lines = "{path}"\nsyslog = "tcp://127.0.0.1:1"\n')
    cli.start()
    try:
        until((cli.directory / "audit" / "sink-json_lines.json").exists)  # from then on
        assert cli.call("POST", "/v1/records", {"records": [said()], "lost": 0})[0] == 204
        until(lambda: path.exists() and b"alice" in path.read_bytes())
        until(lambda: cli.call("GET", "/readyz")[1]["failing"] == ["sink syslog"])
        text = cli.call("GET", "/metrics")[1].decode()
        assert 'audit_sink_failing{sink="syslog"} 1' in text
        assert 'audit_sink_failing{sink="json_lines"} 0' in text
    finally:
        cli.stop()
    done = cli.run("audit", "verify", "--against", str(path), "--json")
    assert (done.returncode, json.loads(done.stdout)["checkpoints_given"] >= 1) == (0, True)


def test_settings_name_sinks() -> None:
    found = sinks_of(Audit(journald=True, syslog="tls://[::1]:6514", json_lines="/x"))
    assert [sink.name for sink in found] == ["journald", "syslog", "json_lines"]
    assert sinks_of(Audit()) == []


@pytest.mark.parametrize("fails", ["kept", "cursor", "record"])
def test_a_set_back_that_fails_once_is_done_and_told_once(
    tmp_path: Path, chain: Chain, store: SqliteStore, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """Whichever step fails: the comparison, the cursor, or the record."""
    append(chain, "one", "two")
    path = tmp_path / "audit.jsonl"
    value = json.dumps({"number": 2, "checkpoint_at_us": 0, "hash": "ab" * 32})
    (chain.directory / "sink-json_lines.json").write_text(value)
    failed: list[str] = []

    def once(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            if not failed:
                failed.append(name)
                raise OSError("once")
            return real(*values)

        return call

    if fails == "kept":
        monkeypatch.setattr(checkpoints, "kept", once(fails, checkpoints.kept))
    elif fails == "cursor":
        monkeypatch.setattr("persona_broker.audit.sinks.runner.replace_file", once(fails, replace_file))
    else:
        monkeypatch.setattr(chain, "add", once(fails, chain.add))
    with running(JsonLines(path), chain, store):
        until(lambda: path.exists() and "sink_set_back" in path.read_text())
    assert failed == [fails]
    records = [json.loads(line)["record"] for line in path.read_text().splitlines()]
    assert [one["user"] for one in records if "user" in one] == ["one", "two"]
    assert [(one["from"], one["to"]) for one in records if one.get("event") == "sink_set_back"] == [(2, 0)]
    assert [row for row in chain.read(0, 100) if "sink_set_back" in row.facts][1:] == []


def test_a_set_back_is_told_by_who_comes_after_one_that_was_killed(
    tmp_path: Path, chain: Chain, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the record and the cursor, whichever comes first."""
    append(chain, "one", "two")
    path, cursor = tmp_path / "audit.jsonl", chain.directory / "sink-json_lines.json"
    cursor.write_text(json.dumps({"number": 2, "checkpoint_at_us": 0, "hash": "ab" * 32}))
    written: list[str] = []

    def dies_second(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            if written:
                raise KeyboardInterrupt
            written.append(name)
            return real(*values)

        return call

    monkeypatch.setattr(chain, "add", dies_second("record", chain.add))
    monkeypatch.setattr("persona_broker.audit.sinks.runner.replace_file", dies_second("cursor", replace_file))
    runner = Runner(JsonLines(path), chain, store, lambda _failing, _number: None)
    with pytest.raises(KeyboardInterrupt):
        while runner._send_next():
            pass
    monkeypatch.undo()
    with running(JsonLines(path), chain, store):
        append(chain, "last")
        until(lambda: path.exists() and "last" in path.read_text())
    records = [json.loads(line)["record"] for line in path.read_text().splitlines()]
    assert [one["user"] for one in records if "user" in one] == ["one", "two", "last"]
    told = [(one["from"], one["to"]) for one in records if one.get("event") == "sink_set_back"]
    assert told in ([(2, 0)], [(2, 0)] * 2)
