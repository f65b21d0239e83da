"""What the gate decided, on its way to the record: noted at once, put into words when no exec waits for it."""

import os
import time
from collections.abc import Callable

from persona.codec import Record
from persona.decisions import Decision, Denied, Granted
from persona_guest.gate.pending import Pending
from persona_guest.loop import Loop

_WAIT_S = 0.01


class Notes:
    """``add`` costs an exec next to nothing; ``flush`` runs by itself a moment later."""

    def __init__(self, loop: Loop, record: Callable[[Record], None], *, complain: bool) -> None:
        self._loop = loop
        self._record = record
        self._complain = complain
        self._waiting: list[tuple[float, Pending, str, Decision | None]] = []

    def add(self, pending: Pending, event: str, decision: Decision | None) -> None:
        """One exec and what became of it; ``None`` = what a session starts by itself."""
        if not self._waiting:
            self._loop.call_later(_WAIT_S, self.flush)
        self._waiting.append((time.time(), pending, event, decision))

    def flush(self) -> None:
        """Hands on what waits; call before the agent ends."""
        waiting, self._waiting = self._waiting, []
        for note in waiting:
            self._record(self._to_record(*note))

    def _to_record(self, at: float, pending: Pending, event: str, decision: Decision | None) -> Record:
        session = pending.gated.session
        granted = decision if isinstance(decision, Granted) else None
        denied = decision if isinstance(decision, Denied) else None
        return Record(
            at=at,
            session=session.id,
            user=session.subject.user,
            program=pending.attempt.stages[0][0].program.path,
            argv=tuple(os.fsdecode(argument[:256]) for argument in pending.attempt.argv[:16]),
            decision="denied" if denied else "granted",
            reason=denied.reason if denied else None,
            persona=granted.persona.name if granted else denied.persona if denied else None,
            persona_version=granted.persona.version if granted else None,
            policy=decision.policy if decision else None,
            event=event,
            leased=pending.leased,
            complain=self._complain,
        )
