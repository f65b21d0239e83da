"""Maps that somebody pinned, through bpf(2): open, read, write, delete; and the ring buffer of events.

Loading programs is libbpf's business (libbpf.py) and needs capabilities.  Using a pinned map needs only
the right to open its file, which is why the agent can do without CAP_BPF (Linux 5.19).
"""

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import struct
from collections.abc import Iterator

from persona_guest.kernel.libc import LIBC, failure

_SYS_BPF = {"x86_64": 321, "aarch64": 280}
_MAP_LOOKUP_ELEM, _MAP_UPDATE_ELEM, _MAP_DELETE_ELEM, _MAP_GET_NEXT_KEY, _OBJ_GET = 1, 2, 3, 4, 7

_syscall = LIBC.syscall


class _Element(ctypes.Structure):  # union bpf_attr, the part for one element
    _fields_ = (
        ("map_fd", ctypes.c_uint32),
        ("key", ctypes.c_uint64),
        ("value", ctypes.c_uint64),  # of MAP_GET_NEXT_KEY: the next key
        ("flags", ctypes.c_uint64),
    )


class _Object(ctypes.Structure):  # the part for BPF_OBJ_GET
    _fields_ = (("pathname", ctypes.c_uint64), ("bpf_fd", ctypes.c_uint32), ("file_flags", ctypes.c_uint32))


def _bpf(command: int, attribute: ctypes.Structure) -> int:
    done: int = _syscall(_SYS_BPF[platform.machine()], command, ctypes.byref(attribute), ctypes.sizeof(attribute))
    if done < 0:
        raise failure("bpf")
    return done


def open_pinned(path: str) -> int:
    """A descriptor (CLOEXEC) of the pinned object.  Raises ``OSError``."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    return _bpf(_OBJ_GET, _Object(ctypes.addressof(name), 0, 0))


class Map:
    """A map whose keys and values have the given sizes in bytes; one element is copied a call."""

    def __init__(self, fd: int, key_size: int, value_size: int) -> None:
        self.fd = fd
        self._key = bytearray(key_size)
        self._value = bytearray(value_size)
        self._held = _array(self._key), _array(self._value)  # neither moves nor changes its size while this is held
        key, value = map(ctypes.addressof, self._held)
        self._element = _Element(fd, key, value, 0)
        self._key_only = _Element(fd, key, 0, 0)  # bpf(2) refuses fields that a command does not have
        # what does not change from call to call is looked up once: this is on the path of every exec
        self._number = _SYS_BPF[platform.machine()]
        self._at = ctypes.byref(self._element)
        self._size = ctypes.sizeof(self._element)

    def update(self, key: bytes, value: bytes) -> None:
        """Sets an element.  Raises ``OSError`` (E2BIG: the map is full)."""
        self._key[:] = key  # a wrong size is a BufferError
        self._value[:] = value
        if _syscall(self._number, _MAP_UPDATE_ELEM, self._at, self._size) < 0:
            raise failure("bpf")

    def lookup(self, key: bytes) -> bytes | None:
        """The value of an element; ``None`` where there is none."""
        self._key[:] = key
        try:
            _bpf(_MAP_LOOKUP_ELEM, self._element)
        except FileNotFoundError:
            return None
        return bytes(self._value)

    def delete(self, key: bytes) -> None:
        """Removes an element; does nothing where it is gone."""
        self._key[:] = key
        with contextlib.suppress(FileNotFoundError):
            _bpf(_MAP_DELETE_ELEM, self._key_only)

    def keys(self, limit: int) -> Iterator[bytes]:
        """At most ``limit`` keys, as they are found; others may come and go meanwhile."""
        found = ctypes.create_string_buffer(len(self._key))
        at = 0
        for _ in range(limit):
            try:
                _bpf(_MAP_GET_NEXT_KEY, _Element(self.fd, at, ctypes.addressof(found), 0))
            except FileNotFoundError:
                return
            yield found.raw
            at = ctypes.addressof(found)

    def close(self) -> None:
        """Closes its descriptor; what is pinned stays."""
        os.close(self.fd)


def _array(buffer: bytearray) -> "ctypes.Array[ctypes.c_char]":
    return (ctypes.c_char * len(buffer)).from_buffer(buffer)


_HEADER = struct.Struct("=II")  # struct bpf_ringbuf_hdr: length and flags, page offset
_POSITION = struct.Struct("=Q")
_BUSY, _DISCARD = 1 << 31, 1 << 30


class RingBuffer:
    """The consumer's end of a BPF_MAP_TYPE_RINGBUF (kernel: Documentation/bpf/ringbuf.rst); one reader at a time.

    ``fd`` is readable (poll, epoll) while there is something to read.
    """

    def __init__(self, fd: int, size: int) -> None:
        """``size`` is the map's max_entries.  Raises ``OSError``."""
        self.fd = fd
        self._mask = size - 1
        self._consumer = mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        # the producer's position, then the data twice, so that a record that wraps lies in one piece
        self._data = mmap.mmap(fd, mmap.PAGESIZE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=mmap.PAGESIZE)

    def read(self, limit: int) -> list[bytes]:
        """At most ``limit`` records, oldest first."""
        records: list[bytes] = []
        (at,) = _POSITION.unpack_from(self._consumer, 0)
        while len(records) < limit:
            (end,) = _POSITION.unpack_from(self._data, 0)
            if at >= end:
                break
            offset = mmap.PAGESIZE + (at & self._mask)
            length, _ = _HEADER.unpack_from(self._data, offset)
            if length & _BUSY:
                break  # reserved, and not written yet
            size = length & ~_DISCARD
            if not length & _DISCARD:
                records.append(self._data[offset + _HEADER.size : offset + _HEADER.size + size])
            at += (size + _HEADER.size + 7) & ~7
            _POSITION.pack_into(self._consumer, 0, at)
        return records

    def close(self) -> None:
        """Closes its descriptor; what is pinned stays."""
        self._consumer.close()
        self._data.close()
        os.close(self.fd)


def is_full(error: OSError) -> bool:
    """Whether an update failed because the map has no room."""
    return error.errno in (errno.E2BIG, errno.ENOMEM)
