"""The wire codec: round trips, and everything from outside that is not exactly right."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona import codec, json_fields, record_codec
from persona.decisions import Denied, Granted, Lease, PersonaRef, Program, Request, Subject, Width
from persona.problems import Reason

REQUEST = Request(
    Subject("alice", ("analysts",), "analytics-1"),
    "s-1",
    Program("/usr/bin/ls", ("ls",), ("/usr/bin/ls",)),
    ("ls", "-l", "caf\udce9"),
    "/home/alice",
)
GRANTED = Granted(PersonaRef("DataAnalyst", 3), "analysts", Lease(30.0, Width.PROGRAM), 8)
DENIED = Denied(Reason.OUTSIDE_HOURS, "analysts", "DataAnalyst", "later", Lease(30.0, Width.ARGV), 8)


def wire(value: dict[str, Any]) -> Any:
    return json.loads(json.dumps(value))


def test_requests_survive_the_wire_undecodable_bytes_included() -> None:
    assert codec.decode_request(wire(codec.encode_request(REQUEST))) == REQUEST


def test_a_loader_travels_and_is_said_only_of_loaders() -> None:
    plain = wire(codec.encode_program(REQUEST.program))
    assert "loader" not in plain  # which an older broker would refuse
    assert codec.decode_program(plain) == REQUEST.program
    loader = Program("/opt/libc/start", loader=True)
    assert codec.decode_program(wire(codec.encode_program(loader))) == loader
    with pytest.raises(json_fields.CodecError, match=r"program\.loader"):
        codec.decode_program({**plain, "loader": 1})


@given(st.lists(st.text(max_size=50), max_size=20))
def test_any_arguments_survive(argv: list[str]) -> None:
    value = codec.encode_request(REQUEST)
    value["argv"] = argv
    assert codec.decode_request(wire(value)).argv == tuple(argv)


@pytest.mark.parametrize("decision", [GRANTED, DENIED])
def test_decisions(decision: Granted | Denied) -> None:
    again = codec.decode_decision(wire(codec.encode_decision(decision)))
    assert again == decision
    assert again.generation == decision.generation


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("subject", None),
        ("subject.user", ""),
        ("subject.user", "x" * 300),
        ("subject.groups", ["g"] * 4000),
        ("program.path", 7),
        ("argv", "ls"),
        ("argv", ["x"] * 2000),
        ("argv", ["x" * 70_000]),
        ("argv_complete", "yes"),
        ("extra", 1),
        ("subject.extra", 1),
    ],
)
def test_requests_that_are_refused(path: str, value: Any) -> None:
    body = wire(codec.encode_request(REQUEST))
    target = body
    *parents, last = path.split(".")
    for parent in parents:
        target = target[parent]
    target[last] = value
    with pytest.raises(json_fields.CodecError) as error:
        codec.decode_request(body)
    assert path in error.value.message


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_garbage_is_refused_and_never_crashes(value: Any) -> None:
    for decode in (codec.decode_request, codec.decode_decision, record_codec.decode_record, codec.decode_subject):
        with pytest.raises(json_fields.CodecError):
            decode(value)


@pytest.mark.parametrize(
    "change",
    [{"decision": "maybe"}, {"lease": {"seconds": -1, "width": "argv"}}, {"lease": {"seconds": 1e9, "width": "argv"}},
     {"lease": {"seconds": 1, "width": 7}}, {"persona": None}, {"generation": "8"}, {"policy": None}],
)  # fmt: skip
def test_a_granted_decision_must_be_whole(change: dict[str, Any]) -> None:
    with pytest.raises(json_fields.CodecError):
        codec.decode_decision({**wire(codec.encode_decision(GRANTED)), **change})
