"""The engine: order, width, reasons, hysteresis, and that unknown is never below."""

from typing import Any

import pytest
from persona_broker.policy.engine import Snapshot, Versioned
from persona_broker.policy.outlook import Outlook, Sample, World, latch, look

from persona.conditions import Threshold
from persona.decisions import Denied, Granted, Program, Request, Subject, Width
from persona.documents import Persona, Policy, parse_document
from persona.problems import Reason

CLEAR = Outlook(1, {})


def snapshot(*documents: dict[str, Any]) -> Snapshot:
    parsed = [parse_document(document) for document in documents]
    personas = {d.name: Versioned(d, 1) for d in parsed if isinstance(d, Persona)}
    return Snapshot([d for d in parsed if isinstance(d, Policy)], personas)


def persona(name: str, *patterns: str) -> dict[str, Any]:
    return {"kind": "Persona", "name": name, "command_whitelist": list(patterns)}


def policy(name: str, persona: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "Policy", "name": name, "subjects": {"users": ["alice"]}, "persona": persona, **fields}


def ask(name: str, *arguments: str, user: str = "alice", groups: tuple[str, ...] = (), vm: str = "vm-1") -> Request:
    program = Program(f"/usr/bin/{name}", (name,), (f"/usr/bin/{name}",))
    return Request(Subject(user, groups, vm), "s", program, (name, *arguments), "/")


def test_one_login_two_personas_by_program() -> None:
    both = snapshot(persona("A", "psql"), persona("B", "rsync"), policy("a", "A"), policy("b", "B"))
    first, second = both.decide(ask("psql"), CLEAR), both.decide(ask("rsync"), CLEAR)
    assert isinstance(first, Granted) and first.persona.name == "A"
    assert isinstance(second, Granted) and second.persona.name == "B"


def test_first_policy_that_holds_wins_and_the_next_takes_over() -> None:
    both = snapshot(persona("A", "ls"), persona("B", "ls"), policy("a", "A"), policy("b", "B"))
    unmet = look({}, World(None, frozenset(), 0, 1), 1)
    first = both.decide(ask("ls"), unmet)
    assert isinstance(first, Granted) and first.policy == "a"


def test_policies_match_users_groups_and_vms() -> None:
    found = snapshot(
        persona("A", "**"),
        policy("a", "A", subjects={"groups": ["staff"]}, vms=["db-*"]),
    )
    assert isinstance(found.decide(ask("ls", groups=("staff",), vm="db-1"), CLEAR), Granted)
    assert isinstance(found.decide(ask("ls", groups=("staff",), vm="web-1"), CLEAR), Denied)
    assert isinstance(found.decide(ask("ls", groups=("other",), vm="db-1"), CLEAR), Denied)
    assert not found.admit(Subject("bob", (), "db-1"), CLEAR).admitted
    assert found.admit(Subject("bob", ("staff",), "db-1"), CLEAR).admitted


def test_width() -> None:
    found = snapshot(persona("A", "ls", "git log **", "!git log --bad"), policy("a", "A"))
    wide, narrow = found.decide(ask("ls", "-l"), CLEAR), found.decide(ask("git", "log"), CLEAR)
    assert wide.lease.width is Width.PROGRAM
    assert narrow.lease.width is Width.ARGV
    assert isinstance(narrow, Granted)
    assert isinstance(found.decide(ask("git", "log", "--bad"), CLEAR), Denied)
    assert found.decide(ask("git", "push"), CLEAR).lease.width is Width.ARGV


def test_commands_of_a_policy_narrow_it_and_its_leases() -> None:
    found = snapshot(persona("A", "**"), policy("a", "A", commands=["git log **"]))
    assert isinstance(found.decide(ask("git", "log"), CLEAR), Granted)
    refused = found.decide(ask("git", "push"), CLEAR)
    assert isinstance(refused, Denied)
    assert refused.lease.width is Width.ARGV


def test_a_missing_persona_is_named() -> None:
    refused = snapshot(policy("a", "Ghost")).decide(ask("ls"), CLEAR)
    assert isinstance(refused, Denied)
    assert (refused.reason, refused.persona) == (Reason.INVALID_PERSONA, "Ghost")


LOAD = {"host_load": {"cpu": {"below": 70, "again_below": 60}}}
THRESHOLD = Threshold("cpu", 70, 60)


def outlook(
    found: Snapshot, cpu: float | None, *, age: float = 0, latches: frozenset[Threshold] = frozenset()
) -> Outlook:
    sample = None if cpu is None else Sample(1000 - age, {"cpu": cpu}, "test")
    if sample is not None:
        latches = latch(latches, {THRESHOLD}, sample)
    return look(found.conditions, World(sample, latches, 1000, 15), 1)


@pytest.mark.parametrize(
    ("cpu", "age", "reason"),
    [(30, 0, None), (69.9, 14, None), (70, 0, Reason.LOAD_EXCEEDS_THRESHOLD), (30, 16, Reason.LOAD_UNKNOWN),
     (None, 0, Reason.LOAD_UNKNOWN), (30, -60, Reason.LOAD_UNKNOWN)],
)  # fmt: skip
def test_load(cpu: float | None, age: float, reason: Reason | None) -> None:
    found = snapshot(persona("A", "ls"), policy("a", "A", when=LOAD))
    decision = found.decide(ask("ls"), outlook(found, cpu, age=age))
    assert (decision.reason if isinstance(decision, Denied) else None) == reason


def test_load_does_not_flap() -> None:
    held: frozenset[Threshold] = frozenset()
    states = []
    for cpu in (50, 69, 71, 65, 61, 59, 65, 69.9, 70, 60, 59.9):
        held = latch(held, {THRESHOLD}, Sample(0, {"cpu": cpu}, "test"))
        states.append(bool(held))
    assert states == [False, False, True, True, True, False, False, False, True, True, False]


def test_the_reason_is_that_of_the_best_candidate() -> None:
    found = snapshot(persona("A", "git"), persona("B", "ls"), policy("a", "A", when=LOAD), policy("b", "B"))
    refused = found.decide(ask("git"), outlook(found, 82))
    assert isinstance(refused, Denied)
    assert (refused.reason, refused.policy, refused.persona) == (Reason.LOAD_EXCEEDS_THRESHOLD, "a", "A")
    assert "82 %" in refused.help
