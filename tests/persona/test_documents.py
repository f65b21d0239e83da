"""Documents: what is read, what is refused and where, and that schema and parser agree."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from persona.canonical import digest, to_mapping
from persona.documents import Persona, Policy, check_set, parse_document
from persona.parsing import DocumentError
from persona.schema import SCHEMA

PERSONA: dict[str, Any] = {
    "kind": "Persona",
    "name": "DataAnalyst",
    "command_whitelist": ["ls", "python3 **", "psql -h analytics.internal **", "systemctl status *"],
    "resource_limits": {
        "cpu": "150%",
        "memory": "2GiB",
        "disk_io": {"read_bps": "50MB", "write_bps": "20MB"},
        "pids": 256,
    },
    "network_access": ["10.20.0.0/16:tcp/5432", "any:tcp/443", "2001:db8::/32", "in:any:tcp/22,80-90", "icmp", "dns"],
    "dependencies": ["postgresql-client (>= 15)", "service:cron"],
    "priority": 50,
}
POLICY: dict[str, Any] = {
    "kind": "Policy",
    "name": "analysts-by-day",
    "subjects": {"users": ["alice"], "groups": ["analysts"]},
    "commands": ["**"],
    "vms": ["analytics-*"],
    "when": {
        "host_load": {"cpu": {"below": 70, "again_below": 60}},
        "hours": "Mon-Fri 07:00-20:00 Europe/Berlin",
    },
    "persona": "DataAnalyst",
}


def changed(document: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**document, **fields}


def test_persona() -> None:
    persona = parse_document(PERSONA)
    assert isinstance(persona, Persona)
    assert persona.resource_limits.cpu_percent == 150
    assert persona.resource_limits.memory_bytes == 2 << 30
    assert persona.resource_limits.disk_io.read_bps == 50_000_000
    assert [str(rule) for rule in persona.network_access] == PERSONA["network_access"]
    assert [str(item) for item in persona.dependencies] == PERSONA["dependencies"]


@pytest.mark.parametrize("document", [PERSONA, POLICY])
def test_round_trip_keeps_meaning_and_digest(document: dict[str, Any]) -> None:
    first = parse_document(document)
    again = parse_document(to_mapping(first))
    assert again == first
    assert digest(again) == digest(first)
    jsonschema.validate(to_mapping(first), SCHEMA)


BAD = [
    (changed(PERSONA, colour="red"), "colour"),
    (changed(PERSONA, name="no spaces"), "name"),
    (changed(PERSONA, command_whitelist="ls"), "command_whitelist"),
    (changed(PERSONA, command_whitelist=["ls", "./x"]), "command_whitelist[1]"),
    (changed(PERSONA, command_whitelist=[7]), "command_whitelist[0]"),
    (changed(PERSONA, resource_limits={"memory": "2 potatoes"}), "resource_limits.memory"),
    (changed(PERSONA, resource_limits={"cpu": "0%"}), "resource_limits.cpu"),
    (changed(PERSONA, resource_limits={"cpu": 150}), "resource_limits.cpu"),
    (changed(PERSONA, resource_limits={"cpu": "150"}), "resource_limits.cpu"),
    (changed(PERSONA, resource_limits={"cpu": True}), "resource_limits.cpu"),
    (changed(PERSONA, resource_limits={"memory": 512}), "resource_limits.memory"),
    (changed(PERSONA, resource_limits={"memory": 10**30}), "resource_limits.memory"),
    (changed(PERSONA, resource_limits={"disk_io": {"write_bps": 20}}), "resource_limits.disk_io.write_bps"),
    (changed(PERSONA, resource_limits={"ram": 1}), "resource_limits.ram"),
    (changed(PERSONA, resource_limits={"disk_io": {"read_bps": -1}}), "resource_limits.disk_io.read_bps"),
    (changed(PERSONA, resource_limits=[]), "resource_limits"),
    (changed(PERSONA, network_access=["10.20.0.1/16"]), "network_access[0]"),
    (changed(PERSONA, network_access=["any:tcp/0"]), "network_access[0]"),
    (changed(PERSONA, dependencies=["Bad Name"]), "dependencies[0]"),
    (changed(PERSONA, priority=5000), "priority"),
    (changed(PERSONA, priority=True), "priority"),
    (changed(PERSONA, on_revoke="explode"), "on_revoke"),
    (changed(POLICY, subjects={}), "subjects"),
    (changed(POLICY, subjects={"users": ["a b"]}), "subjects.users[0]"),
    (changed(POLICY, when={"host_load": {"cpu": {"below": 60, "again_below": 70}}}), "when.host_load.cpu.again_below"),
    (changed(POLICY, when={"host_load": {"cpu": {}}}), "when.host_load.cpu.below"),
    (changed(POLICY, when={"moon": "full"}), "when.moon"),
    (changed(POLICY, when={"hours": "Mon-Fry 07:00-20:00"}), "when.hours"),
    (changed(POLICY, when={"hours": "07:00-20:00 Mars/Base"}), "when.hours"),
    (changed(POLICY, vms=["a/b"]), "vms[0]"),
    ({"kind": "Person"}, "kind"),
    ("a string", "kind"),
]


@pytest.mark.parametrize(("document", "path"), BAD)
def test_refused_with_its_path(document: Any, path: str) -> None:
    with pytest.raises(DocumentError) as error:
        parse_document(document)
    assert path in [finding.path for finding in error.value.findings]


def test_all_mistakes_are_found_at_once() -> None:
    with pytest.raises(DocumentError) as error:
        parse_document(changed(PERSONA, name="", priority=-1, colour="red"))
    assert {finding.path for finding in error.value.findings} == {"name", "priority", "colour"}


@pytest.mark.parametrize("document", [PERSONA, POLICY, *(document for document, _ in BAD)])
def test_the_parser_is_never_looser_than_the_schema(document: Any) -> None:
    if not jsonschema.Draft202012Validator(SCHEMA).is_valid(document):
        with pytest.raises(DocumentError):
            parse_document(document)


def test_sets() -> None:
    persona, policy = parse_document(PERSONA), parse_document(POLICY)
    assert not check_set([persona, policy])
    assert isinstance(policy, Policy)
    assert [finding.path for _, finding in check_set([policy])] == ["persona"]
    assert [finding.path for _, finding in check_set([persona, persona])] == ["name"]


HEALTH = {
    "disk_free_above": "10%",
    "memory_available_above": "1GiB",
    "pressure_below": {"cpu": 5},
    "load_below": 1,
    "failed_units_below": 1,
    "errors_below": 3,
    "clock_skew_below": "2s",
    "layers": ["bpf"],
}
ODD: list[Any] = [
    None, True, 0, -1, 10**400, 1e308, float("inf"), float("nan"), "", "\x00", "\ud800", "x" * 100_000, "9" * 5000,
    "9" * 5000 + "GiB", "9" * 5000 + "s", "9e999%", "1e999", "\u00b2", "\u0663", [], {}, [[]], [{}], [None], {"a": 1},
    [1] * 300, {"below": float("nan")}, "00:00-24:00 ../x", "00:00-24:00 " + "A" * 5000, "00:00-24:00 US", "/[", "[a-",
    "/usr/[", "**", "any:tcp/99999999999", "::/0:tcp/1-" + "9" * 5000, "a (>= " + "9" * 5000 + ")", "service:",
    "10.0.0.0/8 via x", "10.0.0.0/99",
]  # fmt: skip


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*path, key))


@pytest.mark.parametrize("document", [PERSONA, changed(POLICY, when={**POLICY["when"], "vm_health": HEALTH})])
def test_nothing_in_any_field_raises_anything_but_findings(document: dict[str, Any]) -> None:
    parse_document(document)
    for *path, last in filter(None, _paths(document)):
        for odd in ODD:
            value = copy.deepcopy(document)
            inner: Any = value
            for key in path:
                inner = inner[key]
            inner[last] = odd
            with contextlib.suppress(DocumentError):
                parse_document(value)
