"""Who comes in: logins, as the PAM module and ``persona-shell`` ask for them, until their sessions are gated.

Everything here runs in the loop's thread.  A question to the broker comes back as a callback.
"""

import base64
import logging
import os
import secrets
import time
from collections.abc import Callable
from typing import Any

from persona.decisions import Denied, Subject
from persona.problems import PersonaError, Reason
from persona_guest.audit.logins import Logins
from persona_guest.broker.client import UNANSWERED, Admitted, BrokerClient
from persona_guest.broker.documents import Personas
from persona_guest.core.leases import LeaseBook
from persona_guest.core.messages import admission_line, printable
from persona_guest.core.pam_protocol import Caller, Verdict, reply
from persona_guest.gate.supervisor import Supervisor
from persona_guest.ipc.pam import Reply
from persona_guest.kernel import seccomp
from persona_guest.kernel.task import Task
from persona_guest.login.exemptions import Exemption, Recent, exemption
from persona_guest.login.sessions import Sessions
from persona_guest.lsm.landlock_fallback import Fallback
from persona_guest.lsm.layer import KernelLayer
from persona_guest.session.model import Session
from persona_guest.settings import Mode, Settings

log = logging.getLogger("persona.agent")

Refuse = Callable[[Denied], None]


class Admissions:
    """``greeting`` has the line for a login in a terminal; ``excluded_s`` for how long a uid should not come in."""

    def __init__(
        self,
        settings: Settings,
        supervisor: Supervisor,
        sessions: Sessions,
        kernel_layer: KernelLayer,
        fallback: Fallback,
        leases: LeaseBook,
        broker_client: BrokerClient,
        personas: Personas,
        note: Logins,
        greeting: Callable[[Session, int], str | None],
        excluded_s: Callable[[int], float],
    ) -> None:
        self._settings = settings
        self._supervisor = supervisor
        self._sessions = sessions
        self._kernel_layer = kernel_layer
        self._fallback = fallback
        self._leases = leases
        self._broker_client = broker_client
        self._personas = personas
        self._note = note
        self._greeting = greeting
        self._excluded_s = excluded_s
        self.began: Callable[[str], None] = lambda _session: None  # called with each session that the broker knows
        self._filter = seccomp.gate_filter()
        self._opening: dict[str, tuple[Session, Admitted | None]] = {}
        self._recent: Recent[Admitted] = Recent()
        self._unannounced: dict[str, Session] = {}

    # --- what the PAM module asks -----------------------------------------------------------------

    def account(self, caller: Caller, pid: int, reply_to: Reply) -> None:
        """May this user log in at all?"""
        if self._exempt(caller, "account"):
            reply_to(reply(Verdict.PASS))
            return
        session = self._session(caller, pid)

        def answered(result: Admitted | Denied) -> None:
            if isinstance(result, Admitted) and self._broker_client.streaming:
                self._recent.keep(pid, session.subject, result, self._leases.generation, time.monotonic())
            result = self._kept_out(session.uid) or result
            if isinstance(result, Admitted) or self._settings.mode is Mode.COMPLAIN:
                reply_to(reply(Verdict.PASS))
            else:
                self._note_admission(session, result)
                reply_to(reply(Verdict.DENY, self._line(caller, result)))

        self._admit(session, answered, opening=False)

    def open(self, caller: Caller, pid: int, reply_to: Reply) -> str | None:
        """A session opens: pass, refuse, or gate it."""
        if self._exempt(caller, "session"):
            reply_to(reply(Verdict.PASS))
            return None
        session = self._session(caller, pid)

        def refuse(denied: Denied) -> None:
            if self._goes_on(caller, denied):
                reply_to(reply(Verdict.PASS))
            else:
                reply_to(reply(Verdict.DENY, self._line(caller, denied)))

        if self._sessions.full(caller.uid):
            refuse(Denied(Reason.AGENT_OVERLOADED, help="too many sessions of this user are open"))
            return None
        self._open(session, refuse, lambda: self._gate(session, refuse, reply_to))
        return session.id

    def listener(self, session_id: str, fd: int, reply_to: Reply) -> None:
        """The filter is in place; answer for it from now on."""
        try:
            self._take(session_id, fd)
        except PersonaError as error:
            reply_to(reply(Verdict.DENY, f"persona: {error.message}"))
        else:
            reply_to(reply(Verdict.DONE))

    def present(self, pid: int, session_id: str, reply_to: Reply) -> None:
        """A session inside a session: it keeps the outer gate, if that is ours."""
        self.abandoned(session_id)
        if self._supervisor.find(pid) is not None or self._settings.mode is Mode.COMPLAIN:
            reply_to(reply(Verdict.DONE))
        else:
            reply_to(reply(Verdict.DENY, "persona: another seccomp listener is in the way of the gate"))

    def abandoned(self, session_id: str) -> None:
        """An opened session whose listener will not come."""
        opening = self._opening.pop(session_id, None)
        self._sessions.unbind(session_id)
        self._unannounced.pop(session_id, None)
        if opening is not None and opening[1] is not None:
            self._broker_client.closed(opening[0])

    # --- what persona-shell asks ------------------------------------------------------------------

    def open_from_shell(self, caller: Caller, pid: int, reply_to: Callable[[dict[str, Any]], None]) -> str:
        """``persona-shell`` wants a gate; the session's id, for the listener that may follow."""
        session = self._session(caller, pid)

        def refuse(denied: Denied) -> None:
            if self._goes_on(caller, denied):
                reply_to({"ok": True, "verdict": "pass", "greeting": None})
                return
            reply_to({"ok": False, "code": str(denied.reason), "message": self._line(caller, denied)})

        def gate() -> None:
            instructions = base64.b64encode(self._filter).decode()
            greeting, below = self._greeting(session, session.uid), self._fallback.directories
            answer = {"ok": True, "verdict": "install", "filter": instructions, "greeting": greeting}
            reply_to(answer | ({"landlock": list(below)} if below else {}))

        self._open(session, refuse, gate)
        return session.id

    def listener_from_shell(self, session_id: str, fd: int) -> None:
        """The listener of ``persona-shell``.  Raises ``PersonaError`` where it is not taken."""
        self._take(session_id, fd)

    def subject_of(self, session_id: str) -> Subject | None:
        """Whose session it is, with all their groups; ``None`` where none of that name opens or is open."""
        gated = self._supervisor.sessions.get(session_id)
        if gated is not None:
            return gated.session.subject
        opening = self._opening.get(session_id)
        return opening[0].subject if opening is not None else None

    def all_sessions(self) -> list[str]:
        """The ids of those that are open, and of those that open at this moment."""
        return [*self._supervisor.sessions, *self._opening]

    # --- from admission to the gate ----------------------------------------------------------------

    def _exempt(self, caller: Caller, where: str) -> Exemption | None:
        found = exemption(caller.uid, caller.groups, self._settings.gate)
        if found is Exemption.BREAK_GLASS and where == "session":
            log.critical("BREAK GLASS: %s logs in ungated by %s", printable(caller.user), caller.service)
            self._note("", caller.user, "break_glass")
            self._sessions.exempted(caller.uid)
        return found

    def _goes_on(self, caller: Caller, denied: Denied) -> bool:
        """Whether a login that cannot be gated goes on ungated: complain mode refuses nobody."""
        if self._settings.mode is not Mode.COMPLAIN:
            return False
        log.warning("complain mode, %s goes on ungated: %s: %s", printable(caller.user), denied.reason, denied.help)
        return True

    def _session(self, caller: Caller, pid: int) -> Session:
        return Session(
            id="s-" + secrets.token_hex(8),
            subject=Subject(caller.user, caller.groups, self._settings.vm.name),
            uid=caller.uid,
            service=caller.service,
            remote=caller.remote,
            shell=caller.shell,
            monitor=pid,
            audit=Task(pid).audit_session(),
            opened_at=time.time(),
            monitor_started=Task(pid).started(),
        )

    def _open(self, session: Session, refuse: Refuse, gate: Callable[[], None]) -> None:
        """Calls one of the two, at once if the broker has just admitted this user to this process.

        Otherwise asks it first, and calls neither if the opener has gone away meanwhile.
        """
        kept_out = self._kept_out(session.uid)
        if kept_out is not None:
            self._note_admission(session, kept_out)
            refuse(kept_out)
            return
        recent = self._recent.take(session.monitor, session.subject, self._leases.generation, time.monotonic())
        if recent is not None and self._broker_client.streaming:
            self._opening[session.id] = (session, recent)
            self._note_admission(session, recent)
            if self._bind(session, recent, refuse):
                gate()
                self._announce(session)
            return
        self._opening[session.id] = (session, None)

        def answered(result: Admitted | Denied) -> None:
            if session.id not in self._opening:
                if isinstance(result, Admitted):
                    self._broker_client.closed(session)
                return
            self._note_admission(session, result)
            if isinstance(result, Admitted):
                self._opening[session.id] = (session, result)
                if not self._bind(session, result, refuse):
                    return
                self.began(session.id)
            elif self._settings.mode is Mode.ENFORCE:
                self._opening.pop(session.id)
                refuse(result)
                return
            elif result.reason in UNANSWERED:
                self._unannounced[session.id] = session
            gate()

        self._admit(session, answered, opening=True)

    def _kept_out(self, uid: int) -> Denied | None:
        """Why no session of a user may open now, whatever the broker says."""
        seconds = self._excluded_s(uid)
        if seconds:
            help = f"your processes made the gate wait for them; logins are refused for {seconds:.0f} s more"
            return Denied(Reason.AGENT_OVERLOADED, help=help)
        return self._unguarded()

    def _unguarded(self) -> Denied | None:
        """Why no session may open on a machine whose operator demands what its kernel has not."""
        layer = self._kernel_layer.layer
        if self._fallback.missing:
            help = "guest.toml has gate.landlock_execute, and this kernel neither Landlock nor the kernel layer"
            return Denied(Reason.KERNEL_LAYER_MISSING, help=help)
        if layer.active or not self._settings.gate.require_kernel_layer or self._settings.mode is Mode.COMPLAIN:
            return None
        help = f"guest.toml demands the kernel layer, which is not active: {layer.why}"
        return Denied(Reason.KERNEL_LAYER_MISSING, help=help)

    def _admit(self, session: Session, done: Callable[[Admitted | Denied], None], *, opening: bool) -> None:
        """The broker's word, once the document that it is about is here; without that, a refusal."""

        def answered(result: Admitted | Denied) -> None:
            if isinstance(result, Admitted) and result.persona is not None:
                self._personas.ensure(result.persona, lambda denied: backed(result, denied))
            else:
                done(result)

        def backed(admitted: Admitted, denied: Denied | None) -> None:
            if denied is not None and opening:
                self._broker_client.closed(session)
            done(denied or admitted)

        self._broker_client.admit(session, answered, opening=opening)

    def _bind(self, session: Session, admitted: Admitted, refuse: Refuse) -> bool:
        try:
            self._sessions.bind(session, admitted)
        except (PersonaError, OSError) as error:
            log.error("session %s: its network cannot be bound: %s", session.id, error)
            self.abandoned(session.id)
            refuse(Denied(Reason.ENFORCEMENT_FAILED, admitted.policy, help="the network rules cannot be put in place"))
            return False
        return True

    def _gate(self, session: Session, refuse: Refuse, reply_to: Reply) -> None:
        """What the module puts on the session: the filter, and Landlock's rules in the fallback."""
        try:
            ruleset = self._fallback.ruleset()
        except OSError as error:
            log.error("session %s: it cannot be bound: %s", session.id, error)
            self.abandoned(session.id)
            refuse(Denied(Reason.ENFORCEMENT_FAILED, help=f"guest.toml, gate.landlock_execute: {error.strerror}"))
            return
        try:
            reply_to(reply(Verdict.GATE, instructions=self._filter), ruleset)
        finally:
            if ruleset is not None:
                os.close(ruleset)

    def _take(self, session_id: str, fd: int) -> None:
        """Begins a session that was admitted.  Raises ``PersonaError`` and closes ``fd`` otherwise."""
        session, admitted = self._opening.pop(session_id, (None, None))
        if session is None or (admitted is None and self._settings.mode is Mode.ENFORCE):
            os.close(fd)
            raise PersonaError(Reason.SESSION_UNKNOWN, "this session was not admitted")
        try:
            self._sessions.begin(session, fd)
        except PersonaError:
            self._sessions.unbind(session_id)
            self._unannounced.pop(session_id, None)
            self._broker_client.closed(session)
            raise

    # --- what the broker is told ------------------------------------------------------------------

    def _announce(self, session: Session) -> None:
        """Tells the broker that a session exists; ``announce_again`` repeats what did not arrive."""
        self._unannounced[session.id] = session

        def answered(result: Admitted | Denied) -> None:
            if isinstance(result, Denied) and result.reason in UNANSWERED:
                return
            self._unannounced.pop(session.id, None)
            self.began(session.id)
            if session.id not in self._opening and session.id not in self._supervisor.sessions:
                self._broker_client.closed(session)

        self._broker_client.admit(session, answered, opening=True)

    def announce_again(self) -> None:
        """Call every few seconds."""
        for session in list(self._unannounced.values()):
            self._announce(session)

    def ended(self, session: Session) -> None:
        """It need not be announced any more."""
        self._unannounced.pop(session.id, None)

    def _note_admission(self, session: Session, result: Admitted | Denied) -> None:
        denied = result if isinstance(result, Denied) else None
        self._note(session.id, session.subject.user, "admission", denied)
        if denied is not None and self._settings.mode is Mode.ENFORCE:
            command = f"a login by {session.service}"
            self._supervisor.denials.note(session.uid, time.time(), "admission", "", command, denied, session.id)

    def _line(self, caller: Caller, denied: Denied) -> str:
        return admission_line(caller.user, self._settings.vm.name, denied)
