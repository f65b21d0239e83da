"""What a segment of the spool holds, byte by byte.  Pure: it reads and writes no file.

A segment is frames, one after the other.  A frame is the length of its payload (4 bytes, little endian), the first 8
bytes of the payload's SHA-256, and the payload.  The payload of the first frame is the segment's header, of each other
one a RECORD with its number (docs/protocol.md); both are JSON.  The digest finds what a crash or a bad disk did; it is
no signature, and nobody but root reads or writes these files.
"""

import hashlib
import json
import struct
from dataclasses import asdict, dataclass

from persona import codec
from persona.codec import CodecError, Stream

FORMAT = 1
PAYLOAD_MAX = 256 * 1024  # bytes; the largest record has some 80 KB
_HEAD = struct.Struct("<I8s")
OVERHEAD = _HEAD.size  # bytes of a frame beside its payload


class FormatError(ValueError):
    """What begins no segment, or one of a version of the format that this one does not know."""


@dataclass(frozen=True, slots=True)
class Header:
    """Whose records a segment has; ``first`` is the number of the first one that was written into it."""

    stream: Stream
    first: int


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
    """The frame with which a segment begins."""
    value = {"format": FORMAT, **asdict(header.stream), "first": header.first}
    return frame(json.dumps(value, separators=(",", ":")).encode())


def decode_header(payload: bytes) -> Header:
    """Raises ``FormatError``."""
    try:
        value = json.loads(payload)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise FormatError("it is of a version of the format that this agent does not know")
        return Header(codec.decode_stream(value), codec.integer(value.get("first"), "first"))
    except (CodecError, ValueError, RecursionError) as error:
        raise FormatError(str(error)) from None


def _digest(payload: bytes) -> bytes:
    return hashlib.sha256(payload, usedforsecurity=False).digest()[:8]
