"""The few calls of libbpf (Debian's libbpf1) that load, attach and pin, named as in bpf/libbpf.h.

Only the loader uses them, for a moment, with the capabilities that it takes; nothing is kept open.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from types import TracebackType

_LOG_BYTES = 1 << 20


class LoadError(OSError):
    """The kernel or libbpf refused; ``log`` is the verifier's, empty where it had nothing to say."""

    def __init__(self, number: int, what: str, log: str = "") -> None:
        super().__init__(number, f"{what}: {os.strerror(number)}")
        self.log = log


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    for name, result, arguments in (
        ("bpf_object__open_file", pointer, (text, pointer)),
        ("bpf_object__load", number, (pointer,)),
        ("bpf_object__close", None, (pointer,)),
        ("bpf_object__next_program", pointer, (pointer, pointer)),
        ("bpf_object__next_map", pointer, (pointer, pointer)),
        ("bpf_object__find_map_by_name", pointer, (pointer, text)),
        ("bpf_program__name", text, (pointer,)),
        ("bpf_program__attach", pointer, (pointer,)),
        ("bpf_program__set_log_buf", number, (pointer, pointer, ctypes.c_size_t)),
        ("bpf_map__name", text, (pointer,)),
        ("bpf_map__set_pin_path", number, (pointer, text)),
        ("bpf_link__pin", number, (pointer, text)),
        ("bpf_link__destroy", number, (pointer,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class BpfObject:
    """A BPF ELF file: ``pin_maps``, ``load``, then ``attach`` each program; a context manager."""

    def __init__(self, path: str) -> None:
        """Raises ``LoadError``; ``OSError`` where libbpf.so.1 is missing."""
        self._lib = _library()
        self._object = self._lib.bpf_object__open_file(os.fsencode(path), None)
        if not self._object:
            raise LoadError(ctypes.get_errno(), path)
        self._log = ctypes.create_string_buffer(_LOG_BYTES)

    def __enter__(self) -> "BpfObject":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lib.bpf_object__close(self._object)

    def pin_maps(self, directory: str) -> None:
        """``load`` uses the maps that are pinned there under their names, and pins what it makes."""
        for found in self._each(self._lib.bpf_object__next_map):
            name = os.fsdecode(self._lib.bpf_map__name(found))
            self._check(self._lib.bpf_map__set_pin_path(found, os.fsencode(f"{directory}/{name}")), name)

    def load(self) -> None:
        """Through the verifier into the kernel.  Raises ``LoadError`` with the verifier's log."""
        for program in self._each(self._lib.bpf_object__next_program):
            # programs are loaded in order: what is left in the buffer is the log of the one that failed
            self._lib.bpf_program__set_log_buf(program, self._log, _LOG_BYTES)
        self._check(self._lib.bpf_object__load(self._object), "bpf_object__load", self._log)

    def programs(self) -> dict[str, int]:
        """Every program by name, for ``attach``."""
        each = self._each(self._lib.bpf_object__next_program)
        return {os.fsdecode(self._lib.bpf_program__name(program)): program for program in each}

    def attach(self, program: int, pin: str) -> None:
        """Attaches to the hook of its section and pins the link: it stays when this process ends."""
        link = self._lib.bpf_program__attach(program)
        if not link:
            raise LoadError(ctypes.get_errno(), f"bpf_program__attach for {pin}")
        try:
            self._check(self._lib.bpf_link__pin(link, os.fsencode(pin)), pin)
        finally:
            self._lib.bpf_link__destroy(link)  # our hold on it; the pin keeps it

    def _each(self, step: Callable[[int, int | None], int | None]) -> Iterator[int]:
        found = step(self._object, None)
        while found:
            yield found
            found = step(self._object, found)

    def _check(self, result: int, what: str, log: "ctypes.Array[ctypes.c_char] | None" = None) -> None:
        if result < 0:
            raise LoadError(-result, what, os.fsdecode(log.value) if log is not None else "")
