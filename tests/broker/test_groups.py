"""However many groups a user is in, the broker hears of those that its policies name, and of them as soon as they do.

The agent's own questions over a fake link, answered by a real broker's application and record.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from persona_broker.serve.app import api
from persona_broker.settings import Settings
from persona_broker.store.sqlite import SqliteStore
from persona_guest.broker.client import BrokerClient
from persona_guest.broker.pool import Answer, Outcome
from persona_guest.core.leases import LeaseBook
from persona_guest.session.model import Admitted, Session

from persona import wire
from persona.codec import MAX_BODY, MAX_GROUPS, GroupsInUse
from persona.decisions import Decision, Denied, Granted, Program, Request, Subject
from persona.documents import parse_document
from persona.problems import Reason
from tests.broker.conftest import apply

VM = "vm-1"
MANY = tuple(f"group-{number:06}-{'x' * 50}"[:64] for number in range(65_535))  # as the kernel allows, 4 MB of names
SUBJECT = Subject("many", MANY, VM)
SESSION = Session("s-1", SUBJECT, 892_600_500, "sshd", "", "/bin/bash", 1, None, 0.0)
LS = Request(SUBJECT, "s-1", Program("/usr/bin/ls", ("ls",), ("/usr/bin/ls",)), ("ls",), "/")


class Link:
    """A fake link: calls the application at once, and counts."""

    def __init__(self, client: FlaskClient, token: str) -> None:
        self._client = client
        self._headers = {"Authorization": f"Bearer {token}", wire.HEADER: str(wire.CURRENT)}
        self.asked: list[tuple[str, int]] = []  # path, and the size of the body
        self.answers: list[Answer] = []  # instead of the application's

    def post(
        self, _who: str, method: str, path: str, body: Any, done: Callable[[Outcome], None], *, urgent: bool = True
    ) -> None:
        body = body(wire.CURRENT) if callable(body) else body
        self.asked.append((path, len(json.dumps(body))))
        if self.answers:
            done(self.answers.pop(0))
            return
        response = self._client.open(path, method=method, json=body, headers=self._headers)
        done(Answer(response.status_code, response.get_json(silent=True)))


class Site:
    def __init__(self, directory: Path) -> None:
        self.store = SqliteStore(directory / "db")
        token = self.store.add_guest(VM)
        self.link = Link(api(Settings(db=str(directory / "db"))).test_client(), token)
        self.leases = LeaseBook()
        self.subjects = {"s-1": SUBJECT}
        self.broker_client = BrokerClient(self.link, self.leases, self.subjects.get)  # type: ignore[arg-type]  # a fake
        self.broker_client.streaming = True

    def apply(self, *groups: str, vms: str = "*") -> None:
        """A policy for each group, with a persona of its own; nothing else holds."""
        documents: list[dict[str, Any]] = []
        for group in groups:
            name = group[:12]
            documents.append({"kind": "Persona", "name": name, "command_whitelist": ["ls"]})
            documents.append(
                {"kind": "Policy", "name": name, "subjects": {"groups": [group]}, "vms": [vms], "persona": name}
            )
        apply(self.store, [parse_document(document) for document in documents])
        self.leases.drop()

    def decide(self) -> Decision:
        found: list[Decision] = []
        self.broker_client.decide(LS, found.append)
        return found[0]

    def admit(self) -> Admitted | Denied:
        found: list[Admitted | Denied] = []
        self.broker_client.admit(SESSION, found.append, opening=True)
        return found[0]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def name(decision: Decision | Admitted) -> str | None:
    return decision.persona.name if isinstance(decision, Granted | Admitted) and decision.persona else None


def test_the_last_of_65_535_groups_is_met_and_the_others_do_not_travel(site: Site) -> None:
    site.apply("nobodys", MANY[-1])
    assert name(site.admit()) == MANY[-1][:12]
    assert name(site.decide()) == MANY[-1][:12]
    assert [path for path, _ in site.link.asked] == ["/v1/sessions", "/v1/sessions", "/v1/decisions"]
    assert max(size for _, size in site.link.asked) < 1000


def test_a_policy_that_is_applied_later_is_met_by_a_session_that_runs(site: Site) -> None:
    site.apply("nobodys")
    assert isinstance(site.admit(), Denied)
    site.apply("nobodys", MANY[0])
    assert isinstance(site.admit(), Admitted)
    assert name(site.decide()) == MANY[0][:12]
    site.apply(MANY[7], MANY[0])
    assert name(site.decide()) == MANY[7][:12]
    site.apply(MANY[9])
    found: list[Any] = []
    site.broker_client.current(["s-1"], found.append)
    assert [held.ref.name for (current,) in found for held in current.holding] == [MANY[9][:12]]
    site.apply(MANY[11], MANY[12])
    site.broker_client.entries(SESSION, found.append)
    assert [entry["policy"] for entry in found[1]] == [MANY[11][:12], MANY[12][:12]]
    site.apply("nobodys")
    denied = site.decide()
    assert isinstance(denied, Denied) and denied.reason is Reason.NO_MATCHING_POLICY


def test_only_a_change_of_the_groups_costs_a_second_question(site: Site) -> None:
    site.apply(MANY[0])
    site.decide()
    for _ in range(3):
        site.store.raise_generation()
        site.decide()
    assert len(site.link.asked) == 5


def test_policies_for_other_vms_change_nothing(site: Site) -> None:
    site.apply(MANY[0], vms="other-*")
    assert isinstance(site.decide(), Denied)
    assert site.store.snapshot().groups_in_use(VM).names == frozenset()
    assert site.store.snapshot().groups_in_use("other-1").names == {MANY[0]}


def test_as_many_groups_as_a_user_may_have_that_policies_name_fit(site: Site) -> None:
    persona = {"kind": "Persona", "name": "P", "command_whitelist": ["ls"]}
    policies = [
        {"kind": "Policy", "name": f"p{at}", "subjects": {"groups": list(MANY[at : at + 256])}, "persona": "P"}
        for at in range(0, MAX_GROUPS, 256)
    ]
    apply(site.store, [parse_document(document) for document in (persona, *policies)])
    assert name(site.decide()) == "P"
    long = replace(LS, argv=("ls", *["\x01" * 32_000] * 2))  # six characters of JSON each
    found: list[Decision] = []
    site.broker_client.decide(long, found.append)
    assert name(found[0]) == "P"  # which looks at no arguments
    assert max(size for _, size in site.link.asked) < MAX_BODY


def test_a_broker_that_never_settles_is_a_denial(site: Site) -> None:
    changed = {"code": "groups_changed", "groups_in_use": {"tag": "x", "names": []}, "generation": 1}
    site.link.answers = [Answer(409, changed)] * 10
    denied = site.decide()
    assert isinstance(denied, Denied) and denied.reason is Reason.BROKER_MISBEHAVED
    assert len(site.link.asked) == 3


@pytest.mark.parametrize(
    "groups",
    [None, {}, {"tag": "x"}, {"tag": "x", "names": "all"}, {"tag": 7, "names": []}, {"tag": "x", "names": [1]}],
)
def test_a_list_that_is_none_is_a_denial(site: Site, groups: Any) -> None:
    site.link.answers = [Answer(409, {"code": "groups_changed", "groups_in_use": groups, "generation": 1})]
    denied = site.decide()
    assert isinstance(denied, Denied) and denied.reason is Reason.BROKER_MISBEHAVED


def test_whoever_names_no_list_names_all_groups(site: Site) -> None:
    site.apply(MANY[0])
    body = {"session": "s-2", "subject": {"user": "u", "groups": [MANY[0]], "vm": VM}, "service": "sshd", "remote": ""}
    found: list[Outcome] = []
    site.link.post("", "POST", "/v1/sessions", body, found.append)
    site.link.post("", "POST", "/v1/sessions", {**body, "groups_in_use": "old"}, found.append)
    site.link.post("", "POST", "/v1/sessions", {**body, "groups_in_use": ["old"]}, found.append)
    assert [answer.status for answer in found if isinstance(answer, Answer)] == [201, 409, 400]


def test_narrowed_keeps_the_order() -> None:
    assert GroupsInUse("t", frozenset("ca")).narrowed(Subject("u", ("a", "b", "c"), VM)).groups == ("a", "c")


def test_questions_about_many_sessions_fit_the_bodies_that_a_broker_takes(site: Site) -> None:
    names = MANY[:200]
    site.broker_client._groups = GroupsInUse("tag", frozenset(names))
    sessions = [f"s-{number:016}" for number in range(150)]
    site.subjects.update(dict.fromkeys(sessions, Subject("u", names, VM)))
    parts = list(site.broker_client.batches(sessions))
    assert [session for part in parts for session in part] == sessions
    assert len(parts) > 2
    for part in parts:
        site.broker_client.current(part, lambda _answer: None)
    assert max(size for path, size in site.link.asked if path == "/v1/sessions/current") < MAX_BODY
