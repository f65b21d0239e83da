"""The binary packets between pam_persona.so and the agent: docs/protocol.md, "PAM module, binary"."""

import contextlib
import struct
from enum import IntEnum
from typing import NamedTuple

MAGIC = 0x314E5350
PACKET_MAX = 8192
_STRING_MAX = 255
_GROUPS_PER_PACKET = 128  # in one packet
_MESSAGE_MAX = 1023
_HEAD = struct.Struct("=IHH")
_UID = struct.Struct("=I")


class Op(IntEnum):
    """What the PAM module asks, as its packet has it."""

    ACCOUNT = 1
    OPEN = 2
    LISTENER = 3
    PRESENT = 4
    GROUPS = 5  # more groups of who is in the ACCOUNT or OPEN that follows


class PamVerdict(IntEnum):
    """What the agent answers, as its packet has it."""

    PASS = 0
    GATE = 1
    DENY = 2
    DONE = 3


class Caller(NamedTuple):
    """Who logs in by which service."""

    uid: int
    service: str
    user: str
    remote: str
    shell: str
    groups: tuple[str, ...]


class Groups(NamedTuple):
    """Group names that found no room in the ACCOUNT or OPEN packet that follows."""

    names: tuple[str, ...]


class WireError(ValueError):
    """A packet that is not as docs/protocol.md says; the message tells how."""


def parse(packet: bytes) -> tuple[Op, Caller | Groups | None]:
    """Raises ``WireError`` for anything that is not exactly one well-formed packet.

    Group names that are not UTF-8 are left out: no policy can name such a group.
    """
    if not _HEAD.size <= len(packet) <= PACKET_MAX:
        raise WireError(f"packet of {len(packet)} bytes")
    magic, op_number, count = _HEAD.unpack_from(packet)
    if magic != MAGIC:
        raise WireError("wrong magic")
    try:
        op = Op(op_number)
    except ValueError:
        raise WireError(f"unknown op {op_number}") from None
    body = packet[_HEAD.size :]
    if op in (Op.LISTENER, Op.PRESENT):
        if body or count:
            raise WireError(f"{op.name} has no body")
        return op, None
    if count > _GROUPS_PER_PACKET:
        raise WireError("bad length")
    if op is Op.GROUPS:
        return op, Groups(_group_names(_strings(body, count)))
    if len(body) < _UID.size:
        raise WireError("bad length")
    (uid,) = _UID.unpack_from(body)
    service, user, remote, shell, *groups = _strings(body[_UID.size :], 4 + count)
    if not user:
        raise WireError("no user")
    try:
        name, login_shell = user.decode(), shell.decode()
    except UnicodeDecodeError:
        raise WireError("a user name or a login shell that is not UTF-8") from None
    recorded = service.decode("utf-8", "replace"), remote.decode("utf-8", "replace")
    return op, Caller(uid, recorded[0], name, recorded[1], login_shell, _group_names(groups))


def _strings(body: bytes, count: int) -> list[bytes]:
    strings = body.split(b"\0")
    if len(strings) != count + 1 or strings.pop():
        raise WireError("wrong number of strings")
    if any(len(string) > _STRING_MAX for string in strings):
        raise WireError("a string over 255 bytes")
    return strings


def _group_names(names: list[bytes]) -> tuple[str, ...]:
    found = []
    for name in names:
        with contextlib.suppress(UnicodeDecodeError):
            found.append(name.decode())
    return tuple(found)


def reply(verdict: PamVerdict, message: str = "", instructions: bytes = b"") -> bytes:
    """Encodes one reply; ``instructions`` are those of the filter.  A message over 1023 bytes is cut."""
    text = message.encode("utf-8", "replace")[:_MESSAGE_MAX].decode("utf-8", "ignore").encode()
    return _HEAD.pack(MAGIC, verdict, len(instructions) // 8) + instructions + text.replace(b"\0", b"?") + b"\0"
