"""What other threads do to a connection to the broker: they cut it, and nothing else comes of that."""

import contextlib
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from persona_guest.audit.upload import Recorder
from persona_guest.broker.events import Event, Stream
from persona_guest.broker.http import BrokerError, Connection, Line
from persona_guest.broker.pool import Pool
from persona_guest.settings import Broker

from persona.record_codec import Record

TIMEOUT_S = 0.3


class Served:
    """A broker on a Unix socket that lets a function do with each connection what it likes; a fake."""

    def __init__(self, directory: Path) -> None:
        (directory / "token").write_text("secret")
        self.settings = Broker(url=f"unix:{directory}/sock", events_url=f"unix:{directory}/sock",
                               token_file=str(directory / "token"), timeout_s=TIMEOUT_S)  # fmt: skip
        self.seen: list[bytes] = []
        self.answer: bytes | None = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(f"{directory}/sock")
        self._server.listen(64)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                self.seen.append(data)
                answer = self.answer  # a test may set another one at this moment
                if answer is not None:
                    connection.sendall(answer)
                    if b"close" in answer:
                        return

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(5)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    found = Served(tmp_path)
    yield found
    found.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_connection_that_is_cut_while_its_worker_closes_it(served: Served) -> None:
    """Again and again, in every moment of a call: whoever cuts meets nothing, whoever calls an answer or a reason."""
    connection = Connection(served.settings)
    outcomes: list[object] = []
    over = threading.Event()

    def work() -> None:
        with contextlib.suppress(BrokerError):
            connection.call("POST", "/", {}, time.monotonic() + 5)
        before = descriptors()
        for _ in range(300):
            try:
                outcomes.append(connection.call("POST", "/", {}, time.monotonic() + 0.0005))
            except BrokerError as error:
                outcomes.append(error)
        connection.close()
        outcomes.append(descriptors() - before)
        over.set()

    worker = threading.Thread(target=work)
    worker.start()
    while not over.is_set():
        connection.cut_late(time.monotonic())
    worker.join()
    assert len(outcomes) == 301
    assert all(isinstance(outcome, BrokerError) or outcome == (200, {}) for outcome in outcomes[:-1])
    assert outcomes[-1] <= 4  # type: ignore[operator]  # the server's ends, which close a moment later


def test_only_a_call_that_is_late_is_cut(served: Served) -> None:
    """The next one on the same connection may have begun since the late one was seen."""
    served.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    connection = Connection(served.settings)
    assert connection.call("POST", "/1", {}, time.monotonic() + 5) == (200, {})
    connection.cut_late(time.monotonic() + 3600)  # nothing is in it
    for _ in range(3):
        assert connection.call("POST", "/2", {}, time.monotonic() + 5) == (200, {})
        connection.cut_late(time.monotonic())
    served.answer = None
    ended: list[float] = []

    def call() -> None:
        began = time.monotonic()
        with pytest.raises(BrokerError):
            connection.call("POST", "/3", {}, time.monotonic() + 5)
        ended.append(time.monotonic() - began)

    worker = threading.Thread(target=call)
    worker.start()
    time.sleep(0.3)
    connection.cut_late(time.monotonic() + 1)
    time.sleep(0.2)
    assert ended == []
    connection.cut_late(time.monotonic() + 10)
    worker.join(2)
    assert len(ended) == 1
    assert sum(b"/3" in data for data in served.seen) == 1  # what was cut is not asked again
    connection.close()


def test_what_is_ended_stays_so(served: Served) -> None:
    connection = Connection(served.settings)
    connection.end()
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(BrokerError):
            connection.call("POST", "/", {}, time.monotonic() + 5)
    assert time.monotonic() - began < 2
    connection.close()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    how = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    who = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    words = ["openssl", "req", "-x509", *how, *who, "-keyout", str(key), "-out", str(cert)]
    subprocess.run(words, check=True, capture_output=True)
    return key, cert


def test_what_is_cut_says_nothing_unencrypted(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    """``SSLSocket.shutdown`` takes the encryption away before it shuts: a sender in between would send plain text."""
    key, cert = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    with socket.create_server(("localhost", 0)) as server:
        accepted: list[ssl.SSLSocket] = []

        def accept() -> None:
            accepted.append(context.wrap_socket(server.accept()[0], server_side=True))

        thread = threading.Thread(target=accept)
        thread.start()
        raw = socket.create_connection(server.getsockname())
        line = Line()
        line.made(raw)
        client = ssl.create_default_context(cafile=str(cert)).wrap_socket(raw, server_hostname="localhost")
        thread.join()
        line.begin(0.0)
        line.cut_late(1.0)
        assert client._sslobj is not None  # type: ignore[attr-defined]
        with pytest.raises(OSError, match=r"."):
            for _ in range(3):
                client.sendall(b"Authorization: Bearer secret")
        client.close()
        accepted[0].close()
        assert line.over()


def test_a_link_that_is_closed_in_the_middle_ends_its_threads_soon(served: Served) -> None:
    served.answer = None
    before = set(threading.enumerate())
    pool = Pool(served.settings, lambda call: call())
    for _ in range(4):
        pool.post("somebody", "POST", "/", {}, lambda _outcome: None, urgent=False)
        pool.post("somebody", "POST", "/", {}, lambda _outcome: None)
    time.sleep(0.1)
    threads = [thread for thread in threading.enumerate() if thread not in before and thread.name == "broker-link"]
    assert len(threads) == 3
    pool.close()
    for thread in threads:
        thread.join(2)
    assert not any(thread.is_alive() for thread in threads)


def test_a_stream_that_is_closed_ends_at_once(served: Served) -> None:
    served.answer = b'HTTP/1.1 200 OK\r\n\r\n{"generation": 1, "why": "hello"}\n'
    heard: list[Event] = []
    stream = Stream(served.settings, heard.append)
    deadline = time.monotonic() + 5
    while len(heard) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    stream.close()
    stream._thread.join(2)
    assert not stream._thread.is_alive()
    assert len(heard) == 2  # its end is not told as a loss


def record(number: int) -> Record:
    return Record(number, "s", "u", "/bin/true", (), "denied", None, None, None, None, "exec", False, False)


def test_the_journal_has_what_the_broker_does_not_take(served: Served) -> None:
    """However many they are, and before anything ends."""
    served.answer = None
    journal: list[Record] = []
    recorder = Recorder(served.settings, journal.append)
    for number in range(700):
        recorder.add(record(number))
    deadline = time.monotonic() + 5
    while len(journal) < 700 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [found.at for found in journal] == list(range(700))
    began = time.monotonic()
    recorder.close()
    assert time.monotonic() - began < 7  # systemd ends an agent after 10


def test_what_is_added_last_is_in_the_journal_at_the_end(served: Served) -> None:
    journal: list[Record] = []
    recorder = Recorder(Broker(), journal.append)  # none to be reached at all
    for number in range(500):
        recorder.add(record(number))
    recorder.close()
    assert len(journal) == 500
