"""A real broker: gunicorn on Unix sockets in a private directory."""

import contextlib
import http.client
import io
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from persona_broker.__main__ import main
from persona_broker.policy.diff import Changes
from persona_broker.policy.merge import WHOLE, How, Stored
from persona_broker.store.interface import Author
from persona_broker.store.sqlite import SqliteStore

from persona import wire

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
    """One running broker, of the version whose tree is ``root``, and a client for it."""

    def __init__(self, directory: Path, root: Path = ROOT) -> None:
        self.directory = directory
        self._root = root
        self.api, self.events = directory / "api.sock", directory / "events.sock"
        (directory / "token").touch(mode=0o600)
        (directory / "token").write_text(TOKEN)
        self.process: subprocess.Popen[bytes] | None = None

    def argv(self, *words: str) -> list[str]:
        head = [sys.executable, "-m", "persona_broker", "--config", f"{self.directory}/broker.toml"]
        return [*head, "--db", f"{self.directory}/db", *words]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """One command; in this process where the code is this tree's, since a start costs ten times what it does."""
        argv = self.argv(*words)
        if self._root != ROOT:
            return subprocess.run(argv, capture_output=True, text=True, timeout=30, env=environment(self._root))
        with _ONE_AT_A_TIME:
            done = here(argv)
        time.sleep(_OLDER_THAN_A_VIEW_S)
        return done

    def start(self, *extra: str, applied: tuple[Path, ...] = (ROOT / "examples",)) -> None:
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            self.argv(
                "serve", "--bind", f"unix:{self.api}", "--events-bind", f"unix:{self.events}",
                *(("--apply", *map(str, applied)) if applied else ()),
                "--guest", VM, "--guest-token-file", f"{self.directory}/token",
                "--load-source", "set", "--ready-fd", str(writing), *extra,
            ),
            pass_fds=(writing,), env=environment(self._root), start_new_session=True, stderr=subprocess.DEVNULL,
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

    def call(
        self, method: str, path: str, body: object = None, token: str = TOKEN, speaks: int | None = wire.CURRENT
    ) -> tuple[int, Any]:
        """``speaks`` is the caller's version of the protocol; ``None`` = it names none, as 0.1.0."""
        connection = UnixHttp(self.api)
        try:
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            if speaks is not None:
                headers[wire.HEADER] = str(speaks)
            data = body if isinstance(body, bytes) or body is None else json.dumps(body)
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            content = response.read()
            if method != "GET" and path != "/v1/decisions":
                time.sleep(_OLDER_THAN_A_VIEW_S)
            return response.status, json.loads(content) if content[:1] in (b"{", b"[") else content
        finally:
            connection.close()


_OLDER_THAN_A_VIEW_S = 0.004  # a worker sees what another one, or a command, has written after 2 ms at most


def apply(store: SqliteStore, documents: Sequence[Stored], how: How = WHOLE) -> Changes:
    """Applies documents by nobody in particular."""
    return store.change(documents, how, Author("")).changes


@pytest.fixture(autouse=True)
def _each_decision_looks_at_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker in this process: a test that changes something and asks takes less than the 2 ms of a view."""
    monkeypatch.setattr("persona_broker.view._CHECK_EVERY_S", 0.0)


_ONE_AT_A_TIME = threading.Lock()  # a process has one standard output


def here(argv: list[str]) -> subprocess.CompletedProcess[str]:
    """What the command line ``python -m persona_broker ...`` does, without a process of its own."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    record, root = logging.getLogger("persona.record"), logging.getLogger()
    warnings = logging.StreamHandler(err)  # what Python does where nobody has set up logging
    warnings.setLevel(logging.WARNING)
    with (
        open(os.devnull) as nothing,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "stdin", nothing),
        mock.patch.object(record, "disabled", record.disabled),
    ):
        root.addHandler(warnings)
        try:
            code = main(argv[3:])
        except SystemExit as end:  # argparse's
            code = int(end.code or 0)
        finally:
            root.removeHandler(warnings)
    said = [stream.buffer.getvalue().decode("utf-8", "backslashreplace") for stream in (out, err)]
    return subprocess.CompletedProcess(argv, code, *said)


def environment(root: Path = ROOT) -> dict[str, str]:
    """For a process that runs the code of the tree ``root``."""
    path = os.pathsep.join(str(root / part) for part in ("", "broker", "guest"))
    # safe: else -m takes persona from the working directory, which is another version's
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


@pytest.fixture
def cli(tmp_path: Path) -> Broker:
    """Nothing serves; an empty directory with no database yet."""
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


@pytest.fixture
def filled(cli: Broker) -> Broker:
    """With an audit of four days."""
    from tests.broker.filled import fill  # which needs this module

    fill(cli)
    return cli
