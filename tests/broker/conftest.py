"""A real broker: gunicorn on Unix sockets in a private directory."""

import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-for-tests"
VM = "analytics-1"


class UnixHttp(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(self._path))


class Broker:
    """One running broker and a client for it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.api, self.events = directory / "api.sock", directory / "events.sock"
        (directory / "token").touch(mode=0o600)
        (directory / "token").write_text(TOKEN)
        self.process: subprocess.Popen[bytes] | None = None

    def argv(self, *words: str) -> list[str]:
        head = [sys.executable, "-m", "persona_broker", "--config", f"{self.directory}/broker.toml"]
        return [*head, "--db", f"{self.directory}/db", *words]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.argv(*words), capture_output=True, text=True, timeout=30, env=environment())

    def start(self, *extra: str) -> None:
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            self.argv(
                "serve", "--bind", f"unix:{self.api}", "--events-bind", f"unix:{self.events}",
                "--apply", str(ROOT / "examples"), "--guest", VM, "--guest-token-file", f"{self.directory}/token",
                "--load-source", "set", "--ready-fd", str(writing), *extra,
            ),
            pass_fds=(writing,), env=environment(), start_new_session=True, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(writing)
        with os.fdopen(reading, "rb") as ready:
            assert ready.read(6) == b"ready\n"

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)

    def stream(self, token: str = TOKEN) -> tuple[UnixHttp, http.client.HTTPResponse]:
        """An event stream that has just begun; close the first."""
        connection = UnixHttp(self.events)
        connection.request("GET", "/v1/events", headers={"Authorization": f"Bearer {token}"})
        return connection, connection.getresponse()

    def call(self, method: str, path: str, body: object = None, token: str = TOKEN) -> tuple[int, Any]:
        connection = UnixHttp(self.api)
        try:
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            data = body if isinstance(body, bytes) or body is None else json.dumps(body)
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content[:1] in (b"{", b"[") else content
        finally:
            connection.close()


def environment() -> dict[str, str]:
    path = os.pathsep.join(str(ROOT / part) for part in ("", "broker", "guest"))
    return {**os.environ, "PYTHONPATH": path}


@pytest.fixture
def cli(tmp_path: Path) -> Broker:
    """Nothing serves; an empty directory with no record yet."""
    return Broker(tmp_path)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """The examples applied, CPU load at 30 %."""
    broker = Broker(tmp_path_factory.mktemp("broker"))
    assert broker.run("load", "set", "cpu=30").returncode == 0
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def ask(broker: Broker) -> Callable[..., tuple[int, Any]]:
    """Asks for a decision on a program by its bare name."""

    def decide(name: str, *arguments: str, user: str = "alice", vm: str = VM, **fields: Any) -> tuple[int, Any]:
        program = {"path": f"/usr/bin/{name}", "names": [name], "paths": [f"/usr/bin/{name}"]}
        request = {
            "subject": {"user": user, "groups": [], "vm": vm}, "session": "s-1", "program": program,
            "argv": [name, *arguments], "cwd": "/", "argv_complete": True,
        }  # fmt: skip
        return broker.call("POST", "/v1/decisions", {"request": request, **fields})

    return decide
