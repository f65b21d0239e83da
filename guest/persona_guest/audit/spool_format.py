"""What a segment of the spool holds, byte by byte.  Pure: it reads and writes no file.

A segment is frames, one after the other.  A frame is the length of its payload (4 bytes, little endian), the first 8
bytes of the payload's SHA-256, and the payload.  The payload of the first frame is the segment's header, of each other
one a RECORD with its number (docs/protocol.md); both are JSON.  The digest finds what a crash or a bad disk did; it is
no signature, and nobody but root reads or writes these files.

A header may sum up the segment before it, which is written no more by then: an agent that begins checks one digest of
that file, and decodes none of its records.
"""

import hashlib
import json
import struct
from dataclasses import asdict, dataclass, replace
from typing import Any

from persona import json_fields, record_codec
from persona.json_fields import CodecError
from persona.record_codec import Stream

FORMAT = 1
SUMMARY_PART = 64  # of what it sums up, that a summary may take at most: with more users than that there is none
PAYLOAD_MAX = 256 * 1024  # bytes; the largest record has some 80 KB
_HEAD = struct.Struct("<I8s")
OVERHEAD = _HEAD.size  # bytes of a frame beside its payload


class FormatError(ValueError):
    """What begins no segment, or one of a version of the format that this one does not know."""


Held = tuple[str, bool]  # whose a record is, and whether it is a start (room.py)


@dataclass(frozen=True, slots=True)
class Summary:
    """What an agent that begins must know of a whole segment: ``size`` bytes in a file with this SHA-256, in hex.

    ``last`` is the number of its last record, ``held`` the bytes of its records' frames by whose they are, ``lost`` the
    first and the last number of what each marker in it says is lost.
    """

    size: int
    sha256: str
    last: int
    held: tuple[tuple[Held, int], ...]
    lost: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Header:
    """Whose records a segment has; ``first`` is the number of the first one that was written into it.

    ``before`` sums up the segment before it; ``None`` where nobody did.
    """

    stream: Stream
    first: int
    before: Summary | None = None


@dataclass(frozen=True, slots=True)
class Frames:
    """The payloads that could be read, and where the last of them ends.  What follows it is no whole frame."""

    payloads: tuple[bytes, ...]
    end: int


def frame(payload: bytes) -> bytes:
    """One frame."""
    return _HEAD.pack(len(payload), _digest(payload)) + payload


def read(data: bytes, start: int = 0, limit: int | None = None) -> Frames:
    """The frames from ``start`` on, at most ``limit`` of them, up to the first that is not whole.  Raises nothing."""
    payloads: list[bytes] = []
    while limit is None or len(payloads) < limit:
        if len(data) - start < OVERHEAD:
            break
        size, digest = _HEAD.unpack_from(data, start)
        end = start + OVERHEAD + size
        if not 0 < size <= PAYLOAD_MAX or end > len(data):
            break
        payload = data[start + OVERHEAD : end]
        if _digest(payload) != digest:
            break
        payloads.append(payload)
        start = end
    return Frames(tuple(payloads), start)


def is_torn(data: bytes, start: int) -> bool:
    """Whether what is at ``start``, where no whole frame begins, is only the beginning of the last one.

    Where a whole frame follows somewhere, something else happened to it than a write that was cut short.
    """
    return not any(read(data, later, 1).payloads for later in range(start + 1, len(data) - OVERHEAD))


def encode_header(header: Header) -> bytes:
    """The frame with which a segment begins; without a summary that is too large."""
    value: dict[str, Any] = {"format": FORMAT, **asdict(header.stream), "first": header.first}
    if header.before is not None:
        before = header.before
        held = [[user, grant, size] for (user, grant), size in before.held]
        summary = {**asdict(before), "held": held}
        if len(_json(summary)) <= before.size // SUMMARY_PART:
            value["before"] = summary
    return frame(_json(value))


def decode_header(payload: bytes) -> Header:
    """Raises ``FormatError``."""
    try:
        value = json.loads(payload)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise FormatError("it is of a version of the format that this agent does not know")
        header = Header(record_codec.decode_stream(value), json_fields.integer(value.get("first"), "first"))
    except (CodecError, ValueError, RecursionError) as error:
        raise FormatError(str(error)) from None
    try:
        return replace(header, before=_decode_summary(value["before"])) if "before" in value else header
    except (CodecError, ValueError, TypeError):
        return header  # of another version: the segment before it is read as a whole


def _decode_summary(value: object) -> Summary:
    """Raises ``CodecError``, ``TypeError`` or ``ValueError``."""
    item = json_fields.mapping(value, "before", ("size", "sha256", "last", "held", "lost"))
    return Summary(
        json_fields.integer(item["size"], "size"),
        json_fields.string(item["sha256"], "sha256"),
        json_fields.integer(item["last"], "last"),
        tuple(
            ((json_fields.string(user, "held"), json_fields.boolean(grant, "held")), json_fields.integer(size, "held"))
            for user, grant, size in item["held"]
        ),
        tuple((json_fields.integer(first, "lost"), json_fields.integer(last, "lost")) for first, last in item["lost"]),
    )


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _digest(payload: bytes) -> bytes:
    return hashlib.sha256(payload, usedforsecurity=False).digest()[:8]
