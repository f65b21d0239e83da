"""What the standby answers in the agent's place, for the record: it notes how many starts, the next agent records them.

A file of lines of JSON in the agent's runtime state, which no full disk reaches.  The standby knows a session's name
and nothing of what was started.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from persona import json_fields
from persona.json_fields import CodecError
from persona.record_codec import Record
from persona_guest.audit import records

log = logging.getLogger("persona.record")

NAME = "without_agent"
_SIZE_MAX = 1024 * 1024


class StandbyNotes:
    """For the standby: ``add`` an answer, and ``flush`` every now and then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts: Counter[tuple[str, bool]] = Counter()
        self._complained = False

    def add(self, session_id: str, *, denied: bool) -> None:
        """Counts one start of a session that was answered."""
        self._counts[session_id, denied] += 1

    def flush(self, at: float) -> None:
        """Writes what was added; ``at`` is Unix seconds.  What cannot be written is kept for the next time."""
        if not self._counts:
            return
        lines = [
            json.dumps({"at": at, "session": session, "denied": denied, "count": count}) + "\n"
            for (session, denied), count in self._counts.items()
        ]
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                if os.fstat(fd).st_size > _SIZE_MAX:
                    raise OSError("it is full")
                os.write(fd, "".join(lines).encode())
            finally:
                os.close(fd)
        except OSError as error:
            if not self._complained:
                log.error("%s: %s; what is answered without an agent is in no record", self._path, error)
            self._complained = True
            return
        self._counts.clear()


def take(path: Path, user_of: Callable[[str], str]) -> Iterator[Record]:
    """Reads what the standby noted and removes its file: a record for each session each time.  For the agent.

    ``user_of`` names a session's user, empty where it is not known.  Raises nothing.
    """
    try:
        with path.open("rb") as file:
            lines = file.read(2 * _SIZE_MAX).splitlines()
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        log.error("%s: %s; what the standby answered is in no record", path, error)
        return
    for line in lines:
        try:
            item = json_fields.mapping(json.loads(line), "", ("at", "session", "denied", "count"))
            session = json_fields.string(item["session"], "session")
            at, count = json_fields.number(item["at"], "at"), json_fields.integer(item["count"], "count")
            denied = json_fields.boolean(item["denied"], "denied")
        except (CodecError, ValueError, RecursionError) as error:
            log.error("%s: a line that cannot be read: %s", path, error)
            continue
        yield records.standby_answers(at, session, user_of(session), count, denied=denied)
