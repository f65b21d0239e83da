"""Keeps what was denied to each user for the agent after this one: a file a user, written a moment after a change.

In the loop's thread, and never while an exec waits for it.  What an agent that was killed had not written yet is
lost, at most the last two seconds; the broker's record and the journal have it all the same.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from persona_guest import files
from persona_guest.core.denials import USER_BYTES, Book
from persona_guest.loop import Loop

log = logging.getLogger("persona.agent")

_EVERY_S = 2.0
_AT_ONCE = 32  # files


class DenialFiles:
    """``book`` as the files below ``directory`` have it."""

    def __init__(self, loop: Loop, directory: Path, book: Book) -> None:
        self._directory = directory
        self._book = book
        self._complained = False
        self._restore()
        loop.call_every(_EVERY_S, lambda: self.write(_AT_ONCE))

    def write(self, limit: int | None = None) -> None:
        """Writes what changed, at most ``limit`` users'.  Raises nothing."""
        for uid in list(self._book.changed)[:limit]:
            path = self._directory / f"{uid}.json"
            try:
                page = self._book.page(uid)
                if page:
                    files.write(path, page)
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                if not self._complained:
                    log.warning("what was denied to users cannot be kept for 'persona denials': %s", error)
                self._complained = True
                return
            self._book.changed.discard(uid)
            self._complained = False

    def _restore(self) -> None:
        files.clear_unfinished(self._directory)
        bad = self._book.restore(self._pages())
        for uid in bad:
            log.warning("%s/%d.json cannot be read: what it says was denied is forgotten", self._directory, uid)
        self._book.changed = {uid for uid in (*self._book.changed, *bad) if not self._book.of(uid)}

    def _pages(self) -> Iterator[tuple[int, str]]:
        for path in sorted(self._directory.glob("*.json")):
            if not (path.stem.isascii() and path.stem.isdecimal()):
                continue
            try:
                with path.open("rb") as file:
                    yield int(path.stem), file.read(2 * USER_BYTES).decode("utf-8", "replace")
            except OSError as error:
                log.warning("%s: %s; what it says was denied is forgotten", path, error)
