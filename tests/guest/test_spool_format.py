"""What a segment of the spool holds: frames that are whole, and a header."""

import pytest
from persona_guest.audit import spool_format
from persona_guest.audit.spool_format import Header

from persona.codec import Stream


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
