"""Hears when somebody else changes our table: nft flush ruleset, a reload of nftables.service, an operator's hand."""

import errno
from collections.abc import Callable

from persona_guest.core.ruleset import TABLE
from persona_guest.kernel import netlink, nftables
from persona_guest.kernel.netlink import Netlink
from persona_guest.loop import READABLE, Loop

_SOON_S = 0.01  # what was done as one transaction is told piece by piece


class Meddling:
    """Calls ``repair`` soon after such a change, in the loop's thread; ``own`` is the port of the table's socket."""

    def __init__(self, loop: Loop, own: int, repair: Callable[[], None]) -> None:
        self._loop = loop
        self._own = own
        self._repair = repair
        self._soon = False
        self._netlink = Netlink()
        self._netlink.join(nftables.CHANGES)
        loop.add_reader(self._netlink.fileno(), READABLE, lambda _events: self._ready())

    def _ready(self) -> None:
        meddled = False
        try:
            for kind, port, body in self._netlink.received():
                if port != self._own and kind >> 8 == nftables.SUBSYSTEM:
                    meddled = meddled or netlink.string(dict(netlink.attributes(body)).get(1, b"")) == TABLE
        except OSError as error:
            if error.errno not in (errno.ENOBUFS, errno.ENOMEM):
                raise
            meddled = True  # what was lost may have been that
        if meddled and not self._soon:
            self._soon = True
            self._loop.call_later(_SOON_S, self._now)

    def _now(self) -> None:
        self._soon = False
        self._repair()
