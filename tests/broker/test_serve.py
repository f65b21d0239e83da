"""The broker as processes: TLS, who may listen where, what dies with what, and how fast it starts and stops."""

import http.client
import json
import os
import signal
import socket
import sqlite3
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from persona_broker.serve import processes
from persona_broker.serve.gunicorn_server import Endpoint

from tests.broker.conftest import VM, Broker, environment


@contextmanager
def running(directory: Path, *extra: str) -> Iterator[tuple[Broker, subprocess.Popen[bytes]]]:
    broker = Broker(directory)
    broker.start("--workers", "1", *extra)
    if broker.process is None:
        raise RuntimeError("not started")
    try:
        yield broker, broker.process
    finally:
        broker.stop()


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text() if Path(f"/proc/{pid}").exists() else ""
    return [int(word) for word in text.split()]


def await_end(pids: list[int]) -> None:
    """Until none of them runs."""
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_worker_is_replaced_and_a_killed_part_ends_all(tmp_path: Path) -> None:
    with running(tmp_path) as (broker, process):
        arbiters = children(process.pid)
        assert len(arbiters) == 3  # the last is the audit, which has no workers
        for worker in [pid for arbiter in arbiters for pid in children(arbiter)]:
            os.kill(worker, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while True:
            try:
                if broker.call("GET", "/readyz")[0] == 200:
                    break
            except OSError:
                pass
            assert time.monotonic() < deadline
            time.sleep(0.1)
        workers = [pid for arbiter in arbiters for pid in children(arbiter)]
        os.kill(arbiters[0], signal.SIGKILL)
        assert process.wait(20) != 0
        await_end([*arbiters, *workers])


def test_nothing_outlives_the_supervisor(tmp_path: Path) -> None:
    with running(tmp_path) as (_, process):
        arbiters = children(process.pid)
        workers = [pid for arbiter in arbiters for pid in children(arbiter)]
        assert len(workers) == 2
        process.kill()
        process.wait(5)
        await_end([*arbiters, *workers])


@pytest.mark.parametrize("streams", [0, 3])
def test_it_stops_quickly_though_streams_are_open(tmp_path: Path, streams: int) -> None:
    with running(tmp_path) as (broker, process), ExitStack() as stack:
        for _ in range(streams):
            connection, response = broker.stream()
            stack.callback(connection.close)
            assert json.loads(response.readline())["why"] == "hello"
        began = time.monotonic()
        process.terminate()
        assert process.wait(20) == 0
        assert time.monotonic() - began < 3  # no stream is waited for: its next beat may be 5 s away


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_over_tls_and_only_over_tls(tmp_path: Path) -> None:
    broker = Broker(tmp_path)
    assert broker.run("tls", "init", "--dir", str(tmp_path), "--host", "127.0.0.1").returncode == 0
    assert broker.run("guest", "add", "vm", "--token-file", str(tmp_path / "token")).returncode == 0
    api, events = free_port(), free_port()
    argv = broker.argv(
        "serve", "--bind", f"0.0.0.0:{api}", "--events-bind", f"0.0.0.0:{events}", "--load-source", "set",
        "--tls-cert", str(tmp_path / "broker.crt"), "--tls-key", str(tmp_path / "broker.key"), "--workers", "1",
    )  # fmt: skip
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment()) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
            headers = {"Authorization": f"Bearer {(tmp_path / 'token').read_text().strip()}"}
            for port, path in ((api, "/v1/personas"), (events, "/v1/events")):
                connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
                with closing(connection):
                    connection.request("GET", path, headers=headers)
                    response = connection.getresponse()
                    assert response.status == 200
                    assert response.readline()
            with pytest.raises(ssl.SSLCertVerificationError):
                other = http.client.HTTPSConnection("localhost", api, timeout=10, context=context)
                other.request("GET", "/healthz")
            with closing(http.client.HTTPConnection("127.0.0.1", api, timeout=10)) as plain:
                plain.request("GET", "/healthz", headers=headers)
                with pytest.raises((http.client.HTTPException, OSError)):
                    plain.getresponse()
        finally:
            process.terminate()
            process.wait(20)


@pytest.mark.parametrize(
    ("bind", "why"),
    [
        ("0.0.0.0:1", "without TLS only"),
        ("127.0.0.1.example.org:1", "without TLS only"),
        ("nowhere", "expected HOST:PORT"),
        ("::1:80", "expected HOST:PORT"),
        ("unix:relative", "expected HOST:PORT"),
        ("unix:/" + "x" * 107, "longer than 107 bytes"),
        ("127.0.0.1:123456", "expected HOST:PORT"),
    ],
)
def test_plain_http_is_for_the_loopback_only(tmp_path: Path, bind: str, why: str) -> None:
    done = Broker(tmp_path).run("serve", "--bind", bind, "--events-bind", "127.0.0.1:2", "--insecure-loopback")
    assert done.returncode == 1
    assert why in done.stderr


def test_readiness_is_asked_of_a_host_and_not_of_a_path(tmp_path: Path) -> None:
    """Werkzeug 3.1.7 refuses a path as ``Host``, others one of over 63 characters: it never got ready."""
    path = tmp_path / ("x" * (90 - len(str(tmp_path))))
    asked: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            asked.append(connection.recv(4096))
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        assert processes.answers(Endpoint(f"unix:{path}", None, None))
        thread.join()
    assert b"\r\nHost: localhost\r\n" in asked[0]


def test_a_socket_with_a_long_path(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * (90 - len(str(tmp_path))))
    deep.mkdir()
    with running(deep) as (broker, _):
        assert broker.call("GET", "/readyz")[0] == 200


def test_without_a_certificate_it_says_how_to_make_one(tmp_path: Path) -> None:
    done = Broker(tmp_path).run("serve", "--tls-cert", str(tmp_path / "none"), "--workers", "1")
    assert done.returncode == 1
    assert "persona-broker tls init" in done.stderr


def question() -> dict[str, object]:
    program = {"path": "/usr/bin/git", "names": ["git"], "paths": ["/usr/bin/git"]}
    request = {
        "subject": {"user": "alice", "groups": [], "vm": VM}, "session": "s", "program": program,
        "argv": ["git"], "cwd": "/", "argv_complete": True,
    }  # fmt: skip
    return {"request": request}


def test_no_decision_waits_for_a_writer(tmp_path: Path) -> None:
    """Somebody applies a huge set: records have to wait until that is written, decisions do not."""
    with running(tmp_path) as (broker, _):
        with closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            records = {"records": [], "lost": 1}
            waiting = threading.Thread(target=broker.call, args=("POST", "/v1/records", records))
            waiting.start()
            time.sleep(0.3)
            began = time.monotonic()
            for _ in range(10):
                assert broker.call("POST", "/v1/decisions", question())[0] == 200
            assert time.monotonic() - began < 2  # a writer waits for 5
            assert waiting.is_alive()
            writer.execute("COMMIT")
        waiting.join(10)
        assert b"records_lost_total 1" in broker.call("GET", "/metrics")[1]


@pytest.mark.long
def test_samples_that_stop_are_not_low_load(tmp_path: Path) -> None:
    """The events process ends; what the other would decide from then on, it decides from no load at all."""
    (tmp_path / "broker.toml").write_text("load_max_age_s = 3\n")
    with running(tmp_path) as (broker, process):
        broker.run("load", "set", "cpu=10")
        time.sleep(0.2)
        assert broker.call("POST", "/v1/decisions", question())[1]["decision"] == "granted"
        for pid in [process.pid, *children(process.pid)]:
            os.kill(pid, signal.SIGSTOP)  # nobody may restart or end the other part
        watcher = next(pid for arbiter in children(process.pid) for pid in children(arbiter) if serves(pid, broker))
        os.kill(watcher, signal.SIGSTOP)
        try:
            deadline = time.monotonic() + 25
            while (found := broker.call("POST", "/v1/decisions", question())[1])["decision"] == "granted":
                assert time.monotonic() < deadline
                time.sleep(0.5)
            assert found["reason"] == "load_unknown"
        finally:
            for pid in [watcher, *children(process.pid), process.pid]:
                os.kill(pid, signal.SIGCONT)


def serves(pid: int, broker: Broker) -> bool:
    """Whether a worker is that of the events: it has the threads of a watcher and holds that socket."""
    names = Path("/proc/net/unix").read_text().splitlines()
    inodes = {line.split()[6] for line in names if line.endswith(str(broker.events))}
    held = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()}
    return any(f"socket:[{inode}]" in held for inode in inodes)


def test_it_listens_where_it_was_told_to_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # gunicorn has a place of its own below it
    (tmp_path / "home").mkdir()
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with running(tmp_path) as (broker, _):
        broker.call("GET", "/readyz")
        rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
        accepting = "00010000"  # of the flags: it listens
        listening = {row[7] for row in rows if len(row) > 7 and row[3] == accepting and str(tmp_path) in row[7]}
        assert listening == {str(broker.api), str(broker.events)}
    assert list((tmp_path / "home").iterdir()) == []
