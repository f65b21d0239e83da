"""netlink(7) as nftables and nflog speak it: attributes, one batch that is applied whole, and dumps.

The kernel handles a request in the caller's own system call: what waits here waits for the kernel, for a module that it
loads (``Table.warm``) or for another who changes tables, and for no process of a user's.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x1, 0x4, 0x300, 0x200, 0x400, 0x800
NLMSG_ERROR, NLMSG_DONE = 2, 3
_NLM_F_DUMP_INTR = 0x10
NETLINK_NETFILTER = 12
_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NETLINK_CAP_ACK = 270, 1, 10
_SO_SNDBUFFORCE = 32
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11  # linux/netfilter/nfnetlink.h
_NESTED = 0x8000
_TYPE = 0x3FFF
_SEND_BUFFER = 64 << 20  # one batch is one datagram: a thousand personas are some 5 MB
_RECEIVE = 1 << 18
_TIMEOUT_S = 2  # answers are there when send returns; this is for a kernel that has none

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_NFGEN = struct.Struct(">BBH")  # struct nfgenmsg
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr


class Message(NamedTuple):
    """One request of a netfilter subsystem.

    ``kind`` is subsystem << 8 | message, ``flags`` NLM_F_* beside REQUEST, ``resource`` what the subsystem says.
    """

    kind: int
    flags: int
    family: int
    body: bytes
    resource: int = 0


def attribute(kind: int, value: bytes) -> bytes:
    """A ``struct nlattr`` with its value, padded."""
    size = 4 + len(value)
    return _ATTRIBUTE.pack(size, kind) + value + bytes(-size % 4)


def nested(kind: int, *inner: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | _NESTED, b"".join(inner))


def text(kind: int, value: str) -> bytes:
    """A string attribute: the text with its NUL."""
    return attribute(kind, value.encode() + b"\0")


def u32(kind: int, value: int) -> bytes:
    """A number attribute of four bytes in network order, as nfnetlink wants them."""
    return attribute(kind, value.to_bytes(4, "big"))


def u64(kind: int, value: int) -> bytes:
    """A number attribute of eight bytes in network order."""
    return attribute(kind, value.to_bytes(8, "big"))


def attributes(body: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, value) of each attribute of a message's or a nested attribute's bytes.  Raises ``ValueError``."""
    offset = 0
    while offset + 4 <= len(body):
        size, kind = _ATTRIBUTE.unpack_from(body, offset)
        if size < 4 or offset + size > len(body):
            raise ValueError("a netlink attribute overruns its message")
        yield kind & _TYPE, body[offset + 4 : offset + size]
        offset += size + (-size % 4)


def string(value: bytes) -> str:
    """The text of a string attribute."""
    return value.rstrip(b"\0").decode("utf-8", "replace")


class Netlink:
    """One NETLINK_NETFILTER socket, for one network namespace: that in which it was made."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _TIMEOUT_S, 0))
        self._socket.bind((0, 0))
        self._sequence = 0
        self._large = False

    def close(self) -> None:
        """Closes the socket; what it made in the kernel stays."""
        self._socket.close()

    def fileno(self) -> int:
        """The socket's descriptor, for the agent's loop."""
        return self._socket.fileno()

    def batch(self, subsystem: int, messages: Iterable[Message]) -> None:
        """All of these messages or none.  Raises ``OSError`` with the kernel's reason for the first that it refuses."""
        messages = list(messages)
        if not messages:
            return
        first = self._sequence + 1
        begin = Message(_BATCH_BEGIN, 0, 0, b"", subsystem)
        end = Message(_BATCH_END, 0, 0, b"", subsystem)
        messages[-1] = messages[-1]._replace(flags=messages[-1].flags | NLM_F_ACK)
        last = first + len(messages)
        self._send(b"".join(self._frame(message) for message in (begin, *messages, end)))
        failure: OSError | None = None
        for kind, _, sequence, body in self._replies():
            if kind != NLMSG_ERROR or not first <= sequence <= last + 1:
                continue
            number = -struct.unpack_from("=i", body)[0]
            if number and failure is None:
                failure = OSError(number, f"message {sequence - first} of {len(messages)}: {os.strerror(number)}")
            if sequence == last or (failure is not None and sequence == first):
                break
        if failure is not None:
            self._drain()
            raise failure

    def request(self, message: Message) -> None:
        """One message with an answer of its own.  Raises ``OSError``."""
        self._send(self._frame(message._replace(flags=message.flags | NLM_F_ACK)))
        wanted = self._sequence
        for kind, _, sequence, body in self._replies():
            if kind == NLMSG_ERROR and sequence == wanted:
                number = -struct.unpack_from("=i", body)[0]
                if number:
                    raise OSError(number, os.strerror(number))
                return

    def dump(self, message: Message) -> list[bytes]:
        """The attributes of every object that a NLM_F_DUMP request lists.  Raises ``OSError``, ENOENT included."""
        for _ in range(5):
            found, torn = self._dump_once(message)
            if not torn:
                return found
        raise OSError(errno.EINTR, "the list changed while it was read, five times")

    def _dump_once(self, message: Message) -> tuple[list[bytes], bool]:
        self._send(self._frame(message._replace(flags=message.flags | NLM_F_DUMP)))
        wanted, found, torn = self._sequence, [], False
        for kind, flags, sequence, body in self._replies():
            if sequence != wanted:
                continue
            torn = torn or bool(flags & _NLM_F_DUMP_INTR)
            if kind == NLMSG_DONE:
                break
            if kind == NLMSG_ERROR:
                number = -struct.unpack_from("=i", body)[0]
                raise OSError(number, os.strerror(number))
            found.append(body[4:])
        return found, torn

    @property
    def port(self) -> int:
        """The address of this socket; what it changes is told to others as from there."""
        return int(self._socket.getsockname()[0])

    def join(self, group: int) -> None:
        """Subscribes to a multicast group.  Raises ``OSError``."""
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)

    def received(self, rounds: int = 64) -> Iterator[tuple[int, int, bytes]]:
        """(type, whose doing, attributes) of what the kernel sent unasked, without waiting.

        Raises ``OSError``, ENOBUFS where something was lost.
        """
        for _ in range(rounds):
            try:
                data = self._socket.recv(_RECEIVE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            for kind, _, _, port, body in _split(data):
                yield kind, port, body[4:]

    def _frame(self, message: Message) -> bytes:
        self._sequence += 1
        size = _HEADER.size + _NFGEN.size + len(message.body)
        header = _HEADER.pack(size, message.kind, message.flags | NLM_F_REQUEST, self._sequence, 0)
        return header + _NFGEN.pack(message.family, 0, message.resource) + message.body + bytes(-size % 4)

    def _send(self, data: bytes) -> None:
        if len(data) > 65536 and not self._large:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER)
            self._large = True
        self._socket.send(data)

    def _replies(self) -> Iterator[tuple[int, int, int, bytes]]:
        while True:
            for kind, flags, sequence, _, body in _split(self._socket.recv(_RECEIVE)):
                yield kind, flags, sequence, body

    def _drain(self) -> None:
        for _ in self.received():
            pass


def _split(data: bytes) -> Iterator[tuple[int, int, int, int, bytes]]:
    offset = 0
    while offset + _HEADER.size <= len(data):
        size, kind, flags, sequence, port = _HEADER.unpack_from(data, offset)
        if size < _HEADER.size or offset + size > len(data):
            raise ValueError("a netlink message overruns its datagram")
        yield kind, flags, sequence, port, data[offset + _HEADER.size : offset + size]
        offset += size + (-size % 4)
