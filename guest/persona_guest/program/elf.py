"""What an ELF file says of its own start: the ELF interpreter that it names, and whether it is one itself.

The kernel reads the same: fs/binfmt_elf.c, load_elf_binary().  Bytes in, values out; no I/O.
"""

import struct
from collections.abc import Callable
from typing import NamedTuple

Read = Callable[[int, int], bytes]  # (offset, size): what the file holds there, less at its end

_MACHINES_64 = frozenset((62, 183, 21, 22, 243))  # x86-64, AArch64, PowerPC64, s390, RISC-V: elf.h
_ET_DYN = 3
_PT_DYNAMIC, _PT_INTERP = 2, 3
_DT_FLAGS_1, _DF_1_PIE = 0x6FFFFFFB, 0x08000000
_HEADERS_MAX = 65536  # load_elf_phdrs(): more is refused
_PATH_MAX = 4096
_DYNAMIC_MAX = 65536


class Elf(NamedTuple):
    """``interpreter`` is the path in PT_INTERP, ``None`` where the file names none (a static program).

    ``is_loader``: the file is an ELF interpreter, which starts any program that it is given as an argument.
    """

    interpreter: bytes | None
    is_loader: bool


NO_ELF = Elf(None, False)


class _Header(NamedTuple):
    kind: int
    offset: int
    size: int


def parse(head: bytes, read: Read) -> Elf:
    """Reads the program headers.  What the kernel would refuse to start is ``NO_ELF``: it names no interpreter."""
    try:
        return _parse(head, read)
    except struct.error:
        return NO_ELF


def _parse(head: bytes, read: Read) -> Elf:
    kind, machine = struct.unpack_from("<HH", head, 16)
    wide = machine in _MACHINES_64
    if wide:
        entry, at = struct.unpack_from("<QQ", head, 24)
        each, count = struct.unpack_from("<HH", head, 54)
    else:
        entry, at = struct.unpack_from("<II", head, 24)
        each, count = struct.unpack_from("<HH", head, 42)
    size = 56 if wide else 32
    if each != size or not 0 < count <= _HEADERS_MAX // size:
        return NO_ELF
    table = read(at, size * count)
    headers = [_header(table, number * size, wide=wide) for number in range(count)]
    interpreter = next((header for header in headers if header.kind == _PT_INTERP), None)
    if interpreter is not None:
        return Elf(_path(read, interpreter), is_loader=False)
    dynamic = next((header for header in headers if header.kind == _PT_DYNAMIC), None)
    # A position-independent static program has no interpreter either, and says that it is a program.
    shared = kind == _ET_DYN and entry != 0 and dynamic is not None
    return Elf(None, is_loader=shared and dynamic is not None and not _is_program(read, dynamic, wide=wide))


def _header(table: bytes, at: int, *, wide: bool) -> _Header:
    if wide:
        kind, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", table, at)
    else:
        kind, offset, _, _, size = struct.unpack_from("<IIIII", table, at)
    return _Header(kind, offset, size)


def _path(read: Read, header: _Header) -> bytes | None:
    """The path in PT_INTERP; ``None`` where the kernel says ENOEXEC to it."""
    if not 2 <= header.size <= _PATH_MAX:
        return None
    raw = read(header.offset, header.size)
    return raw[:-1].split(b"\0", 1)[0] if len(raw) == header.size and raw.endswith(b"\0") else None


def _is_program(read: Read, header: _Header, *, wide: bool) -> bool:
    """Whether the dynamic section says that the file is a position-independent executable, not a library."""
    entry = struct.Struct("<QQ" if wide else "<II")
    raw = read(header.offset, min(header.size, _DYNAMIC_MAX))
    whole = raw[: len(raw) // entry.size * entry.size]
    return any(tag == _DT_FLAGS_1 and bool(value & _DF_1_PIE) for tag, value in entry.iter_unpack(whole))
