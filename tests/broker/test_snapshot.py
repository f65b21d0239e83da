"""The engine: order, width, reasons, hysteresis, and that unknown is never below."""

import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from persona_broker.policy.conditions import ConditionInputs, ConditionState, Sample, latch, look
from persona_broker.policy.snapshot import Snapshot, Versioned

from persona.conditions import Threshold
from persona.decisions import Denied, Granted, Program, Request, Subject, Width
from persona.documents import Persona, Policy, parse_document
from persona.problems import Reason

CLEAR = ConditionState(1, {})


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


@pytest.mark.parametrize("commands", [["git"], [], ["**", "!bash"], ["/usr/bin/g*"]])
def test_a_denial_does_not_blame_the_whitelist_for_what_no_policy_speaks_for(commands: list[str]) -> None:
    """The persona allows it: who looks at its whitelist, as the help said, finds the program there."""
    refused = snapshot(persona("A", "bash", "git"), policy("a", "A", commands=commands)).decide(ask("bash"), CLEAR)
    assert isinstance(refused, Denied) and refused.reason is Reason.NO_MATCHING_POLICY
    assert refused.help == "no policy that names alice on vm-1 has it among its commands"
    both = snapshot(persona("A", "git"), policy("a", "A", commands=commands), policy("b", "A"))
    refused = both.decide(ask("bash"), CLEAR)
    assert isinstance(refused, Denied) and refused.help.startswith("not in its whitelist")


def test_first_policy_that_holds_wins_and_the_next_takes_over() -> None:
    both = snapshot(persona("A", "ls"), persona("B", "ls"), policy("a", "A"), policy("b", "B"))
    unmet = look({}, ConditionInputs(None, frozenset(), 0, 1), 1)
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


def test_a_loader_runs_only_where_a_whitelist_names_it() -> None:
    wide = snapshot(persona("A", "**", "/usr/bin/*"), policy("a", "A"))
    refused = wide.decide(ask("ld.so", "/usr/bin/nmap"), CLEAR)
    assert isinstance(refused, Denied)
    assert refused.reason is Reason.NO_MATCHING_POLICY
    assert "a loader, which runs any program" in refused.help
    as_found = replace(ask("start"), program=Program("/usr/bin/start", ("start",), ("/usr/bin/start",), loader=True))
    assert isinstance(wide.decide(replace(as_found, program=replace(as_found.program, loader=False)), CLEAR), Granted)
    assert isinstance(wide.decide(as_found, CLEAR), Denied)  # another row than that of the same names
    named = snapshot(persona("A", "ld.so"), policy("a", "A", commands=["**"]))
    assert isinstance(named.decide(ask("ld.so", "/usr/bin/nmap"), CLEAR), Granted)


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


def condition_state(
    found: Snapshot, cpu: float | None, *, age: float = 0, latches: frozenset[Threshold] = frozenset()
) -> ConditionState:
    sample = None if cpu is None else Sample(1000 - age, {"cpu": cpu}, "test")
    if sample is not None:
        latches = latch(latches, {THRESHOLD}, sample)
    return look(found.conditions, ConditionInputs(sample, latches, 1000, 15), 1)


@pytest.mark.parametrize(
    ("cpu", "age", "reason"),
    [(30, 0, None), (69.9, 14, None), (70, 0, Reason.LOAD_EXCEEDS_THRESHOLD), (30, 16, Reason.LOAD_UNKNOWN),
     (None, 0, Reason.LOAD_UNKNOWN), (30, -60, Reason.LOAD_UNKNOWN)],
)  # fmt: skip
def test_load(cpu: float | None, age: float, reason: Reason | None) -> None:
    found = snapshot(persona("A", "ls"), policy("a", "A", when=LOAD))
    decision = found.decide(ask("ls"), condition_state(found, cpu, age=age))
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
    refused = found.decide(ask("git"), condition_state(found, 82))
    assert isinstance(refused, Denied)
    assert (refused.reason, refused.policy, refused.persona) == (Reason.LOAD_EXCEEDS_THRESHOLD, "a", "A")
    assert "82 %" in refused.help


PATH = "/home/alice/.vscode-server/x/node"
NODE = Program(PATH, (), (PATH,), home=".vscode-server/x/node")


def at_home(program: Program = NODE, *arguments: str) -> Request:
    return Request(Subject("alice", (), "vm-1"), "s", program, ("node", *arguments), "/")


def test_a_program_in_a_home_is_decided_by_home_programs_alone() -> None:
    wide = snapshot(persona("A", "**", "/home/alice/*"), policy("a", "A"))
    refused = wide.decide(at_home(), CLEAR)
    assert isinstance(refused, Denied)
    assert (refused.reason, refused.policy) == (Reason.PROGRAM_NOT_TRUSTED, "a")
    assert "no home_programs" in refused.help
    assert refused.lease.width is Width.PROGRAM
    named = {**persona("A"), "home_programs": [".vscode-server/**/node"]}
    found = snapshot(named, persona("B", "**"), policy("b", "B"), policy("a", "A"))
    allowed = found.decide(at_home(NODE, "x.js"), CLEAR)
    assert isinstance(allowed, Granted)
    assert (allowed.policy, allowed.lease.width) == ("a", Width.PROGRAM)
    elsewhere = replace(NODE, path="/home/alice/node", paths=("/home/alice/node",), home="node")
    assert isinstance(found.decide(at_home(elsewhere), CLEAR), Denied)
    # the same path without the agent's word that it is the user's own: another row
    assert isinstance(snapshot(named, policy("a", "A")).decide(at_home(replace(NODE, home="")), CLEAR), Denied)


def test_a_policy_speaks_for_a_program_in_a_home_by_its_path() -> None:
    named = {**persona("A"), "home_programs": ["**"]}
    other = snapshot(named, policy("a", "A", commands=["ls"]))
    assert isinstance(other.decide(at_home(), CLEAR), Denied)
    path = snapshot(named, policy("a", "A", commands=[f"{NODE.path} --safe **"]))
    narrow = path.decide(at_home(NODE, "--safe", "x"), CLEAR)
    assert isinstance(narrow, Granted) and narrow.lease.width is Width.ARGV
    assert isinstance(path.decide(at_home(NODE, "x"), CLEAR), Denied)


@pytest.mark.long
def test_what_a_guest_invents_takes_bounded_memory() -> None:
    found = snapshot(persona("A", "ls"), policy("a", "A"))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(300):  # as many groups as a guest may name
            groups = tuple(f"{number}-{index:060d}" for index in range(3000))
            assert isinstance(found.decide(ask("ls", groups=groups), CLEAR), Granted)
        for number in range(400):  # as long names as it may give a program
            paths = tuple(f"/{number}/{index}".ljust(4000, "x") for index in range(60))
            request = replace(ask("ls"), program=Program("/usr/bin/x", (), paths))
            assert isinstance(found.decide(request, CLEAR), Denied)
        assert tracemalloc.get_traced_memory()[0] - before < 80 << 20
    finally:
        tracemalloc.stop()
    assert isinstance(found.decide(ask("ls"), CLEAR), Granted)
