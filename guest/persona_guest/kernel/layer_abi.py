"""The contents of the kernel layer's maps as bytes: the mirror of guest/bpf/layer.h.  Values only, no I/O.

``LAYOUT`` names the directory below which everything is pinned; it changes with the layout of any map.
"""

import struct
from typing import NamedTuple

from persona.problems import Reason

LAYOUT = "1"
PROGRAMS = ("check_file", "check_arguments", "inherit")
EVENTS_BYTES = 1 << 20
CHAIN_MAX = 6
ARGV_MAX = 17 * 4096
NOBODY = 0xFFFFFFFF

TID = struct.Struct("=I")
PAGE_KEY = struct.Struct("=II")
PAGE_BYTES = 4096
APPROVAL = struct.Struct(f"=QIIII{2 * CHAIN_MAX}Q")
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


def approval(expires_ns: int, chain: list[tuple[int, int]], argc: int, argv_bytes: int) -> bytes:
    """struct approval; ``chain`` is (device, inode) as the kernel numbers them, at most ``CHAIN_MAX``."""
    flat = [number for image in chain for number in image]
    flat += [0] * (2 * CHAIN_MAX - len(flat))
    return APPROVAL.pack(expires_ns, len(chain), argc, argv_bytes, 0, *flat)


def kernel_device(st_dev: int) -> int:
    """The kernel's dev_t of a stat(2) device: 12 bits of major above 20 of minor (include/linux/kdev_t.h)."""
    major = (st_dev >> 8) & 0xFFF | (st_dev >> 32) & ~0xFFF
    minor = st_dev & 0xFF | (st_dev >> 12) & ~0xFF
    return (major << 20 | minor) & 0xFFFFFFFF


def event(raw: bytes) -> Event:
    """struct event.  Raises ``struct.error`` or ``KeyError`` for what is none."""
    why, enforced, tid, tgid, uid, login, session, _, device, inode, comm, path = EVENT.unpack(raw)
    return Event(
        _REASONS[why],
        bool(enforced),
        tid,
        tgid,
        uid,
        None if login == NOBODY else login,
        None if session == NOBODY else session,
        device,
        inode,
        comm.split(b"\0", 1)[0].decode("utf-8", "replace"),
        path.split(b"\0", 1)[0].decode("utf-8", "surrogateescape"),
    )
