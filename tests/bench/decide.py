"""Decisions: in process with 1,000 and 100,000 policies, and over HTTP beside a fixed answer."""

import contextlib
import http.client
import json
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import cycle, islice
from pathlib import Path

from persona_broker.policy.engine import Snapshot, Versioned
from persona_broker.policy.outlook import Outlook
from persona_guest.shell import trial

from persona.decisions import Program, Request, Subject
from persona.documents import Persona, Policy, parse_document
from tests.bench.row import Row, pairs

CALLS = 200_000
PROGRAMS = ("ls", "cat", "git", "python3", "psql", "nmap", "vim", "systemctl")


def snapshot(count: int) -> Snapshot:
    """``count`` policies, a hundred personas, arguments in some."""
    personas = []
    for number in range(100):
        whitelist = [
            "ls",
            "cat",
            "git log **",
            "python3 **",
            "psql -h *.internal **",
            "systemctl status *",
            f"tool-{number}",
        ]
        personas.append({"kind": "Persona", "name": f"P{number}", "command_whitelist": whitelist})
    parsed = [parse_document(value) for value in personas]
    held = {document.name: Versioned(document, 1) for document in parsed if isinstance(document, Persona)}
    policies = []
    for number in range(count):
        users = [f"user{number}", f"user{(number * 7) % count}"]
        subjects = {"users": users, "groups": [f"group{number % 500}"]}
        policy = {"kind": "Policy", "name": f"p{number}", "subjects": subjects, "persona": f"P{number % 100}"}
        if number % 3 == 0:
            policy["when"] = {"host_load": {"cpu": {"below": 70}}}
        document = parse_document(policy)
        if isinstance(document, Policy):
            policies.append(document)
    return Snapshot(policies, held)


def requests() -> list[Request]:
    """What 250 users with no group ask: eight programs, two command lines each."""
    found = []
    for number in range(250):
        subject = Subject(f"user{number}", (), "vm-1")
        for name in PROGRAMS:
            program = Program(f"/usr/bin/{name}", (name,), (f"/usr/bin/{name}",))
            for argv in ((name,), (name, "log", "--oneline")):
                found.append(Request(subject, "s-1", program, argv, "/"))
    return found


def per_second(found: Snapshot) -> Callable[[], float]:
    """Measures decisions a second."""
    asked = list(islice(cycle(requests()), CALLS))
    outlook = Outlook(1, {})

    def measure() -> float:
        decide = found.decide
        began = time.perf_counter()
        for request in asked:
            decide(request, outlook)
        return CALLS / (time.perf_counter() - began)

    return measure


@contextlib.contextmanager
def broker() -> Iterator[tuple[Path, str]]:
    """A served broker with one worker; its socket and the guest's token."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="persona-bench-")))
        (home / "p.yaml").write_text("kind: Persona\nname: A\ncommand_whitelist: [ls]\n")
        trial.start(stack, home, [str(home / "p.yaml")])
        yield home / "api.sock", (home / "token").read_text()


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def over_http() -> Row:
    """Decisions beside /healthz, the same client, connection and worker."""
    with broker() as (path, token):
        connection = _Unix(path)
        body = {
            "request": {
                "subject": {"user": "root", "groups": [], "vm": trial.VM}, "session": secrets.token_hex(4),
                "program": {"path": "/usr/bin/ls", "names": ["ls"], "paths": ["/usr/bin/ls"]},
                "argv": ["ls", "-l"], "cwd": "/", "argv_complete": True,
            }
        }  # fmt: skip
        data = json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

        def rate(method: str, target: str, payload: bytes | None) -> float:
            began = time.perf_counter()
            for _ in range(1000):
                connection.request(method, target, payload, headers)
                response = connection.getresponse()
                if response.status != 200 or not response.read():
                    raise RuntimeError(response.status)
            return 1000 / (time.perf_counter() - began)

        decided, fixed, ratio = pairs(
            lambda: rate("POST", "/v1/decisions", data), lambda: rate("GET", "/healthz", None), 5
        )
    return Row("decide.http_vs_fixed", decided, "1/s", "GET /healthz", fixed, ratio, "> 0.8, target 0.9")


def rows() -> list[Row]:
    """decide.*"""
    thousand, many = per_second(snapshot(1000)), per_second(snapshot(100_000))
    large, small, ratio = pairs(many, thousand)
    return [
        Row("decide.per_s", small, "1/s", "1,000 policies", small, 1.0, "> 300,000, target 600,000"),
        Row("decide.scale", large, "1/s", "at 1,000 policies", small, ratio, "> 0.8, target 0.95"),
        over_http(),
    ]
