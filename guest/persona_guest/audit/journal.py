"""Decisions as structured journal entries, so many a second of each session and no more.

journald drops what comes too fast, whoever it is of: without a bound of our own, somebody's loop of
refused commands would hide what others do.  What is left out is counted and the count is written; the
broker's record has everything.
"""

import time
from collections.abc import Callable

from persona.record_codec import Record
from persona.shown import word, words

PER_SECOND = 20
_SESSIONS_MAX = 4096
_COMMAND_MAX = 300  # characters of a command line

Write = Callable[[str, dict[str, str]], None]


class Journal:
    """``write`` takes a message and its fields; ``clock`` is monotonic seconds."""

    def __init__(self, write: Write, clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._second = 0
        self._written: dict[str, int] = {}  # by session, in this second

    def add(self, record: Record) -> None:
        """Writes what an operator would want to read: everything but grants of commands."""
        if record.event == "exec" and record.decision == "granted":
            return  # the broker's record has every grant; the journal would be nothing else
        second = int(self._clock())
        if second != self._second or len(self._written) > _SESSIONS_MAX:
            self.flush()
            self._second = second
        count = self._written[record.session] = self._written.get(record.session, 0) + 1
        if count <= PER_SECOND or record.event != "exec":
            self._write(*_entry(record))

    def flush(self) -> None:
        """Says what was left out; by itself when the next second begins, and to be called at the end."""
        written, self._written = self._written, {}
        for session_id, count in written.items():
            if count > PER_SECOND:
                text = f"{count - PER_SECOND} more of session {session_id} in a second: the broker's record has them"
                self._write(text, {"PERSONA_EVENT": "left_out", "PERSONA_SESSION": session_id})


def _entry(record: Record) -> tuple[str, dict[str, str]]:
    command = words(record.argv, _COMMAND_MAX)
    text = f"{record.event}: {word(record.user)}: {record.decision}"
    if record.reason:
        text += f", {record.reason}"
    for part in (word(record.program) if record.program else "", command):  # which file; its caller's text after it
        text += f": {part}" if part else ""
    fields = {
        "PERSONA_EVENT": record.event,
        "PERSONA_SESSION": record.session,
        "PERSONA_USER": word(record.user),
        "PERSONA_PROGRAM": word(record.program) if record.program else "",
        "PERSONA_COMMAND": command,
        "PERSONA_DECISION": record.decision,
        "PERSONA_REASON": str(record.reason or ""),
        "PERSONA_NAME": record.persona or "",
        "PERSONA_POLICY": record.policy or "",
        "PERSONA_COMPLAIN": str(int(record.complain)),
    }
    return text, fields
