"""Reads path and argument vector of a waiting execve out of the caller's memory: process_vm_readv(2).

What is read may be changed by another thread the moment after; the caller checks that the
notification is still valid, and the check after the exec looks at what really started.
"""

import ctypes
import struct
from typing import NamedTuple

from persona_guest.kernel.libc import LIBC, failure

PATH_MAX = 4096
ARGS_MAX = 1024  # arguments read; longer command lines are marked incomplete
ARGV_BYTES_MAX = 64 * 1024

_PAGE = 4096
_GUESS = 256  # most strings end within this; the rest is read on demand
_IOVS = 64

_readv = LIBC.process_vm_readv
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
        raise failure(f"process_vm_readv of thread {tid}")
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

    One system call where the arguments lie beside their vector or the path, as a shell's do, two for
    another ordinary command line.  A null ``argv_at`` is an empty argv, as the kernel takes it.
    Raises ``OSError`` (EFAULT where a pointer leads nowhere).
    """
    path_page, argv_page = path_at & -_PAGE, argv_at & -_PAGE
    if not argv_at or argv_page == path_page:
        got = _gather(tid, [(path_page, _PAGE)])
        where = {path_page: 0}
    else:
        got = _gather(tid, [(path_page, _PAGE), (argv_page, _PAGE)])
        where = {path_page: 0, argv_page: _PAGE}
    if got < _PAGE:
        raise OSError(14, "process_vm_readv: the path leads nowhere")
    pages = _view[:got].tobytes()
    begin = path_at - path_page
    end = pages.find(0, begin, _PAGE)
    path = pages[begin:end] if end >= 0 else read_string(tid, path_at, PATH_MAX)
    if not argv_at:
        return path, CommandLine((), True)
    at = where[argv_page]
    begin = at + argv_at - argv_page
    raw = pages[begin : min(begin + 32 * word, at + _PAGE)]
    words = _words(raw, word)
    if 0 not in words:
        return path, _strings(tid, _pointers(tid, argv_at, raw, word))
    pointers = words[: words.index(0)]
    argv = _beside(pointers, pages, where)
    return path, CommandLine(argv, True) if argv is not None else _strings(tid, pointers)


def _words(raw: bytes, word: int) -> list[int]:
    return memoryview(raw)[: len(raw) // word * word].cast("Q" if word == 8 else "I").tolist()


def _beside(pointers: list[int], pages: bytes, where: dict[int, int]) -> tuple[bytes, ...] | None:
    """The strings at ``pointers`` where all lie in ``pages``; ``where`` has the offset of each by its address."""
    argv = []
    total = 0
    for address in pointers:
        at = where.get(address & -_PAGE)
        if at is None:
            return None
        begin = at + address % _PAGE
        end = pages.find(0, begin, at + _PAGE)
        if end < 0:
            return None
        argv.append(pages[begin:end])
        total += end - begin + 1
    return tuple(argv) if total <= ARGV_BYTES_MAX else None  # one string may be meant many times


def _pointers(tid: int, argv_at: int, raw: bytes, word: int) -> list[int]:
    """argv's pointers up to its null, at most one more than ARGS_MAX; ``raw`` is its beginning."""
    found: list[int] = []
    while True:
        words = _words(raw, word)
        if 0 in words:
            return found + words[: words.index(0)]
        found += words
        if len(found) > ARGS_MAX:
            return found
        # a pointer may straddle two pages: read on from the last whole one
        at = argv_at + len(found) * word
        left = _PAGE - at % _PAGE
        spans = [(at, left)] if left >= word else [(at, left), (at + left, word - left)]
        raw = _view[: _gather(tid, spans)].tobytes()
        if len(raw) < word:
            raise OSError(14, "process_vm_readv: argv leaves mapped memory")


def _strings(tid: int, pointers: list[int]) -> CommandLine:
    """What they point to, wherever it is."""
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
