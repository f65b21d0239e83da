"""Tells of refused connections: each target of a user once in a while, however often it is tried.

The counters of the table have every packet; this has the first ones, with where they wanted to go.
"""

import errno
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from persona_guest.core.ruleset import LOG_BYTES, LOG_GROUP
from persona_guest.enforce.network.rejected_packet import target
from persona_guest.kernel import nflog
from persona_guest.kernel.netlink import Netlink
from persona_guest.loop import READABLE, Loop

log = logging.getLogger("persona.enforce")

_QUIET_S = 10.0
_KNOWN_MAX = 4096


@dataclass(frozen=True, slots=True)
class Refusal:
    """A connection that was refused under ``persona``.

    ``uid`` of who sent; ``None`` where the packet came in, or its socket was gone.  ``target`` is in the words of
    network rules.
    """

    persona: str
    uid: int | None
    target: str


Tell = Callable[[Refusal], None]


class Refusals:
    """Reads what the rules log; ``tell`` is called in the loop's thread."""

    def __init__(self, loop: Loop, tell: Tell, clock: Callable[[], float] = time.monotonic) -> None:
        self._tell = tell
        self._clock = clock
        self._told: dict[Refusal, float] = {}
        self._overrun = -_QUIET_S  # when it was last said that some were lost
        self._loop = loop
        self._netlink = Netlink()
        try:
            nflog.bind(self._netlink, LOG_GROUP, LOG_BYTES)
        except OSError as error:
            log.error("refused connections are counted and not named: nflog group %d: %s", LOG_GROUP, error)
            self._netlink.close()
            return
        loop.add_reader(self._netlink.fileno(), READABLE, lambda _events: self._ready())

    def close(self) -> None:
        """Gives the log group back: another socket may hear it."""
        self._loop.remove_reader(self._netlink.fileno())
        self._netlink.close()

    def _ready(self) -> None:
        try:
            for packet in nflog.packets(self._netlink):
                self._heard(Refusal(packet.prefix, packet.uid, target(packet.hook, packet.data)))
        except OSError as error:
            if error.errno not in (errno.ENOBUFS, errno.ENOMEM):
                raise
            if self._clock() - self._overrun >= _QUIET_S:
                self._overrun = self._clock()
                log.warning("refused connections come faster than they can be read: some are not recorded")

    def _heard(self, refusal: Refusal) -> None:
        now = self._clock()
        if now - self._told.get(refusal, -_QUIET_S) < _QUIET_S:
            return
        if len(self._told) >= _KNOWN_MAX:
            self._told.clear()
        self._told[refusal] = now
        self._tell(refusal)
