"""Keeps the resolvers in our table those that this machine is configured with: what ``dns`` of a network rule means."""

import logging
import os
from collections.abc import Iterable

from persona_guest.core import ruleset
from persona_guest.enforce.network.table import Table

log = logging.getLogger("persona.enforce")

# systemd-resolved(8) writes the second for those who ask its servers and not its stub
FILES = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")
_SIZE_MAX = 65536


class Resolvers:
    """Reads resolv.conf and the like, each time that one of the files has changed."""

    def __init__(self, table: Table, files: Iterable[str] = FILES) -> None:
        self._table = table
        self._files = tuple(files)
        self._state: list[tuple[int, int, int] | None] = []

    def refresh(self) -> None:
        """Brings the table up to date.  Call it now and then: where nothing changed it costs two stat(2)."""
        state = [_state(file) for file in self._files]
        if state == self._state:
            return
        try:
            self._table.resolve(ruleset.resolvers(b"\n".join(map(_text, self._files))))
        except OSError as error:
            log.error("the resolvers of this machine: %s", error)
        else:
            self._state = state


def _state(file: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _text(file: str) -> bytes:
    try:
        with open(file, "rb") as text:
            return text.read(_SIZE_MAX)
    except OSError:
        return b""
