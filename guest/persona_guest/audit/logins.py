"""Logins, as they go into the record."""

import time
from collections.abc import Callable

from persona.codec import Record
from persona.decisions import Denied
from persona_guest.audit.upload import Recordable

Add = Callable[[Recordable], None]


class Logins:
    """Records who was let in, who was not, and when it was over."""

    def __init__(self, record: Add, *, complain: bool) -> None:
        self._record = record
        self._complain = complain

    def __call__(self, session: str, user: str, event: str, denied: Denied | None = None) -> None:
        """``event`` is admission, break_glass or session_end."""
        self._record(_of_login(session, user, event, denied, complain=self._complain))


def _of_login(session: str, user: str, event: str, denied: Denied | None, *, complain: bool) -> Record:
    return Record(
        at=time.time(),
        session=session,
        user=user,
        program="",
        argv=(),
        decision="denied" if denied else "granted",
        reason=denied.reason if denied else None,
        persona=None,
        persona_version=None,
        policy=denied.policy if denied else None,
        event=event,
        leased=False,
        complain=complain,
    )
