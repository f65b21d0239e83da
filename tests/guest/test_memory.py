"""The words of a waiting exec, read out of a real process's memory: wherever they lie, or EFAULT."""

import ctypes
import mmap
import os
import random
import struct
from collections.abc import Sequence

import pytest
from persona_guest.kernel import memory

PAGE = 4096
_libc = ctypes.CDLL(None)
_PROT_NONE = 0


class Pages:
    """Some pages of this process, between pages that nobody may read."""

    def __init__(self, count: int) -> None:
        self.size = count * PAGE
        self._map = mmap.mmap(-1, self.size + 2 * PAGE)
        self._bytes = (ctypes.c_char * len(self._map)).from_buffer(self._map)
        begin = ctypes.addressof(self._bytes)
        self.address = begin + PAGE
        for at in (begin, begin + PAGE + self.size):
            if _libc.mprotect(ctypes.c_void_p(at), PAGE, _PROT_NONE) != 0:
                raise OSError("mprotect")

    def put(self, at: int, data: bytes) -> int:
        """Writes ``data`` at an offset; its address."""
        ctypes.memmove(self.address + at, data, len(data))
        return self.address + at

    def vector(self, at: int, pointers: Sequence[int], word: int = 8) -> int:
        """Writes an argv, null and all; its address."""
        return self.put(at, struct.pack(f"={len(pointers) + 1}{'Q' if word == 8 else 'I'}", *pointers, 0))


def read(path_at: int, argv_at: int, word: int = 8) -> tuple[bytes | None, memory.CommandLine]:
    return memory.read_call(os.getpid(), path_at, argv_at, word)


@pytest.mark.parametrize("seed", range(40))
def test_words_are_read_wherever_they_lie(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - nothing secret
    pages = Pages(40)
    argv = [bytes(chance.choices(range(1, 256), k=chance.choice([0, 1, 9, 255, 256, 300, 5000]))) for _ in range(9)]
    argv += [b"x"] * chance.choice([0, 1, 22, 23, 24, 60])
    at = chance.randrange(PAGE)
    places = []
    for argument in argv:
        places.append(pages.put(at, argument + b"\0"))
        at += len(argument) + 1 + chance.choice([0, 0, 3000])
    vector = pages.vector(at + 8, places)
    path_at = pages.put(at + 16 + 8 * len(places), b"/usr/bin/true\0")
    assert read(path_at, vector) == (b"/usr/bin/true", (tuple(argv), True))


def test_everything_in_the_last_bytes_of_one_page() -> None:
    pages = Pages(1)
    path_at = pages.put(PAGE - 4, b"/x\0")
    vector = pages.vector(PAGE - 32, [path_at, path_at])
    assert read(path_at, vector) == (b"/x", ((b"/x", b"/x"), True))


def test_no_argv_is_an_empty_one() -> None:
    pages = Pages(1)
    assert read(pages.put(0, b"/x\0"), 0) == (b"/x", ((), True))
    assert read(pages.put(0, b"/x\0"), pages.vector(8, [])) == (b"/x", ((), True))


@pytest.mark.parametrize(
    "what", ["path", "path runs out", "vector", "vector runs out", "argument", "argument runs out"]
)
def test_a_pointer_that_leads_nowhere_is_efault(what: str) -> None:
    pages = Pages(2)
    outside = pages.address + pages.size
    path_at, vector = pages.put(0, b"/x\0"), pages.vector(64, [pages.address])
    if what == "path":
        path_at = outside
    elif what == "path runs out":
        path_at = pages.put(pages.size - 4, b"/xyz")
    elif what == "vector":
        vector = outside
    elif what == "vector runs out":
        vector = pages.put(pages.size - 8, struct.pack("=Q", pages.address))
    elif what == "argument":
        vector = pages.vector(64, [pages.address, outside])
    else:
        vector = pages.vector(64, [pages.put(pages.size - 4, b"abcd")])
    with pytest.raises(OSError) as caught:
        read(path_at, vector)
    assert caught.value.errno == 14


def test_one_string_meant_many_times_is_bounded_like_many() -> None:
    pages = Pages(1)
    long = pages.put(1000, b"a" * 3000 + b"\0")
    argv, complete = read(pages.put(0, b"/x\0"), pages.vector(16, [long] * 30))[1]
    assert not complete
    assert sum(map(len, argv)) <= memory.ARGV_BYTES_MAX


def test_too_many_arguments_are_marked() -> None:
    pages = Pages(4)
    argv, complete = read(pages.put(0, b"/x\0"), pages.vector(16, [pages.address] * (memory.ARGS_MAX + 1)))[1]
    assert (len(argv), complete) == (memory.ARGS_MAX, False)
