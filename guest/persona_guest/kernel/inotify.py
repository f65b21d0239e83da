"""inotify(7), for files that the kernel itself changes: the *.events of a cgroup."""

import os
import struct
from collections.abc import Iterator

from persona_guest.kernel.libc import LIBC, failure

IN_MODIFY = 0x2
IN_IGNORED = 0x8000  # the file is gone, and the watch with it
_IN_NONBLOCK = os.O_NONBLOCK
_IN_CLOEXEC = os.O_CLOEXEC
_EVENT = struct.Struct("=iIII")


class Inotify:
    """One instance; ``fd`` is readable when something happened."""

    def __init__(self) -> None:
        """Raises ``OSError``."""
        self.fd = _checked(LIBC.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC))

    def add(self, path: str) -> int:
        """Watches a file for changes; the watch's number.  Raises ``OSError``."""
        return _checked(LIBC.inotify_add_watch(self.fd, os.fsencode(path), IN_MODIFY))

    def events(self) -> Iterator[tuple[int, int]]:
        """(watch, mask) of what happened; nothing where nothing did."""
        try:
            data = os.read(self.fd, 65536)
        except BlockingIOError:
            return
        offset = 0
        while offset + _EVENT.size <= len(data):
            watch, mask, _cookie, length = _EVENT.unpack_from(data, offset)
            yield watch, mask
            offset += _EVENT.size + length

    def close(self) -> None:
        """Closes the instance with all its watches."""
        os.close(self.fd)


def _checked(result: int) -> int:
    if result < 0:
        raise failure()
    return result
