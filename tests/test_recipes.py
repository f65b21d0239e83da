"""What is easily forgotten of HACKING's recipes: a field, a figure, a condition or an operation that does nothing."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from persona_broker.policy.snapshot import Snapshot, Versioned
from persona_broker.policy.vm_health import Reported, judge
from persona_guest.enforce.plan_text import WORDS

from persona.canonical import to_mapping
from persona.conditions import When
from persona.documents import Persona, Policy, parse_document
from persona.health import Report, Space, decode_report, encode_report
from persona.schema import COMMAND_SET, PERSONA, POLICY

ENFORCE = Path(__file__).parents[1] / "guest" / "persona_guest" / "enforce"
# Every field of every document, none of them with its default.
HEALTH = {
    "disk_free_above": "10%",
    "memory_available_above": 1 << 30,
    "pressure_below": {"cpu": 60, "memory": 10, "io": 40},
    "load_below": 2,
    "failed_units_below": 1,
    "errors_below": 30,
    "clock_skew_below": 5,
    "layers": ["seccomp", "bpf"],
}
THRESHOLD = {"below": 70, "again_below": 60}
WHEN: dict[str, Any] = {
    "host_load": dict.fromkeys(("cpu", "memory", "network", "disk", "pressure"), THRESHOLD),
    "vm_health": HEALTH,
    "hours": "Mon-Fri 07:00-20:00 UTC",
}
FULL: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        PERSONA,
        {
            "kind": "Persona",
            "name": "Full",
            "description": "every field",
            "command_whitelist": ["ls"],
            "resource_limits": {
                "cpu": "150%",
                "memory": 1 << 30,
                "disk_io": {"read_bps": 1000000, "write_bps": 2000000, "read_iops": 100, "write_iops": 200},
                "pids": 64,
                "per": "persona",
            },
            "network_access": ["dns"],
            "dependencies": ["git"],
            "priority": 70,
            "on_revoke": "kill",
            "home_programs": [".local/bin/tool"],
        },
    ),
    (
        POLICY,
        {
            "kind": "Policy",
            "name": "full",
            "description": "every field",
            "subjects": {"users": ["alice"], "groups": ["analysts"]},
            "commands": ["ls"],
            "vms": ["vm-1"],
            "when": WHEN,
            "persona": "Full",
            "order": 10,
        },
    ),
    (COMMAND_SET, {"kind": "CommandSet", "name": "full", "description": "every field", "commands": ["ls"]}),
]
# A healthy VM, of which everything is known and nothing is as a new Report has it.
REPORT = Report(
    disks={"/": Space(100, 90)},
    memory=Space(8 << 30, 7 << 30),
    pressure={"cpu": 1.0, "memory": 1.0, "io": 1.0},
    load=0.5,
    failed_units=(),
    errors=0,
    clock_skew_s=0.5,
    layers={"seccomp": True, "bpf": True},
    wire=2,
    uuid="6695eb01-f6a4-4304-89aa-97f2502e193f",
)


def paths(value: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of everything in a mapping."""
    for name, member in value.items():
        yield prefix + name
        if isinstance(member, dict):
            yield from paths(member, f"{prefix}{name}.")


def schema_paths(schema: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The same of what a schema allows."""
    for name, member in schema.get("properties", {}).items():
        yield prefix + name
        yield from schema_paths(member, f"{prefix}{name}.")


@pytest.mark.parametrize(("schema", "document"), FULL, ids=lambda value: value.get("name", ""))
def test_every_field_of_the_schema_is_read_and_kept(schema: dict[str, Any], document: dict[str, Any]) -> None:
    assert set(paths(document)) == set(schema_paths(schema)), "this test's own document lacks a field"
    assert set(paths(to_mapping(parse_document(document)))) == set(paths(document))


@pytest.mark.parametrize("name", HEALTH)
def test_every_figure_that_a_policy_may_ask_for_can_be_judged(name: str) -> None:
    document = {**FULL[1][1], "when": {"vm_health": {name: HEALTH[name]}}}
    policy = parse_document(document)
    assert isinstance(policy, Policy) and policy.when.vm_health is not None
    assert judge(policy.when.vm_health, Reported(0.0, REPORT, frozenset())) is None
    unmet = judge(policy.when.vm_health, Reported(0.0, Report(), frozenset()))
    assert unmet is not None and ("is not known" in unmet.detail or name == "layers")


def test_every_figure_of_a_report_crosses() -> None:
    assert decode_report(encode_report(REPORT)) == REPORT
    for field in fields(Report):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        assert getattr(REPORT, field.name) != default, f"this test's own report has no {field.name}"


@pytest.mark.parametrize("name", [field.name for field in fields(When)])
def test_a_policy_with_only_one_condition_has_it_judged(name: str) -> None:
    persona, policy = parse_document(FULL[0][1]), parse_document({**FULL[1][1], "when": {name: WHEN[name]}})
    assert isinstance(persona, Persona) and isinstance(policy, Policy)
    snapshot = Snapshot([policy], {persona.name: Versioned(persona, 1)})
    assert policy.when in snapshot.conditions or policy.when.vm_health in snapshot.vm_conditions


def test_every_operation_has_a_sentence() -> None:
    told = [
        value
        for file in ENFORCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "op"
    ]
    named = {part.value for value in told for part in ast.walk(value) if isinstance(part, ast.Constant)}
    assert len(named) >= len(told) > 0
    assert named == set(WORDS)
