"""Logins, as the PAM module and ``persona-shell`` ask for them, from the first word until their sessions are gated.

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
from persona.problems import Fault, PersonaError, Reason
from persona_guest.broker.client import BrokerClient
from persona_guest.core.leases import LeaseBook
from persona_guest.core.messages import printable
from persona_guest.core.pam_protocol import Caller, PamVerdict, reply
from persona_guest.core.unanswered import UNANSWERED
from persona_guest.enforce.network.user_rules import NoUserRules, UserRules
from persona_guest.gate.supervisor import Supervisor
from persona_guest.ipc.pam import Reply
from persona_guest.ipc.standby import Keeping
from persona_guest.kernel import seccomp
from persona_guest.kernel.task import Task
from persona_guest.login.admission import Admission
from persona_guest.login.exemptions import Recent
from persona_guest.lsm.landlock_fallback import Fallback
from persona_guest.session.model import Admitted, Login, Session, State
from persona_guest.session.registry import Registry
from persona_guest.settings import Mode, Settings

log = logging.getLogger("persona.agent")

Refuse = Callable[[Denied], None]

_TOO_MANY = "too many sessions of this user are open"


class Openings:
    """``greeting`` has the line for a login in a terminal; ``began`` is told of each session that the broker knows."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        supervisor: Supervisor,
        keeping: Keeping,
        admission: Admission,
        user_rules: UserRules | NoUserRules,
        fallback: Fallback,
        leases: LeaseBook,
        broker_client: BrokerClient,
        greeting: Callable[[Session, int], str | None],
        began: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._supervisor = supervisor
        self._keeping = keeping
        self._admission = admission
        self._user_rules = user_rules
        self._fallback = fallback
        self._leases = leases
        self._broker_client = broker_client
        self._greeting = greeting
        self._began = began
        self._filter = seccomp.gate_filter()
        self._recent: Recent[Admitted] = Recent()

    # --- what the PAM module asks -----------------------------------------------------------------

    def account(self, caller: Caller, pid: int, reply_to: Reply) -> None:
        """Answers PAM's account stage: whether this user may log in at all."""
        if self._admission.exempt(caller, opens=False):
            reply_to(reply(PamVerdict.PASS))
            return
        session = self._session(caller, pid)

        def answered(result: Admitted | Denied) -> None:
            if isinstance(result, Admitted) and self._broker_client.streaming:
                self._recent.keep(pid, session.subject, result, self._leases.generation, time.monotonic())
            result = self._admission.kept_out(session.uid) or result
            if isinstance(result, Admitted) or self._settings.mode is Mode.COMPLAIN:
                reply_to(reply(PamVerdict.PASS))
            else:
                self._admission.record(session, result)
                reply_to(reply(PamVerdict.DENY, self._admission.line(caller, result)))

        self._admission.ask(session, answered, opening=False)

    def open(self, caller: Caller, pid: int, reply_to: Reply) -> str | None:
        """Answers PAM's session stage: pass, refuse, or gate; returns the session's id where a listener may follow."""
        if self._admission.exempt(caller, opens=True):
            reply_to(reply(PamVerdict.PASS))
            return None
        session = self._session(caller, pid)

        def refuse(denied: Denied) -> None:
            if self._goes_on(caller, denied):
                reply_to(reply(PamVerdict.PASS))
            else:
                reply_to(reply(PamVerdict.DENY, self._admission.line(caller, denied)))

        if self._registry.is_full(caller.uid):
            refuse(Denied(Reason.AGENT_OVERLOADED, help=_TOO_MANY))
            return None
        self._open(session, refuse, lambda login: self._gate(login, refuse, reply_to))
        return session.id

    def listener(self, session_id: str, fd: int, reply_to: Reply) -> None:
        """Takes over the listener of a session whose filter is in place, and answers for it from now on."""
        try:
            self._take(session_id, fd)
        except PersonaError as error:
            reply_to(reply(PamVerdict.DENY, f"persona: {error.message}"))
        else:
            reply_to(reply(PamVerdict.DONE))

    def present(self, pid: int, session_id: str, reply_to: Reply) -> None:
        """Answers for a session inside a session: it keeps the outer gate, if that is ours."""
        self.abandoned(session_id)
        if self._registry.find(pid) is not None or self._settings.mode is Mode.COMPLAIN:
            reply_to(reply(PamVerdict.DONE))
        else:
            reply_to(reply(PamVerdict.DENY, "persona: another seccomp listener is in the way of the gate"))

    def abandoned(self, session_id: str) -> None:
        """Ends a session that was opened and whose listener will not come; does nothing where it came."""
        login = self._registry.get(session_id)
        if login is not None and login.state is not State.GATED:
            self._registry.end(login)

    # --- what persona-shell asks ------------------------------------------------------------------

    def exempt(self, caller: Caller) -> bool:
        """Whether this user is not gated at all; a login by break-glass is recorded."""
        return self._admission.exempt(caller, opens=True)

    def open_from_shell(self, caller: Caller, pid: int, reply_to: Callable[[dict[str, Any]], None]) -> str:
        """Opens a session for ``persona-shell``; returns its id, for the listener that may follow."""
        session = self._session(caller, pid)

        def refuse(denied: Denied) -> None:
            if self._goes_on(caller, denied):
                reply_to({"ok": True, "verdict": "pass", "greeting": None})
                return
            reply_to({"ok": False, "code": str(denied.reason), "message": self._admission.line(caller, denied)})

        if self._registry.is_full(caller.uid):
            refuse(Denied(Reason.AGENT_OVERLOADED, help=_TOO_MANY))
            return session.id

        def gate(_login: Login) -> None:
            instructions = base64.b64encode(self._filter).decode()
            greeting, below = self._greeting(session, session.uid), self._fallback.directories
            answer = {"ok": True, "verdict": "install", "filter": instructions, "greeting": greeting}
            reply_to(answer | ({"landlock": list(below)} if below else {}))

        self._open(session, refuse, gate)
        return session.id

    def listener_from_shell(self, session_id: str, fd: int) -> None:
        """Takes over the listener of ``persona-shell``.  Raises ``PersonaError`` where it is not taken."""
        self._take(session_id, fd)

    # --- from admission to the gate ----------------------------------------------------------------

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

    def _open(self, session: Session, refuse: Refuse, gate: Callable[[Login], None]) -> None:
        """Calls one of the two, at once if the broker has just admitted this user to this process.

        Otherwise asks it first, and calls neither if the opener has gone away meanwhile.
        """
        kept_out = self._admission.kept_out(session.uid)
        if kept_out is not None:
            self._admission.record(session, kept_out)
            refuse(kept_out)
            return
        login = self._registry.open(session)
        recent = self._recent.take(session.monitor, session.subject, self._leases.generation, time.monotonic())
        if recent is not None and self._broker_client.streaming:
            self._admission.record(session, recent)
            if self._admitted(login, recent, refuse):
                gate(login)
                if login.state is not State.ENDED:
                    self._announce(login)
            return

        def answered(result: Admitted | Denied) -> None:
            if login.state is State.ENDED:
                if isinstance(result, Admitted):
                    self._broker_client.closed(session)
                return
            self._admission.record(session, result)
            if isinstance(result, Admitted):
                if not self._admitted(login, result, refuse):
                    return
                self._began(session.id)
            elif self._settings.mode is Mode.ENFORCE:
                self._registry.end(login)
                refuse(result)
                return
            else:
                login.state = State.ADMITTED
                login.announced = result.reason not in UNANSWERED
            gate(login)

        self._admission.ask(session, answered, opening=True)

    def _admitted(self, login: Login, admitted: Admitted, refuse: Refuse) -> bool:
        """Binds its network before its first process: a login that starts nothing still has sshd's forwards."""
        login.admitted = admitted
        try:
            self._user_rules.opened(login.session, admitted.persona)
        except (PersonaError, OSError) as error:
            log.error("session %s: its network cannot be bound: %s", login.session.id, error)
            self._registry.end(login)
            refuse(Denied(Reason.ENFORCEMENT_FAILED, admitted.policy, help="the network rules cannot be put in place"))
            return False
        login.state = State.ADMITTED
        return True

    def _gate(self, login: Login, refuse: Refuse, reply_to: Reply) -> None:
        """What the module puts on the session: the filter, and Landlock's rules in the fallback."""
        try:
            ruleset = self._fallback.ruleset()
        except OSError as error:
            log.error("session %s: it cannot be bound: %s", login.session.id, error)
            self._registry.end(login)
            refuse(Denied(Reason.ENFORCEMENT_FAILED, help=f"guest.toml, gate.landlock_execute: {error.strerror}"))
            return
        try:
            reply_to(reply(PamVerdict.GATE, instructions=self._filter), ruleset)
        finally:
            if ruleset is not None:
                os.close(ruleset)

    def _take(self, session_id: str, fd: int) -> None:
        """Begins a session that was admitted.  Raises ``PersonaError`` and closes ``fd`` otherwise."""
        login = self._registry.get(session_id)
        if login is None or login.state is not State.ADMITTED:
            os.close(fd)
            self.abandoned(session_id)  # it will not come a second time
            raise PersonaError(Reason.SESSION_UNKNOWN, "this session was not admitted")
        try:
            self._begin(login, fd)
        except PersonaError:
            os.close(fd)
            self._registry.end(login)
            raise

    def _begin(self, login: Login, fd: int) -> None:
        """The filter is in place: answers for it from now on.  Raises ``PersonaError``."""
        if not seccomp.is_listener(fd):
            raise PersonaError(Fault.BAD_REQUEST, "the descriptor is not a seccomp listener")
        if self._registry.is_full(login.session.uid):
            raise PersonaError(Reason.AGENT_OVERLOADED, _TOO_MANY)
        login.listener = fd
        try:
            self._save(login)
            self._supervisor.answer_for(login, fresh=True)
        except OSError as error:  # a listener that stayed open here would hang every exec of the session
            raise PersonaError(Reason.ENFORCEMENT_FAILED, f"this session cannot be kept: {error}") from error
        self._registry.gate(login)
        self._keeping.keep(login.session.id, fd)

    def _save(self, login: Login) -> None:
        """Raises ``OSError``, but not in complain mode, which stops nobody for want of space."""
        if self._settings.mode is Mode.ENFORCE:
            self._registry.save(login)
        else:
            self._registry.try_to_save(login)

    # --- what the broker is told ------------------------------------------------------------------

    def _announce(self, login: Login) -> None:
        """Tells the broker that a session exists; ``announce_again`` repeats what did not arrive."""
        login.announced = False

        def answered(result: Admitted | Denied) -> None:
            if isinstance(result, Denied) and result.reason in UNANSWERED:
                return
            login.announced = True
            self._began(login.session.id)
            if login.state is State.ENDED:
                self._broker_client.closed(login.session)

        self._broker_client.admit(login.session, answered, opening=True)

    def announce_again(self) -> None:
        """Tells the broker once more of sessions that it has not confirmed.  Call it every few seconds."""
        for login in self._registry.unannounced():
            self._announce(login)
