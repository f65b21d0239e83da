"""A file with a line of JSON for each record.  It is opened anew when it was moved away (logrotate)."""

import os
from collections.abc import Sequence
from pathlib import Path

from persona_broker.audit.sinks.interface import Line


class JsonLines:
    """Appends, and waits until it is on the disk."""

    name = "json_lines"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def send(self, lines: Sequence[Line]) -> None:
        """Raises ``OSError``.  A line that was cut by a full disk is ended before the next."""
        fd = self._open()
        size = os.fstat(fd).st_size
        data = "".join(line.text + "\n" for line in lines).encode()
        if size and os.pread(fd, 1, size - 1) != b"\n":
            data = b"\n" + data
        while data:
            data = data[os.write(fd, data) :]
        os.fsync(fd)

    def _open(self) -> int:
        try:
            if self._fd >= 0 and self._path.stat().st_ino == os.fstat(self._fd).st_ino:
                return self._fd
        except FileNotFoundError:
            pass
        self.close()
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o600)
        return self._fd

    def close(self) -> None:
        """Ends the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
