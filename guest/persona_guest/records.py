"""What goes into the record beside program starts: logins, and what the kernel stopped by itself."""

import time

from persona.codec import Record
from persona.decisions import Denied
from persona.problems import Reason
from persona_guest.kernel.layer_abi import Event


def of_login(session: str, user: str, event: str, denied: Denied | None, *, complain: bool) -> Record:
    """``event`` is admission, break_glass or session_end."""
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


def of_stop(event: Event, session: str, user: str) -> Record:
    """An exec that the kernel layer stopped, killed, or would have stopped; ``session`` may be empty."""
    return Record(
        at=time.time(),
        session=session,
        user=user,
        program=event.path,
        argv=(event.path,),
        decision="denied",
        reason=event.reason,
        persona=None,
        persona_version=None,
        policy=None,
        event="killed" if event.reason is Reason.OTHER_ARGUMENTS else "stopped",
        leased=False,
        complain=not event.enforced,
    )
