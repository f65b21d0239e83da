"""The kept connection to the broker: one request reaches it once, whatever the answer looks like."""

import http.server
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from persona_guest.broker_client.http import BrokerError, Connection
from persona_guest.settings import Broker


class FakeBroker(http.server.BaseHTTPRequestHandler):
    """Answers by path and counts; a fake."""

    protocol_version = "HTTP/1.1"
    seen: list[str]
    connections: list[int]

    def setup(self) -> None:
        self.connections.append(1)
        super().setup()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append(self.path)
        if self.path == "/garbage":
            self.wfile.write(b"0\r\n\r\n")
            return
        self.send_response(204 if self.path == "/none" else 200)
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
    return type("Handler", (FakeBroker,), {"seen": [], "connections": []})


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
