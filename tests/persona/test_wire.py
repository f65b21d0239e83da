"""What a peer of another version is told: everything that is new since 0.1.0 is said in ``persona.wire``."""

import json
from dataclasses import replace
from typing import Any

import pytest

from persona import codec, json_fields, record_codec, wire
from persona.canonical import to_mapping
from persona.decisions import Denied, Granted, Lease, PersonaRef, Width
from persona.documents import Persona, parse_document
from persona.health import Report, decode_report, encode_report
from persona.problems import Reason, UnknownReason
from persona.schema import PERSONA
from persona.wire import Effect, NewField, Reduced, Unsuited


def _words(text: str) -> set[str]:
    return set(text.split())


# 0.1.0 as it is; never to be changed.
REASONS_OF_0_1_0 = _words("""
    no_matching_policy invalid_persona load_exceeds_threshold load_unknown outside_hours vm_unhealthy
    dependency_missing program_not_trusted program_unreadable argv_too_long broker_unreachable
    broker_misbehaved agent_stopping agent_overloaded session_revoked session_unknown not_approved
    other_file other_arguments kernel_layer_missing persona_unavailable memory_limit pids_limit
    persona_withdrawn network_refused enforcement_failed
""")
FIELDS_OF_0_1_0 = _words("""
    kind name description command_whitelist resource_limits resource_limits.cpu resource_limits.memory
    resource_limits.disk_io resource_limits.disk_io.read_bps resource_limits.disk_io.write_bps
    resource_limits.disk_io.read_iops resource_limits.disk_io.write_iops resource_limits.pids
    resource_limits.per network_access dependencies priority on_revoke
""")
RECORD_OF_0_1_0 = _words("""
    at session user program argv decision reason persona persona_version policy event leased complain
""")
EVENTS_OF_0_1_0 = {"exec", "admission", "break_glass", "stopped", "killed", "session_end", "limit", "frozen", "network"}

RECORD = record_codec.Record(
    1.0, "s-1", "alice", "/usr/bin/ls", ("ls",), "granted", None, "P", 1, "p", "exec", leased=False, complain=False
)


def paths(schema: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for name, field in schema.get("properties", {}).items():
        found |= {prefix + name} | paths(field, f"{prefix}{name}.")
    return found


# --- what is new is said ---


def test_every_reason_since_0_1_0_has_one_that_it_knows() -> None:
    assert {str(reason) for reason in Reason} - REASONS_OF_0_1_0 == {str(new) for new in wire.REASONS_OF_0_1_0}
    assert {wire.reason_for(reason, wire.FIRST) for reason in Reason} <= REASONS_OF_0_1_0
    assert wire.reason_for(UnknownReason("phase_of_the_moon"), wire.FIRST) in REASONS_OF_0_1_0


def test_every_field_of_a_persona_since_0_1_0_is_known_to_widen_or_to_restrict() -> None:
    assert paths(PERSONA) - FIELDS_OF_0_1_0 == set(wire.PERSONA_FIELDS)
    assert all(wire.FIRST < field.since <= wire.CURRENT for field in wire.PERSONA_FIELDS.values())


def test_0_1_0_gets_records_and_reports_with_its_own_fields_only() -> None:
    record = record_codec.Record(*[getattr(RECORD, name) for name in RECORD.__slots__ if name != "extra"])
    told = record_codec.encode_record(record, wire.FIRST)
    assert set(told) == RECORD_OF_0_1_0
    assert set(record_codec.EVENTS) >= EVENTS_OF_0_1_0
    for event in record_codec.EVENTS:
        new = record_codec.decode_record({**told, "event": event})
        assert record_codec.encode_record(new, wire.FIRST)["event"] in EVENTS_OF_0_1_0
    assert set(encode_report(Report(), wire.FIRST)) == {
        "disks", "memory", "pressure", "load", "failed_units", "errors", "clock_skew_s", "layers",
    }  # fmt: skip


def test_a_numbered_record_and_a_marker_cross_and_0_1_0_is_told_neither() -> None:
    record = replace(RECORD, number=7, event="lost", lost=record_codec.Lost(3, 6, "spool_full"))
    told = record_codec.encode_record(record)
    assert (told["number"], told["lost"]) == (7, {"first": 3, "last": 6, "why": "spool_full"})
    assert record_codec.decode_record(json.loads(json.dumps(told))) == record
    assert record.lost is not None and record.lost.count == 4
    assert set(record_codec.encode_record(record, wire.FIRST)) == RECORD_OF_0_1_0
    assert set(record_codec.encode_record(RECORD)) == RECORD_OF_0_1_0, "what it does not have it does not say"
    for part in ({"first": 7}, {"first": 0}, {"last": None}, {"why": "Full"}):
        with pytest.raises(json_fields.CodecError, match=r"record\.lost"):
            record_codec.decode_record({**told, "lost": {**told["lost"], **part}})
    for number in (-1, "7", 1.0, True, None):
        with pytest.raises(json_fields.CodecError, match=r"record\.number"):
            record_codec.decode_record({**told, "number": number})


def test_a_stream_is_two_numbers_of_32_hex_digits() -> None:
    stream = record_codec.Stream("0" * 31 + "f", "a" * 32)
    assert record_codec.decode_stream({**record_codec.encode_stream(stream), "more": 1}) == stream
    for wrong in ("", "0" * 31, "0" * 33, "G" * 32, "A" * 32, 7, "0" * 32 + "\n"):
        with pytest.raises(json_fields.CodecError, match=r"stream\.boot"):
            record_codec.decode_stream({"machine": "0" * 32, "boot": wrong})


def test_releases_have_names() -> None:
    assert set(wire.RELEASES) == set(range(wire.FIRST, wire.CURRENT + 1))


# --- versions ---


def test_the_lower_version_is_spoken() -> None:
    assert wire.common(None) == wire.FIRST
    assert wire.common("1") == wire.FIRST
    assert wire.common(str(wire.CURRENT)) == wire.common("9999") == wire.CURRENT
    for wrong in ("", "0", "-1", "1.0", "10000", "\u0662", "1 ", "one"):
        with pytest.raises(wire.WireError, match="Persona-Wire"):
            wire.common(wrong)


# --- what this version does with what it does not know ---


def test_a_decision_with_more_in_it_is_read_and_a_reason_is_kept_as_it_is() -> None:
    granted = Granted(PersonaRef("P", 1), "p", Lease(30.0, Width.PROGRAM), 8)
    told = codec.encode_decision(granted)
    told["persona"]["more"] = told["lease"]["more"] = told["more"] = 1
    assert codec.decode_decision(told) == granted
    told["lease"]["width"] = "session"  # never wider than this version knows
    assert codec.decode_decision(told) == Granted(PersonaRef("P", 1), "p", Lease(0.0, Width.ARGV), 8)

    denied = codec.encode_decision(Denied(Reason.OUTSIDE_HOURS)) | {"reason": "phase_of_the_moon"}
    found = codec.decode_decision(denied)
    assert isinstance(found, Denied)
    assert found.reason == "phase_of_the_moon"
    assert found.reason not in list(Reason)
    assert codec.encode_decision(found)["reason"] == "phase_of_the_moon"
    for wrong in ("", "Upper", "a" * 65, "\x1b[31m", 7, None, ["outside_hours"]):
        with pytest.raises(json_fields.CodecError, match="reason"):
            codec.decode_decision({**denied, "reason": wrong})


def test_a_list_of_groups_with_more_in_it_is_read() -> None:
    groups = codec.GroupsInUse("t", frozenset("a"))
    assert codec.decode_groups_in_use({**codec.encode_groups_in_use(groups), "more": 1}) == groups


def test_a_record_of_a_newer_guest_is_kept_with_what_is_new_in_it() -> None:
    told = record_codec.encode_record(RECORD) | {
        "event": "lunar",
        "reason": "phase_of_the_moon",
        "moon": {"phase": [1, "new"]},
    }
    record = record_codec.decode_record(told)
    assert (record.event, record.reason) == ("lunar", "phase_of_the_moon")
    assert record_codec.encode_record(record) == told  # as the broker stores it
    old = record_codec.encode_record(record, wire.FIRST)
    assert (old["event"], old["reason"]) == ("exec", "no_matching_policy")
    with pytest.raises(json_fields.CodecError, match=r"record\.event"):
        record_codec.decode_record({**told, "event": "\x1b[31m"})


def test_what_is_new_in_a_record_is_bounded() -> None:
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    odd = json.loads('{"a": [NaN], "b": 1e999}')  # as Python reads them; SQLite's JSON knows none, and finds none
    for more in ("x" * 300_000, deep, {str(number): number for number in range(5000)}, odd["a"], odd["b"]):
        record = record_codec.decode_record(record_codec.encode_record(RECORD) | {"moon": more})
        assert 0 < len(record.extra) <= record_codec.MAX_EXTRA
        assert set(record_codec.encode_record(record)) == RECORD_OF_0_1_0 | {"left_out"}
    small = record_codec.decode_record(record_codec.encode_record(RECORD) | {"at": 2.0, "extra": {"at": 1}})
    assert record_codec.encode_record(small)["at"] == 2.0


def test_figures_of_a_newer_guest_are_skipped() -> None:
    assert decode_report(encode_report(Report(wire=7), wire.FIRST)).wire == wire.FIRST
    told = encode_report(Report(wire=7)) | {"gpu": 1, "disks": {"/": {"total": 2, "free": 1, "inodes": 3}}}
    told["pressure"] = {"cpu": 1.0, "gpu": 2.0}
    report = decode_report(told)
    assert report.pressure == {"cpu": 1.0}
    assert report.disks["/"].free == 1
    assert report.wire == 7


# --- documents for older agents ---


def document(**fields: Any) -> dict[str, Any]:
    persona = parse_document({"kind": "Persona", "name": "P", "command_whitelist": ["ls"]})
    assert isinstance(persona, Persona)
    return {**to_mapping(persona), **fields}


def test_a_field_that_widens_is_left_out_and_one_that_restricts_is_not() -> None:
    fields = {
        "home_programs": NewField(2, Effect.WIDENS),
        "resource_limits.gpu": NewField(2, Effect.RESTRICTS),
        "resource_limits.burst": NewField(2, Effect.WIDENS),
    }
    plain = document()
    assert wire.persona_for(plain, 1, fields) == plain
    limits = {"cpu": "50%", "burst": "80%"}
    wide = document(home_programs=["~/bin/x"], resource_limits=limits)
    assert wire.persona_for(wide, 1, fields) == document(resource_limits={"cpu": "50%"})
    assert wire.persona_for(wide, 2, fields) == wide
    limited = document(resource_limits={"gpu": 1})
    assert wire.persona_for(limited, 2, fields) == limited
    told = wire.persona_for(limited, 1, fields)
    assert isinstance(told, Unsuited)
    assert "resource_limits.gpu" in told.problem
    assert "upgrade persona-guest there to 0.2.0" in told.problem


@pytest.mark.parametrize(
    ("texts", "kept", "left_out"),
    [
        (["ls", "git **", "!git push **"], ("ls", "git **", "!git push **"), ()),
        (["grep ** /var/log/*", "ls"], ("ls",), ("!grep",)),
        (["git **", "!git ** push"], ("git **", "!git"), ()),
        (["/opt/a* ** x"], (), ("!/opt/a*",)),
        (["psql -c 'select *'"], ("psql -c 'select *'",), ()),
        (["less '/var/log/a b'"], ("less '/var/log/a b'",), ()),
    ],
)
def test_patterns_that_0_1_0_cannot_read(texts: list[str], kept: tuple[str, ...], left_out: tuple[str, ...]) -> None:
    assert wire.patterns_for(texts, wire.FIRST) == Reduced(kept, left_out)
    assert wire.patterns_for(texts, wire.CURRENT) == Reduced(tuple(texts))


def test_help_is_as_long_as_its_reader_takes() -> None:
    """It may quote a path of its user's, in which each character is escaped by ten."""
    denied = codec.decode_decision(codec.encode_decision(Denied(Reason.PROGRAM_NOT_TRUSTED, help="x" * 50_000)))
    assert isinstance(denied, Denied) and len(denied.help) == 2000 and denied.help.endswith("x…")
