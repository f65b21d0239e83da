"""What the gate decided, on its way to the record: noted at once, put into words when no exec waits for it."""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

from persona.decisions import Decision, Denied
from persona.problems import Reason
from persona.record_codec import Record
from persona.shown import words
from persona_guest.audit import records
from persona_guest.core.denials import COMMAND_MAX, Book
from persona_guest.core.masks import READ_MAX, Masks
from persona_guest.gate.pending import Pending
from persona_guest.loop import Loop
from persona_guest.session.model import Session

_WAIT_S = 0.01
_ARGUMENTS_MAX, _ARGUMENT_MAX = 16, 256  # of a record


class _Note(NamedTuple):
    at: float
    pending: Pending
    event: str
    decision: Decision | None
    ran: str | None
    argv: tuple[bytes, ...] | None


class Notes:
    """``add`` costs an exec next to nothing; ``flush`` runs by itself a moment later.

    What was denied, and not only would have been, is noted in ``denials`` for its user as well.
    """

    def __init__(
        self, loop: Loop, record: Callable[[Record], None], denials: Book, masks: Masks, *, complain: bool
    ) -> None:
        self._loop = loop
        self._masks = masks
        self._record = record
        self._denials = denials
        self._complain = complain
        self._waiting: list[_Note] = []

    def add(
        self,
        pending: Pending,
        event: str,
        decision: Decision | None,
        *,
        ran: str | None = None,
        argv: tuple[bytes, ...] | None = None,
    ) -> None:
        """Notes one exec and its decision, ``None`` for what a session starts by itself.

        ``ran`` and ``argv`` are what started, where that was something else than what was to be started.
        """
        if not self._waiting:
            self._loop.call_later(_WAIT_S, self.flush)
        self._waiting.append(_Note(time.time(), pending, event, decision, ran, argv))

    def add_unjudged(self, session: Session, why: str) -> None:
        """Notes one exec that could not be read, and was denied for it or, in complain mode, let go on."""
        denied = Denied(Reason.PROGRAM_UNREADABLE, help=why)
        record = records.unjudged_start(
            time.time(), session.id, session.subject.user, denied.reason, complain=self._complain
        )
        self._record(record)
        if not self._complain:
            self._denials.note(session.uid, record.at, record.event, record.program, "", denied, session.id)

    def flush(self) -> None:
        """Records what was noted; call it before the agent ends."""
        waiting, self._waiting = self._waiting, []
        for note in waiting:
            record = _to_record(note, self._masks, complain=self._complain)
            self._record(record)
            if isinstance(note.decision, Denied) and not self._complain and not note.pending.again:
                uid = note.pending.login.session.uid
                command = words(record.argv, COMMAND_MAX)
                self._denials.note(uid, note.at, note.event, record.program, command, note.decision, record.session)


def _to_record(note: _Note, masks: Masks, *, complain: bool) -> Record:
    pending = note.pending
    session = pending.login.session
    argv = pending.exec_request.command if note.argv is None else note.argv
    program = note.ran or pending.exec_request.program
    shown = masks.argv(program, [os.fsdecode(argument[:READ_MAX]) for argument in argv[:_ARGUMENTS_MAX]], _ARGUMENT_MAX)
    return records.program_start(
        at=note.at,
        session_id=session.id,
        user=session.subject.user,
        event=note.event,
        program=program,
        argv=shown,
        decision=note.decision,
        leased=pending.leased,
        complain=complain,
    )
