"""The link to the broker: who waits is answered in time, whatever else is asked and however the broker behaves."""

import contextlib
import http.server
import queue
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from persona_guest.broker.http import BrokerError, Connection, NotAsked
from persona_guest.broker.pool import Answer, Outcome, Pool
from persona_guest.settings import Broker

from persona.problems import Reason

TIMEOUT_S = 0.3
TICK_S = 0.02


class Asked:
    """A link whose loop is ``wait``; ``outcomes`` has what became of each question, and in which thread."""

    def __init__(self, directory: Path) -> None:
        (directory / "token").write_text("t")
        self._mail: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        url, token = f"unix:{directory}/sock", str(directory / "token")
        self.link = Pool(Broker(url=url, token_file=token, timeout_s=TIMEOUT_S), self._mail.put)
        self.outcomes: list[tuple[str, Outcome]] = []
        self.threads: set[int] = set()

    def post(self, path: str, method: str = "POST", *, urgent: bool = True) -> None:
        def done(outcome: Outcome) -> None:
            self.outcomes.append((path, outcome))
            self.threads.add(threading.get_ident())

        self.link.post("somebody", method, path, {}, done, urgent=urgent)

    def wait(self, count: int, seconds: float = 5) -> float:
        """Until there are ``count`` outcomes; how long that took, in seconds."""
        began = time.monotonic()
        while len(self.outcomes) < count and time.monotonic() < began + seconds:
            with contextlib.suppress(queue.Empty):
                self._mail.get(timeout=TICK_S)()
            self.link.sweep(time.monotonic())
        return time.monotonic() - began


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Asked]:
    asked = Asked(tmp_path)
    yield asked
    asked.link.close()


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[None]:
    """A broker that accepts and never answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(tmp_path / "sock"))
        server.listen(64)
        yield


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers all but DELETE, for which ``go_on`` has to be set; a fake."""

    protocol_version = "HTTP/1.1"
    go_on = threading.Event()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def do_DELETE(self) -> None:
        self.go_on.wait(5)
        self.do_POST()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


@pytest.fixture
def sluggish(tmp_path: Path) -> Iterator[threading.Event]:
    """A broker that is slow about sessions that end; the event lets it go on."""
    Handler.go_on = threading.Event()
    with Server(str(tmp_path / "sock"), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Handler.go_on
        Handler.go_on.set()
        server.shutdown()
        thread.join()


def late(outcome: Outcome) -> bool:
    return isinstance(outcome, BrokerError) and outcome.code == "broker_unreachable"


@pytest.mark.usefixtures("silent")
def test_who_waits_is_answered_in_time_while_the_link_warms_up(asked: Asked) -> None:
    asked.link.reachable()
    time.sleep(0.05)  # its threads are at it
    asked.post("/v1/admissions")
    assert asked.wait(1) < 1.0
    assert late(asked.outcomes[0][1])


@pytest.mark.usefixtures("silent")
def test_questions_that_wait_for_a_thread_are_answered_in_time_and_once(asked: Asked) -> None:
    patient = [f"/patient{number}" for number in range(3)]
    urgent = [f"/{number}" for number in range(20)]
    for path in patient:
        asked.post(path, urgent=False)
    time.sleep(0.05)
    for path in urgent:
        asked.post(path)
    assert asked.wait(20) < 1.0
    assert {path for path, _ in asked.outcomes} == set(urgent)
    asked.wait(24, 2 * 5 * TIMEOUT_S)
    assert sorted(path for path, _ in asked.outcomes) == sorted(patient + urgent)
    assert all(late(outcome) for _, outcome in asked.outcomes)
    assert asked.threads == {threading.get_ident()}


@pytest.mark.usefixtures("silent")
def test_a_call_that_hangs_costs_one_timeout_and_not_one_a_command(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a name lookup, which nothing cuts short."""
    found = threading.Event()

    def hang(*_: object) -> tuple[int, None]:
        found.wait(30)
        return 204, None

    monkeypatch.setattr(Connection, "call", hang)
    asked.post("/v1/decisions/1")
    asked.wait(1)
    asked.post("/v1/decisions/2")
    assert asked.wait(2) < TIMEOUT_S / 2
    assert all(late(outcome) for _, outcome in asked.outcomes)
    found.set()


@pytest.mark.usefixtures("sluggish")
def test_a_question_that_the_broker_is_too_old_for_makes_no_other_be_refused(asked: Asked) -> None:
    def body(_version: int) -> object:
        raise NotAsked(Reason.BROKER_MISBEHAVED, "the broker is too old for that")

    asked.link.post("u", "POST", "/v1/decisions", body, lambda outcome: asked.outcomes.append(("old", outcome)))
    asked.wait(1)
    assert isinstance(asked.outcomes[0][1], NotAsked)
    asked.post("/v1/decisions")
    asked.wait(2)
    assert asked.outcomes[1][1] == Answer(204, None)


def test_sessions_that_end_keep_nobody_waiting(asked: Asked, sluggish: threading.Event) -> None:
    for number in range(4):
        asked.post(f"/v1/sessions/{number}", "DELETE", urgent=False)
    time.sleep(0.1)
    asked.post("/v1/admissions")
    assert asked.wait(1) < 1.0
    assert asked.outcomes == [("/v1/admissions", Answer(204, None))]
    sluggish.set()
    asked.wait(5)
    assert [outcome for _, outcome in asked.outcomes] == [Answer(204, None)] * 5


def test_a_session_s_end_that_fails_makes_nobody_be_refused(asked: Asked, sluggish: threading.Event) -> None:
    asked.post("/v1/sessions/1", "DELETE", urgent=False)
    asked.wait(1)
    assert late(asked.outcomes[0][1])
    asked.post("/v1/admissions")
    asked.wait(2)
    assert asked.outcomes[1] == ("/v1/admissions", Answer(204, None))


def test_a_call_that_cannot_be_cut_is_answered_all_the_same(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that has to be looked up, say: nothing ends that in the middle."""
    ended = threading.Event()

    def stuck(*_arguments: object) -> tuple[int, object]:
        time.sleep(5 * TIMEOUT_S)
        ended.set()
        return 200, {}

    monkeypatch.setattr(Connection, "call", stuck)
    asked.post("/v1/admissions")
    assert asked.wait(1) < 1.0
    assert ended.wait(5)
    asked.wait(2, 0.2)
    assert len(asked.outcomes) == 1
    assert late(asked.outcomes[0][1])
