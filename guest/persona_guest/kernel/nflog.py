"""Packets that rules log, as the kernel hands them on: linux/netfilter/nfnetlink_log.h."""

from collections.abc import Iterator
from typing import NamedTuple

from persona_guest.kernel import netlink
from persona_guest.kernel.netlink import Message, Netlink, attribute, u32

_SUBSYSTEM = 4
_PACKET, _CONFIG = 0, 1
_BIND = 1
_COPY_PACKET = 2
_AT_ONCE = 1  # the kernel gathers so many packets: who is refused should hear of it while they are there


class Packet(NamedTuple):
    """A packet that a rule logged.

    ``hook`` as in enum nf_inet_hooks; ``uid`` is the sender's, where known; ``data`` begins with the IP header.
    """

    hook: int
    prefix: str
    uid: int | None
    data: bytes


def bind(socket: Netlink, group: int, size: int) -> None:
    """Has a log group's packets sent to this socket.  Raises ``OSError``, EBUSY where another socket has it."""
    socket.request(_config(group, attribute(1, bytes((_BIND,)))))
    copy = attribute(2, size.to_bytes(4, "big") + bytes((_COPY_PACKET, 0)))
    socket.request(_config(group, copy + u32(5, _AT_ONCE)))


def _config(group: int, body: bytes) -> Message:
    return Message(_SUBSYSTEM << 8 | _CONFIG, 0, 0, body, group)


def packets(socket: Netlink) -> Iterator[Packet]:
    """The packets that have come.  Raises ``OSError``, ENOBUFS where the kernel had to drop some."""
    for kind, _, body in socket.received():
        if kind == _SUBSYSTEM << 8 | _PACKET:
            values = dict(netlink.attributes(body))
            uid = values.get(11)
            yield Packet(
                hook=values.get(1, bytes(4))[2],
                prefix=netlink.string(values.get(10, b"")),
                uid=None if uid is None else int.from_bytes(uid, "big"),
                data=values.get(9, b""),
            )
