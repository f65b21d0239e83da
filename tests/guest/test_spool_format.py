"""What a segment of the spool holds: frames that are whole, and a header."""

import json
from dataclasses import replace
from typing import Any

import pytest
from persona_guest.audit import spool_format
from persona_guest.audit.spool_format import Header, Summary

from persona.record_codec import Stream


def test_a_frame_that_is_not_whole_is_none() -> None:
    payloads = [b"x" * size for size in (1, 2, 300)]
    data = b"".join(map(spool_format.frame, payloads))
    assert spool_format.read(data) == spool_format.Frames(tuple(payloads), len(data))
    for cut in range(len(data)):
        found = spool_format.read(data[:cut])
        assert list(found.payloads) == payloads[: len(found.payloads)]
        assert found.end <= cut
        assert spool_format.is_torn(data[:cut], found.end)
    for at in range(len(data)):
        spoilt = bytearray(data)
        spoilt[at] ^= 1
        found = spool_format.read(bytes(spoilt))
        assert len(found.payloads) < 3 and set(found.payloads) < set(payloads)
    assert spool_format.read(bytes(4096)) == spool_format.Frames((), 0), "what a disk gives for a block it never wrote"


def test_a_header_is_read_again_and_none_of_another_format() -> None:
    header = Header(Stream("0" * 32, "1" * 32), 7)
    (payload,) = spool_format.read(spool_format.encode_header(header)).payloads
    assert spool_format.decode_header(payload) == header
    for wrong in (b"", b"{}", b"[1]", payload.replace(b'"format":1', b'"format":2'), payload.replace(b"7", b"-7")):
        with pytest.raises(spool_format.FormatError):
            spool_format.decode_header(wrong)


SUMMARY = Summary(90_000, "a" * 64, 17, ((("u", True), 300), (("\udcff", False), 8)), ((3, 4),))


def test_a_header_says_what_is_in_the_segment_before_it() -> None:
    header = Header(Stream("0" * 32, "1" * 32), 18, SUMMARY)
    (payload,) = spool_format.read(spool_format.encode_header(header)).payloads
    assert spool_format.decode_header(payload) == header
    value = json.loads(payload)
    wrong: list[dict[str, Any]] = [
        {"more": 1}, {"held": 1}, {"held": [["u", True]]}, {"held": [["u", 1, 2]]}, {"held": [["u" * 300, True, 2]]},
        {"lost": [[1]]}, {"lost": [[1, -1]]}, {"size": None}, {"sha256": 7}, {"last": "17"},
    ]  # fmt: skip
    others: list[Any] = [[], None, 7, *({**value["before"], **part} for part in wrong)]
    for before in others:
        other = json.dumps({**value, "before": before}).encode()
        assert spool_format.decode_header(other) == replace(header, before=None), before


def test_a_summary_is_small_beside_what_it_sums_up_or_is_none() -> None:
    for users in (1, 10, 100, 1000, 10_000):
        before = replace(SUMMARY, size=1 << 20, held=tuple(((f"u{n}", True), 100) for n in range(users)))
        frame = spool_format.encode_header(Header(Stream("0" * 32, "1" * 32), 18, before))
        assert len(frame) <= (1 << 20) // spool_format.SUMMARY_PART + 200
        assert (b'"before"' in frame) == (users <= 100)
