"""What goes into the record beside program starts: logins, and what the kernel stopped by itself."""

import dataclasses
import time
from collections.abc import Callable

from persona.codec import Record
from persona.decisions import Denied
from persona.problems import Reason
from persona_guest.accounts import Names
from persona_guest.broker_client.recorder import Recordable
from persona_guest.gate.supervisor import Supervisor
from persona_guest.kernel.layer_abi import Event

Add = Callable[[Recordable], None]


class Logins:
    """Records who was let in, who was not, and when it was over."""

    def __init__(self, record: Add, *, complain: bool) -> None:
        self._record = record
        self._complain = complain

    def __call__(self, session: str, user: str, event: str, denied: Denied | None = None) -> None:
        """``event`` is admission, break_glass or session_end."""
        self._record(_of_login(session, user, event, denied, complain=self._complain))


class Stops:
    """Records what the kernel stopped, killed or would have stopped: execs that nobody had approved."""

    def __init__(self, record: Add, supervisor: Supervisor) -> None:
        self._record = record
        self._supervisor = supervisor
        self._names = Names()  # for the recorder's thread

    def __call__(self, event: Event) -> None:
        """Under the session that it happened in; outside of any, under its user's name."""
        sessions = self._supervisor.sessions.values()
        gated = next((one for one in sessions if one.session.audit == event.audit_session), None)
        if gated is None or event.audit_session is None:
            gated = self._supervisor.find(event.tgid)
        if gated is not None:
            self._record(_of_stop(event, gated.session.id, gated.session.subject.user))
        else:
            record, uid = _of_stop(event, "", ""), event.uid if event.login is None else event.login
            self._record(lambda: dataclasses.replace(record, user=self._names.of(uid)))


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


def _of_stop(event: Event, session: str, user: str) -> Record:
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
