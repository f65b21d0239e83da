"""Reads path and argument vector of a waiting execve out of the caller's memory: process_vm_readv(2).

What is read may be changed by another thread the moment after; the caller checks that the
notification is still valid, and the check after the exec looks at what really started.
"""

import ctypes
import os
import struct
from typing import NamedTuple

PATH_MAX = 4096
ARGS_MAX = 1024  # arguments read; longer command lines are marked incomplete
ARGV_BYTES_MAX = 64 * 1024

_PAGE = 4096
_GUESS = 256  # most strings end within this; the rest is read on demand
_IOVS = 64

_libc = ctypes.CDLL(None, use_errno=True)
_readv = _libc.process_vm_readv
_readv.restype = ctypes.c_ssize_t
_readv.argtypes = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)

_data = bytearray(_IOVS * _PAGE)
_view = memoryview(_data)
_local = bytearray(16)
_remote = bytearray(16 * _IOVS)
_data_at = ctypes.addressof((ctypes.c_char * len(_data)).from_buffer(_data))
_local_at = ctypes.addressof((ctypes.c_char * len(_local)).from_buffer(_local))
_remote_at = ctypes.addressof((ctypes.c_char * len(_remote)).from_buffer(_remote))
_pair = struct.Struct("=QQ")
_pair.pack_into(_local, 0, _data_at, len(_data))


class CommandLine(NamedTuple):
    """argv as bytes; ``complete`` is false where it was longer than is read."""

    argv: tuple[bytes, ...]
    complete: bool


def _gather(tid: int, spans: list[tuple[int, int]]) -> int:
    """Reads the spans (address, length; none crosses a page) one after the other into ``_data``."""
    offset = 0
    for address, length in spans:
        _pair.pack_into(_remote, offset, address, length)
        offset += 16
    count: int = _readv(tid, _local_at, 1, _remote_at, len(spans), 0)
    if count < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"process_vm_readv of thread {tid}: {os.strerror(number)}")
    return count


def _span(address: int, wanted: int) -> tuple[int, int]:
    return address, min(wanted, _PAGE - address % _PAGE)


def read_string(tid: int, address: int, limit: int) -> bytes | None:
    """The NUL-terminated string at ``address``; ``None`` where it is longer than ``limit`` bytes.

    Raises ``OSError`` (EFAULT, ESRCH, EPERM).
    """
    parts: list[bytes] = []
    size = 0
    while size <= limit:
        span = _span(address + size, _PAGE)
        if _gather(tid, [span]) < span[1]:
            raise OSError(14, "process_vm_readv: the string leaves mapped memory")
        chunk = bytes(_view[: span[1]])
        end = chunk.find(0)
        if end >= 0:
            parts.append(chunk[:end])
            return b"".join(parts)
        parts.append(chunk)
        size += span[1]
    return None


def read_call(tid: int, path_at: int, argv_at: int, word: int) -> tuple[bytes | None, CommandLine]:
    """Path (``None`` if longer than PATH_MAX) and argv of an execve whose pointers are ``word`` bytes wide.

    Two system calls for an ordinary command line.  A null ``argv_at`` is an empty argv, as the
    kernel takes it.  Raises ``OSError`` (EFAULT where a pointer leads nowhere).
    """
    spans = [_span(path_at, _GUESS)]
    if argv_at:
        spans.append(_span(argv_at, 32 * word))
    got = _gather(tid, spans)
    first = spans[0][1]
    if got < first:
        raise OSError(14, "process_vm_readv: the path leaves mapped memory")
    end = _data.find(0, 0, first)
    path = bytes(_view[:end]) if end >= 0 else None
    raw_vector = bytes(_view[first:got])
    if path is None:
        path = read_string(tid, path_at, PATH_MAX)
    if not argv_at:
        return path, CommandLine((), True)
    return path, _read_vector(tid, argv_at, raw_vector, word)


def _pointers(tid: int, argv_at: int, raw: bytes, word: int) -> list[int]:
    """argv's pointers up to its null, at most one more than ARGS_MAX; ``raw`` is its beginning."""
    found: list[int] = []
    code = "Q" if word == 8 else "I"
    while True:
        count = len(raw) // word
        if not count:
            raise OSError(14, "process_vm_readv: argv leaves mapped memory")
        values = struct.unpack_from(f"={count}{code}", raw)
        if 0 in values:
            found += values[: values.index(0)]
            return found
        found += values
        if len(found) > ARGS_MAX:
            return found
        # a pointer may straddle two pages: read on from the last whole one
        at = argv_at + len(found) * word
        left = _PAGE - at % _PAGE
        spans = [(at, left)] if left >= word else [(at, left), (at + left, word - left)]
        raw = bytes(_view[: _gather(tid, spans)])


def _read_vector(tid: int, argv_at: int, raw: bytes, word: int) -> CommandLine:
    pointers = _pointers(tid, argv_at, raw, word)
    complete = len(pointers) <= ARGS_MAX
    argv: list[bytes] = []
    total = 0
    for begin in range(0, min(len(pointers), ARGS_MAX), _IOVS):
        spans = [_span(address, _GUESS) for address in pointers[begin : min(begin + _IOVS, ARGS_MAX)]]
        got = _gather(tid, spans)
        offset = 0
        for address, length in spans:
            if offset + length > got:
                raise OSError(14, "process_vm_readv: an argument leaves mapped memory")
            end = _data.find(0, offset, offset + length)
            if end >= 0:
                argv.append(bytes(_view[offset:end]))
            else:
                saved = bytes(_view[offset:got])
                whole = read_string(tid, address, ARGV_BYTES_MAX)
                _view[offset:got] = saved
                if whole is None:
                    return CommandLine(tuple(argv), False)
                argv.append(whole)
            offset += length
            total += len(argv[-1]) + 1
            if total > ARGV_BYTES_MAX:
                return CommandLine(tuple(argv[:-1]), False)
    return CommandLine(tuple(argv), complete)
