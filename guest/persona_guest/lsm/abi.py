"""The contents of the kernel layer's maps as bytes: the mirror of guest/bpf/layer.h.  Values only, no I/O.

``LAYOUT`` names the directory below which everything is pinned; it changes with the layout of any map.
"""

import struct
from typing import NamedTuple

from persona.problems import Reason

LAYOUT = "2"
PROGRAMS = ("check_file", "check_loader", "check_arguments", "inherit", "end")
EVENTS_BYTES = 1 << 20
CHAIN_MAX = 6
ARGV_MAX = 17 * 4096
PATH_BYTES = 256
NO_IMAGE = (0, 0)
NO_ID = 0xFFFFFFFF

TID = struct.Struct("=I")
PAGE_KEY = struct.Struct("=II")
PAGE_BYTES = 4096
APPROVAL = struct.Struct(f"=QIIII{2 * CHAIN_MAX + 2}Q{PATH_BYTES}s")
SETTINGS = struct.Struct("=IIII")
COUNTER = struct.Struct("=Q")
EVENT = struct.Struct("=8IQQ16s256s")

COUNTERS = ("stopped", "would_stop", "killed", "lost")

_REASONS = {
    1: Reason.NOT_APPROVED,
    2: Reason.NOT_APPROVED,  # the approval had expired
    3: Reason.OTHER_FILE,
    4: Reason.OTHER_ARGUMENTS,
}


class Event(NamedTuple):
    """What the kernel stopped, killed (for other arguments) or, not ``enforced``, let go on and reports."""

    reason: Reason
    enforced: bool
    tid: int
    tgid: int
    uid: int
    login: int | None
    audit_session: int | None
    device: int
    inode: int
    comm: str
    path: str


def approval(
    expires_ns: int,
    chain: list[tuple[int, int]],
    argc: int,
    argv_bytes: int,
    *,
    loader: tuple[int, int] = NO_IMAGE,
    path: tuple[int, bytes] | None = None,
) -> bytes:
    """struct approval; ``chain`` and ``loader`` are (device, inode) as the kernel numbers them.

    ``path``: the index in the chain of the file that must be named so.  Raises ``ValueError`` where it, or the
    chain, is longer than the kernel compares.
    """
    flat = [number for image in chain for number in image]
    flat += [0] * (2 * CHAIN_MAX - len(flat))
    at, name = path or (CHAIN_MAX, b"")
    if len(name) > PATH_BYTES - 2 or len(chain) > CHAIN_MAX:
        raise ValueError("longer than is compared")
    return APPROVAL.pack(expires_ns, len(chain), argc, argv_bytes, at, *flat, *loader, name)


def event(raw: bytes) -> Event:
    """struct event.  Raises ``struct.error`` or ``KeyError`` for what is none."""
    why, enforced, tid, tgid, uid, login, session, _, device, inode, comm, path = EVENT.unpack(raw)
    return Event(
        _REASONS[why],
        bool(enforced),
        tid,
        tgid,
        uid,
        None if login == NO_ID else login,
        None if session == NO_ID else session,
        device,
        inode,
        comm.split(b"\0", 1)[0].decode("utf-8", "replace"),
        path.split(b"\0", 1)[0].decode("utf-8", "surrogateescape"),
    )
