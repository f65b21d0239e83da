"""Records logins: who was let in, who was not, and when it was over."""

import logging
import time
from collections.abc import Callable

from persona.decisions import Denied
from persona_guest.audit import records
from persona_guest.audit.upload import Recordable
from persona_guest.session.model import Login, State

log = logging.getLogger("persona.agent")
Add = Callable[[Recordable], None]


class Logins:
    """Called for each admission and each login of the break-glass group; ``ended`` for each end of a session."""

    def __init__(self, record: Add, *, complain: bool) -> None:
        self._record = record
        self._complain = complain

    def __call__(self, session_id: str, user: str, event: str, denied: Denied | None = None) -> None:
        """``event`` is admission, break_glass or session_end."""
        self._record(records.login(time.time(), session_id, user, event, denied, complain=self._complain))

    def ended(self, login: Login) -> None:
        """Records that the last process of a session is gone; nothing where the session did not come to be gated."""
        if login.state is State.GATED:
            self(login.session.id, login.session.subject.user, "session_end")
            log.info("session %s ended", login.session.id)
