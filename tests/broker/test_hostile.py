"""Clients that send garbage, too much, too slowly or never stop: a clear error, and others are served."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from persona_broker.store.sqlite import SqliteStore

from tests.broker.conftest import TOKEN, Broker

Ask = Callable[..., tuple[int, Any]]
HEAD = f"POST /v1/decisions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"


@contextmanager
def connected(broker: Broker) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(broker.api))
        yield client


def answer(client: socket.socket) -> tuple[int, Any]:
    received = b""
    while block := client.recv(65536):
        received += block
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", {400}),  # TLS where none is spoken
        (b"GET / HTP\r\n\r\n", {400}),
        (b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n", {414}),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100 + b"\r\n", {431}),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 10_000 + b"\r\n\r\n", {431}),
    ],
)
def test_what_is_no_http_is_a_problem_too(broker: Broker, sent: bytes, statuses: set[int]) -> None:
    with connected(broker) as client:
        client.sendall(sent)
        status, problem = answer(client)
    assert status in statuses
    assert problem["status"] == status
    assert problem["code"] in ("bad_request", "too_large")


def test_a_body_in_chunks_is_bounded_as_well(broker: Broker, ask: Ask) -> None:
    with connected(broker) as client:
        client.sendall(HEAD.encode() + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(OSError):  # the broker hangs up
            for _ in range(10_000):  # 640 MB
                client.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
    with connected(broker) as client:
        client.sendall(HEAD.encode() + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.sendall((b"10000\r\n" + b" " * 0x10000 + b"\r\n") * 4 + b"1\r\n \r\n0\r\n\r\n")
        status, problem = answer(client)
    assert (status, problem["code"]) == (413, "too_large")
    assert ask("ls")[0] == 200


def test_wrong_methods_say_which_are_right(broker: Broker) -> None:
    with connected(broker) as client:
        client.sendall(b"GET /v1/decisions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = client.recv(65536)
    assert received.startswith(b"HTTP/1.1 405")
    assert b"Allow:" in received


@pytest.mark.long
def test_slow_clients_do_not_starve_decisions(broker: Broker, ask: Ask) -> None:
    with ExitStack() as stack:
        for _ in range(128):  # twice the threads there are
            client = stack.enter_context(connected(broker))
            client.sendall(HEAD.encode() + b"Content-Length: 10\r\n\r\n1")
        time.sleep(0.3)
        began = time.monotonic()
        while True:
            try:
                assert ask("ls")[0] == 200
                break
            except OSError:  # in the queue for too long
                assert time.monotonic() - began < 30
        assert time.monotonic() - began < 10


@pytest.mark.long
def test_a_slow_client_is_cut(broker: Broker) -> None:
    with connected(broker) as client:
        began = time.monotonic()
        client.sendall(b"POST /v1/decisions HTTP/1.1\r\nHost: x\r\n")
        assert client.recv(100) == b""
        assert 4 < time.monotonic() - began < 10


def test_streams_do_not_starve_decisions(broker: Broker, ask: Ask) -> None:
    with ExitStack() as stack:
        store = SqliteStore(broker.directory / "db")
        tokens = [store.add_guest(f"vm{number}") for number in range(64)]
        store.close()
        for token in tokens:
            connection, response = broker.stream(token)
            stack.callback(connection.close)
            assert json.loads(response.readline())["why"] == "hello"
        began = time.monotonic()
        assert ask("ls")[0] == 200
        assert time.monotonic() - began < 2
        assert b"persona_broker_streams 6" in broker.call("GET", "/metrics")[1]


def test_a_guest_has_only_so_many_streams_the_newest(broker: Broker) -> None:
    with ExitStack() as stack:
        responses = []
        for _ in range(6):
            connection, response = broker.stream()
            stack.callback(connection.close)
            assert json.loads(response.readline())["why"] == "hello"
            responses.append(response)
        for ended in responses[:2]:
            assert b"hello" not in ended.read()  # to its end
        store = SqliteStore(broker.directory / "db")
        store.raise_generation()  # whatever other tests left open is noticed at the next line
        store.close()
        deadline = time.monotonic() + 5
        while b"persona_broker_streams 4\n" not in broker.call("GET", "/metrics")[1]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for open_ in responses[2:]:
            while json.loads(open_.readline())["why"] != "changed":
                pass


def test_a_guest_that_is_removed_loses_its_stream_and_its_voice(broker: Broker) -> None:
    token = broker.run("guest", "add", "going").stdout.strip()
    connection, response = broker.stream(token)
    try:
        assert json.loads(response.readline())["why"] == "hello"
        assert broker.run("guest", "remove", "going").returncode == 0
        assert broker.call("GET", "/v1/personas", token=token)[0] == 401
        began = time.monotonic()
        assert response.read() == b""
        assert time.monotonic() - began < 2  # not only at the next beat
    finally:
        connection.close()
