"""The engine's index and its lazily built answers say what a plain reading of the documents says."""

from collections.abc import Iterable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from persona_broker.policy.conditions import ConditionState, Unmet
from persona_broker.policy.snapshot import Snapshot, Versioned

from persona.decisions import Decision, Denied, Granted, Program, Request, Subject, Width
from persona.documents import Persona, Policy
from persona.patterns import Whitelist, parse_pattern
from persona.problems import Reason
from tests.broker.test_snapshot import persona, policy, snapshot

NAMES = ("ls", "git", "nmap", "ld.so")
PATTERNS = (
    "ls",
    "git",
    "git log **",
    "!git log --all",
    "!git ** push **",
    "git ** **",
    "nmap -sn *",
    "!nmap ** /etc/** **",
    r"nmap \*",
    "/usr/**",
    "**",
    "!nmap",
    "/usr/bin/l*",
    "ld.so",
    "!/usr/bin/ld*",
)
COMMANDS = (
    ("ls",),
    ("ls", "-l"),
    ("git", "log"),
    ("git", "log", "--all"),
    ("git", "push"),
    ("git", "-C", ".", "push"),
    ("nmap", "-sn", "x"),
    ("nmap", "-sn", "/srv/../etc"),
    ("nmap", "*"),
    ("ld.so", "ls"),
)

whitelists = st.lists(st.sampled_from(PATTERNS), max_size=4, unique=True).map(
    lambda texts: Whitelist(tuple(parse_pattern(text) for text in texts))
)
personas = st.lists(whitelists, min_size=1, max_size=3).map(
    lambda found: {f"P{i}": Versioned(Persona(f"P{i}", whitelist), 1) for i, whitelist in enumerate(found)}
)


@st.composite
def policies(draw: st.DrawFn) -> list[Policy]:
    return [
        Policy(
            name=f"p{number}",
            users=tuple(draw(st.lists(st.sampled_from(("alice", "bob", "*")), max_size=2))),
            groups=tuple(draw(st.lists(st.sampled_from(("staff", "ops")), max_size=2))),
            commands=draw(whitelists),
            vms=draw(st.sampled_from((("*",), ("vm-*",), ("db-?", "x")))),
            when=policy_without_condition.when,
            persona=draw(st.sampled_from(("P0", "P1", "P2"))),  # the last ones may be missing
        )
        for number in range(draw(st.integers(0, 5)))
    ]


policy_without_condition = snapshot(persona("A", "ls"), policy("a", "A")).policies[0]


def program(name: str) -> Program:
    return Program(f"/usr/bin/{name}", (name,), (f"/usr/bin/{name}",))


def plainly(found: Snapshot, request: Request, condition_state: ConditionState) -> tuple[str, str | None]:
    """The rule as the design states it, with no index: (outcome, policy)."""
    best: tuple[str, str] | None = None
    for item in found.policies:
        who = request.subject
        named = {who.user, "*"} & set(item.users) or {*who.groups, "*"} & set(item.groups)
        here = any(
            {"*": True, "vm-*": who.vm.startswith("vm-"), "db-?": who.vm[:3] == "db-", "x": who.vm == "x"}[glob]
            for glob in item.vms
        )
        if not named or not here:
            continue
        versioned = found.personas.get(item.persona)
        arguments = (request.program, request.argv, request.argv_complete)
        if versioned is None:
            if item.commands.speaks_for(*arguments):
                if item.name not in condition_state.unmet:
                    return Reason.INVALID_PERSONA, item.name  # it holds, and hides what comes after it
                best = best or (Reason.INVALID_PERSONA, item.name)
            continue
        if item.commands.speaks_for(*arguments) and versioned.persona.command_whitelist.allows(*arguments):
            unmet = condition_state.unmet.get(item.name)
            if unmet is None:
                return "granted", item.name
            best = best or (unmet.reason, item.name)
    return best or ("refused", None)


def outcome(decision: Decision) -> tuple[str, str | None]:
    if isinstance(decision, Granted):
        return "granted", decision.policy
    if decision.reason in (Reason.NO_MATCHING_POLICY, Reason.ARGV_TOO_LONG):
        return "refused", None
    return decision.reason, decision.policy


@settings(max_examples=300, deadline=None)
@given(personas, policies(), st.sets(st.sampled_from(("p0", "p1", "p2")), max_size=3), st.booleans())
def test_the_index_says_what_the_documents_say(
    versions: dict[str, Versioned], rules: list[Policy], unmet: set[str], complete: bool
) -> None:
    found = Snapshot(rules, versions)
    condition_state = ConditionState(3, {name: Unmet(Reason.OUTSIDE_HOURS, "later") for name in unmet})
    clear = ConditionState(4, {})
    for subject in (Subject("alice", ("staff",), "vm-1"), Subject("carol", (), "db-1")):
        for argv in COMMANDS:
            request = Request(subject, "s", program(argv[0]), argv, "/", complete)
            for now in (condition_state, clear, condition_state):  # a row outlives an outlook
                decision = found.decide(request, now)
                assert outcome(decision) == plainly(found, request, now)
                assert decision.generation == now.generation


def decisions(found: Snapshot, subject: Subject, name: str) -> Iterable[Decision]:
    for arguments in ((), ("log",), ("log", "--all"), ("-sn", "x"), ("-C", ".", "push"), ("*",), ("../x",)):
        yield found.decide(Request(subject, "s", program(name), (name, *arguments), "/"), ConditionState(1, {}))


@settings(max_examples=300, deadline=None)
@given(personas, policies())
def test_a_lease_of_a_whole_program_is_true_for_any_arguments(
    versions: dict[str, Versioned], rules: list[Policy]
) -> None:
    found = Snapshot(rules, versions)
    for name in NAMES:
        answers = list(decisions(found, Subject("alice", ("ops",), "vm-1"), name))
        if answers[0].lease.width is Width.PROGRAM:
            assert all(answer == answers[0] for answer in answers)


def test_arguments_that_are_not_all_known() -> None:
    found = snapshot(persona("A", "ls", "git log **", "!git log --all"), policy("a", "A"))
    subject = Subject("alice", (), "vm-1")

    def cut(name: str, *arguments: str) -> Decision:
        return found.decide(Request(subject, "s", program(name), (name, *arguments), "/", False), ConditionState(1, {}))

    assert isinstance(cut("ls", "-l"), Granted)  # arguments do not matter
    refused = cut("git", "log")
    assert isinstance(refused, Denied)
    assert refused.reason is Reason.ARGV_TOO_LONG
    unknown = cut("nmap")
    assert isinstance(unknown, Denied)
    assert unknown.reason is Reason.NO_MATCHING_POLICY


def test_what_a_guest_invents_does_not_grow_the_index(monkeypatch: Any) -> None:
    monkeypatch.setattr("persona_broker.policy.snapshot._ROWS_MAX", 10)
    monkeypatch.setattr("persona_broker.policy.snapshot._VIEWS_MAX", 5)
    found = snapshot(persona("A", "**"), policy("a", "A", subjects={"users": ["*"]}))
    for number in range(40):
        request = Request(Subject(f"u{number}", (), "vm-1"), "s", program(f"tool{number}"), ("t",), "/")
        assert isinstance(found.decide(request, ConditionState(1, {})), Granted)
        assert len(found._rows) <= 10
        assert len(found._views) <= 5
