"""Health: what a policy may ask, what a report may say, and both forms back and forth."""

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona.canonical import to_mapping
from persona.documents import Policy, parse_document
from persona.health import Bound, Report, Space, VmHealth, decode_report, encode_report
from persona.json_fields import CodecError
from persona.parsing import DocumentError
from persona.schema import SCHEMA

WHOLE = {
    "disk_free_above": "10%", "memory_available_above": "512MiB", "pressure_below": {"cpu": 60, "io": 40.5},
    "load_below": 1.5, "failed_units_below": 1, "errors_below": 30, "clock_skew_below": "5s",
    "layers": ["seccomp", "verify"],
}  # fmt: skip


def policy(**asked: Any) -> dict[str, Any]:
    return {
        "kind": "Policy",
        "name": "a",
        "subjects": {"users": ["alice"]},
        "persona": "A",
        "when": {"vm_health": asked},
    }


def parsed(**asked: Any) -> VmHealth | None:
    document = parse_document(policy(**asked))
    assert isinstance(document, Policy)
    return document.when.vm_health


def test_all_that_can_be_asked() -> None:
    jsonschema.validate(policy(**WHOLE), SCHEMA)
    assert parsed(**WHOLE) == VmHealth(
        (
            Bound("disk_free", 10, percent=True),
            Bound("memory_available", 512 << 20),
            Bound("pressure.cpu", 60),
            Bound("pressure.io", 40.5),
            Bound("load", 1.5),
            Bound("failed_units", 1),
            Bound("errors", 30),
            Bound("clock_skew", 5),
        ),
        ("seccomp", "verify"),
    )


@pytest.mark.parametrize("asked", [WHOLE, {"disk_free_above": "12.3456789%"}, {"disk_free_above": 1 << 33}, {}])
def test_the_canonical_form_reads_back(asked: dict[str, Any]) -> None:
    document = parse_document(policy(**asked))
    jsonschema.validate(to_mapping(document), SCHEMA)
    assert parse_document(to_mapping(document)) == document


@pytest.mark.parametrize(
    ("asked", "where"),
    [
        ({"disk_free_above": "0%"}, "disk_free_above"),
        ({"disk_free_above": "95%"}, "disk_free_above"),
        ({"disk_free_above": "nan%"}, "disk_free_above"),
        ({"disk_free_above": "much"}, "disk_free_above"),
        ({"memory_available_above": -1}, "memory_available_above"),
        ({"pressure_below": {"gpu": 1}}, "pressure_below.gpu"),
        ({"pressure_below": {"cpu": 0}}, "pressure_below.cpu"),
        ({"memory_available_above": 5}, "memory_available_above"),
        ({"pressure_below": 7}, "pressure_below"),
        ({"errors_below": "3"}, "errors_below"),
        ({"errors_below": True}, "errors_below"),
        ({"clock_skew_below": 0.2}, "clock_skew_below"),
        ({"clock_skew_below": "soon"}, "clock_skew_below"),
        ({"layers": ["magic"]}, "layers[0]"),
        ({"layers": ["bpf", "bpf"]}, "layers[1]"),
        ({"disk_free": "10%"}, "disk_free"),
    ],
)
def test_what_is_refused_names_its_field(asked: dict[str, Any], where: str) -> None:
    with pytest.raises(DocumentError) as error:
        parse_document(policy(**asked))
    assert [finding.path for finding in error.value.findings] == [f"when.vm_health.{where}"]


REPORT = Report(
    disks={"/": Space(6_000_000_000, 3_000_000_000), "/srv/a b": Space(0, 0)},
    memory=Space(2 << 30, 1 << 30),
    pressure={"cpu": 1.5, "io": 0.0},
    load=0.25,
    failed_units=("x.service",),
    errors=3,
    clock_skew_s=-1.5,
    layers={"seccomp": True, "bpf": False},
    uuid="6695eb01-f6a4-4304-89aa-97f2502e193f",
)


@pytest.mark.parametrize("report", [REPORT, Report()])
def test_reports_survive_the_wire(report: Report) -> None:
    assert decode_report(json.loads(json.dumps(encode_report(report)))) == report


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"disks": {f"/{n}": {"total": 1, "free": 1} for n in range(200)}}, "disks"),
        ({"disks": {"/" * 5000: {"total": 1, "free": 1}}}, "disks"),
        ({"disks": {"/": {"total": 1, "free": -1}}}, "disks['/'].free"),
        ({"memory": 7}, "memory"),
        ({"pressure": {"gpu": "high"}}, "pressure['gpu']"),
        ({"pressure": {str(n): 1 for n in range(20)}}, "pressure"),
        ({"pressure": {"cpu": "high"}}, "pressure"),
        ({"load": float("nan")}, "load"),
        ({"failed_units": ["u"] * 100}, "failed_units"),
        ({"errors": 1.5}, "errors"),
        ({"clock_skew_s": float("inf")}, "clock_skew_s"),
        ({"clock_skew_s": True}, "clock_skew_s"),
        ({"layers": {"seccomp": "yes"}}, "layers['seccomp']"),
        ({"uuid": "6695EB01-F6A4-4304-89AA-97F2502E193F"}, "uuid"),
        ({"uuid": "6" * 10_000}, "uuid"),
        ({"uuid": None}, "uuid"),
        ({"layers": {str(n): True for n in range(20)}}, "layers"),
    ],
)
def test_reports_that_are_refused(change: dict[str, Any], where: str) -> None:
    with pytest.raises(CodecError) as error:
        decode_report({**encode_report(REPORT), **change})
    assert error.value.message.startswith(where)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.dictionaries(st.text(), x)))
def test_garbage_is_refused_and_never_crashes(value: Any) -> None:
    with pytest.raises(CodecError):
        decode_report(value)
