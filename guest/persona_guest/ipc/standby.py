"""What agent and standby say to each other: which listeners there are, each with its descriptor.

``take`` (agent: give me all that you keep), ``here`` (agent: I have them and answer for them), ``keep NAME…``
and ``drop NAME…`` (agent); ``kept NAME…`` and ``end`` (standby, after ``take``).  One packet each, its
descriptors in the order of its names.  While a connection lasts, the agent answers the sessions.
"""

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator

from persona_guest.loop import READABLE, Loop
from persona_guest.system import systemd

log = logging.getLogger("persona.standby")

PACKET_MAX = 8192
FDS_MAX = 200  # SCM_MAX_FD is 253, unix(7)
_NAME = re.compile(r"s-[0-9a-f]{16}|inflight")
_TAKE_S = 3.0  # of a start of the agent; without the standby it starts all the same
_AGAIN_S = 1.0


class PacketError(ValueError):
    """A packet that agent and standby do not send; the message tells what is wrong."""


def encode(word: str, names: Iterable[str] = ()) -> bytes:
    """A packet: what is said, and the names that it is about."""
    return "\n".join((word, *names)).encode()


def decode(packet: bytes) -> tuple[str, list[str]]:
    """What a packet says, and the names that it is about.  Raises ``PacketError``."""
    try:
        word, *names = packet.decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise PacketError("not ASCII") from None
    if len(packet) > PACKET_MAX or len(names) > FDS_MAX or not all(map(_NAME.fullmatch, names)):
        raise PacketError("too long, or a name that is none of ours")
    return word, names


def batches(kept: Iterable[tuple[str, int]]) -> Iterator[tuple[list[str], list[int]]]:
    """Names and descriptors in portions that fit into a packet each."""
    items = list(kept)
    for begin in range(0, len(items), FDS_MAX):
        part = items[begin : begin + FDS_MAX]
        yield [name for name, _ in part], [fd for _, fd in part]


class Keeping:
    """The agent's end: every listener is kept by systemd, over a restart, and by the standby, over a stop.

    It remembers what is kept, for a standby that was started anew.  Never waits but in ``take``.
    """

    def __init__(self, loop: Loop, path: str) -> None:
        self._loop = loop
        self._path = path
        self._kept: dict[str, int] = {}
        self._connection: socket.socket | None = None
        loop.call_every(_AGAIN_S, self._reconnect)

    @property
    def connected(self) -> bool:
        """Whether there is a standby that would answer if this process were stopped now."""
        return self._connection is not None

    def take(self) -> dict[str, int]:
        """Everything that systemd kept over a restart, and the standby over a stop, by name.

        The standby answers no more from now on.  What is not wanted is to be forgotten.
        """
        self._kept = systemd.inherited()
        for name, fd in self._from_standby().items():
            if name in self._kept:
                os.close(fd)
            else:
                self._kept[name] = fd
                systemd.store(name, fd)
        return dict(self._kept)

    def _from_standby(self) -> dict[str, int]:
        found: dict[str, int] = {}
        lost: list[str] = []
        connection = self._connect(_TAKE_S)
        if connection is None:
            return found
        deadline = time.monotonic() + _TAKE_S
        try:
            connection.send(encode("take"))
            while True:
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                packet, fds, flags, _ = socket.recv_fds(connection, PACKET_MAX, FDS_MAX, socket.MSG_CMSG_CLOEXEC)
                word, names = decode(packet)
                if word == "end":
                    break
                if flags & socket.MSG_CTRUNC:
                    lost += names[len(fds) :]
                    names = names[: len(fds)]
                found.update(zip(names, fds, strict=True))
        except (OSError, ValueError) as error:
            log.error("the standby's listeners could not be taken: %s", error)
        self._adopt(connection)
        # a listener that only the standby has would leave its session waiting: without any, nothing starts there
        if lost:
            log.critical("no descriptor left for %d listeners of the standby's", len(lost))
            for name in lost:
                if name not in self._kept:  # systemd kept it as well: then it is answered, and none the worse
                    self.forget(name)
        return found

    def ready(self) -> None:
        """Tells the standby that this agent answers from now on; until then it may begin to answer itself."""
        self._send(encode("here"), [])

    def repeat(self) -> None:
        """Tells the standby of everything that there is; what it has it keeps."""
        for names, fds in batches(self._kept.items()):
            self._send(encode("keep", names), fds)

    def keep(self, name: str, fd: int) -> None:
        """From now on ``fd`` outlives this process under ``name``."""
        self._kept[name] = fd
        systemd.store(name, fd)
        self._send(encode("keep", [name]), [fd])

    def forget(self, name: str) -> None:
        """What was kept under ``name`` is over."""
        self._kept.pop(name, None)
        systemd.forget(name)
        self._send(encode("drop", [name]), [])

    def _connect(self, timeout: float) -> socket.socket | None:
        """``None`` where there is no standby, or no descriptor left to reach it by."""
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        except OSError:
            return None
        connection.settimeout(timeout)
        try:
            connection.connect(self._path)
        except OSError:
            connection.close()
            return None
        return connection

    def _adopt(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._loop.add_reader(connection.fileno(), READABLE, lambda _events: self._lost())  # it says nothing now

    def _lost(self) -> None:
        if self._connection is not None:
            self._loop.remove_reader(self._connection.fileno())
            self._connection.close()
            self._connection = None

    def _send(self, packet: bytes, fds: list[int]) -> None:
        if self._connection is None:
            return
        try:
            socket.send_fds(self._connection, [packet], fds, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            self._lost()  # and all is said again when it is back

    def _reconnect(self) -> None:
        if self._connection is None and os.path.exists(self._path):
            connection = self._connect(0.0)
            if connection is None:
                return
            self._adopt(connection)
            self._send(encode("here"), [])
            self.repeat()
            if self._connection is not None:
                log.info("the standby is back")

    def close(self) -> None:
        """The agent ends; the standby sees that by itself."""
        with contextlib.suppress(OSError):
            self._lost()
