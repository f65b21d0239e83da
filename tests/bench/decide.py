"""Decisions: in process with 1,000 and 100,000 policies, and over HTTP beside a fixed answer."""

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from flask import Flask, Response, jsonify, request
from persona_broker.policy.conditions import ConditionState
from persona_broker.policy.merge import WHOLE, Stored
from persona_broker.policy.snapshot import Snapshot, Versioned
from persona_broker.serve import app, gunicorn_server, processes
from persona_broker.settings import Settings
from persona_broker.store.interface import Author
from persona_broker.store.sqlite import SqliteStore

from persona import wire
from persona.codec import encode_request
from persona.decisions import Program, Request, Subject
from persona.documents import Persona, Policy, parse_document
from tests.bench.child import fork
from tests.bench.row import Missing, Row, measured, pairs

CALLS = 200_000
CALLS_HTTP = 500
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


def questions() -> list[Request]:
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
    asked = list(islice(cycle(questions()), CALLS))
    condition_state = ConditionState(1, {})

    def measure() -> float:
        decide = found.decide
        began = time.perf_counter()
        for question in asked:
            decide(question, condition_state)
        return CALLS / (time.perf_counter() - began)

    return measure


def with_fixed(settings: Settings) -> Flask:
    """The broker's own application with one more route: receives the same question, gives a fixed answer."""
    found = app.api(settings)
    answer = {
        "decision": "granted", "persona": {"name": "A", "version": 1}, "lease": {"seconds": 30.0, "width": "program"},
        "generation": 2, "policy": "a",
    }  # fmt: skip

    def fixed() -> Response:
        request.get_data(cache=False)
        return jsonify(answer)

    found.add_url_rule("/fixed", "fixed", fixed, methods=["POST"])
    return found


@contextlib.contextmanager
def broker() -> Iterator[tuple[Path, str]]:
    """One served worker with a thousand policies; its socket and a guest's token."""
    with tempfile.TemporaryDirectory(prefix="persona-bench-") as directory:
        settings = replace(Settings(), db=f"{directory}/db", bind=f"unix:{directory}/api.sock")
        store = SqliteStore(Path(settings.db))
        full = snapshot(1000)
        documents: list[Stored] = [*(versioned.persona for versioned in full.personas.values()), *full.policies]
        store.change(documents, WHOLE, Author("bench"))
        token = store.add_guest("vm-1")
        store.close()
        endpoint = gunicorn_server.Endpoint(settings.bind, None, None)
        pid = fork(lambda: gunicorn_server.serve_api(partial(with_fixed, settings), endpoint, 1))
        try:
            deadline = time.monotonic() + 20
            while not processes.answers(endpoint):
                if time.monotonic() > deadline:
                    raise RuntimeError("the broker does not answer")
                time.sleep(0.05)
            yield Path(directory) / "api.sock", token
        finally:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)


def over_http() -> Row:
    """Decisions beside a fixed answer of Flask to the same question; the same client, connection and worker."""
    with broker() as (path, token):
        connection = processes.UnixConnection(str(path), timeout=10)
        bodies = [json.dumps({"request": encode_request(question)}).encode() for question in questions()]
        headers = {
            "Authorization": f"Bearer {token}", "Content-Type": "application/json", wire.HEADER: str(wire.CURRENT),
        }  # fmt: skip

        def rate(target: str) -> float:
            began = time.perf_counter()
            for body in bodies[:CALLS_HTTP]:
                connection.request("POST", target, body, headers)
                response = connection.getresponse()
                if response.status != 200 or not response.read():
                    raise RuntimeError(response.status)
            return CALLS_HTTP / (time.perf_counter() - began)

        decided, fixed, ratio = pairs(lambda: rate("/v1/decisions"), lambda: rate("/fixed"), 15)
    return Row("decide.http_vs_fixed", decided, "1/s", "fixed answer", fixed, ratio, "> 0.8, target 0.9")


def in_process() -> list[Row]:
    """Decisions a second, and what of it is left with a hundred times the policies."""
    thousand, many = per_second(snapshot(1000)), per_second(snapshot(100_000))
    large, small, ratio = pairs(many, thousand)
    return [
        Row("decide.per_s", small, "1/s", "1,000 policies", small, 1.0, "> 300,000, target 600,000"),
        Row("decide.scale", large, "1/s", "at 1,000 policies", small, ratio, "> 0.8, target 0.95"),
    ]


def rows() -> Iterator[Row | Missing]:
    """decide.*"""
    return measured(("decide.per_s, decide.scale", in_process), ("decide.http_vs_fixed", over_http))
