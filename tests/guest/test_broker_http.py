"""The kept connection to the broker: one request reaches it once, whatever the answer looks like."""

import http.server
import json
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from persona_guest.broker.http import BrokerError, Connection, NotAsked
from persona_guest.settings import Broker

from persona import wire
from persona.problems import Reason


class FakeBroker(http.server.BaseHTTPRequestHandler):
    """Answers by path and counts; a fake."""

    protocol_version = "HTTP/1.1"
    seen: list[str]
    connections: list[int]

    def setup(self) -> None:
        self.connections.append(1)
        super().setup()

    versions: ClassVar[list[str]] = []  # that it names, one an answer; none once there are no more

    def do_GET(self) -> None:
        self.seen.append(self.path)
        self.send_response(200)
        self.name_version()
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def name_version(self) -> None:
        if self.versions:
            self.send_header(wire.HEADER, self.versions.pop(0))

    def do_POST(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(f"{self.path} in {said}" if said else self.path)
        if self.path == "/garbage":
            self.wfile.write(b"0\r\n\r\n")
            return
        self.send_response(204 if self.path == "/none" else 200)
        self.name_version()
        if self.path != "/none":
            self.send_header("Content-Length", "2")
        self.end_headers()
        if self.path != "/none":
            self.wfile.write(b"{}")
        self.close_connection = self.path == "/last"  # without saying so, as after idling

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


@pytest.fixture
def handler() -> type[FakeBroker]:
    return type("Handler", (FakeBroker,), {"seen": [], "connections": [], "versions": []})


@pytest.fixture
def connection(tmp_path: Path, handler: type[FakeBroker]) -> Iterator[Connection]:
    (tmp_path / "token").write_text("t")
    with Server(str(tmp_path / "sock"), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        connection = Connection(Broker(url=f"unix:{tmp_path}/sock", token_file=str(tmp_path / "token")))
        try:
            yield connection
        finally:
            connection.close()
            server.shutdown()
            thread.join()


def call(connection: Connection, path: str) -> tuple[int, object]:
    return connection.call("POST", path, {}, time.monotonic() + 5)


def test_answers_without_a_body_leave_the_connection_usable(connection: Connection, handler: type[FakeBroker]) -> None:
    for path, answer in (("/none", (204, None)), ("/none", (204, None)), ("/some", (200, {}))):
        assert call(connection, path) == answer
    assert handler.seen == ["/none", "/none", "/some"]
    assert len(handler.connections) == 1


def test_a_connection_that_was_closed_while_idle_is_made_anew(
    connection: Connection, handler: type[FakeBroker]
) -> None:
    assert call(connection, "/last") == (200, {})
    time.sleep(0.1)
    assert call(connection, "/some") == (200, {})
    assert handler.seen == ["/last", "/some"]


def test_an_answer_that_is_garbage_is_not_asked_for_again(connection: Connection, handler: type[FakeBroker]) -> None:
    call(connection, "/some")
    with pytest.raises(BrokerError) as failed:
        call(connection, "/garbage")
    assert failed.value.code == "broker_misbehaved"
    assert handler.seen == ["/some", "/garbage"]


def say(connection: Connection, path: str) -> tuple[int, object]:
    """A question whose words depend on the version of the protocol that the broker speaks."""
    return connection.call("POST", path, lambda version: version, time.monotonic() + 5)


def test_a_broker_is_asked_which_version_it_speaks_before_anything_else(
    connection: Connection, handler: type[FakeBroker]
) -> None:
    handler.versions = ["9", "9", "9"]
    assert say(connection, "/some") == say(connection, "/some") == (200, {})
    assert handler.seen == ["/healthz", "/some in 2", "/some in 2"]


def test_a_broker_that_names_no_version_is_the_first(connection: Connection, handler: type[FakeBroker]) -> None:
    assert say(connection, "/some") == (200, {})
    assert handler.seen == ["/healthz", "/some in 1"]


def test_the_answer_of_a_broker_that_became_older_is_not_taken(
    connection: Connection, handler: type[FakeBroker]
) -> None:
    """It may have skipped what it does not know, and granted for that."""
    handler.versions = ["2", "1", "1", "2", "2", "1"]
    assert say(connection, "/some") == (200, {})
    assert handler.seen == ["/healthz", "/some in 2", "/some in 1"]
    say(connection, "/some")  # and is newer again
    say(connection, "/some")
    assert handler.seen[3:] == ["/some in 1", "/some in 2"]
    assert say(connection, "/none") == (204, None)  # nothing but receipt: not told twice
    assert handler.seen[5:] == ["/none in 2"]


def test_a_version_that_is_none_is_no_answer(connection: Connection, handler: type[FakeBroker]) -> None:
    handler.versions = ["two"]
    with pytest.raises(BrokerError, match="Persona-Wire"):
        say(connection, "/some")


def test_a_question_that_an_older_broker_would_misunderstand_is_not_asked(
    connection: Connection, handler: type[FakeBroker]
) -> None:
    def body(version: int) -> object:
        raise NotAsked(Reason.BROKER_MISBEHAVED, f"not in {version}")

    with pytest.raises(NotAsked, match="not in 1"):
        connection.call("POST", "/some", body, time.monotonic() + 5)
    assert handler.seen == ["/healthz"]
    assert call(connection, "/some") == (200, {})
    assert len(handler.connections) == 1
