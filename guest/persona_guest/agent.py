"""The agent itself: what the PAM module and the users ask of it, put together from the parts.

Everything here runs in the loop's thread.  A question to the broker comes back as a callback.
"""

import base64
import dataclasses
import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from persona.decisions import Denied, PersonaRef, Subject
from persona.problems import Fault, PersonaError, Reason
from persona_guest.accounts import Names
from persona_guest.bases import Bases
from persona_guest.broker_client.events import Changed, Connected, Event, Lost
from persona_guest.broker_client.recorder import Recordable
from persona_guest.core.admission import Exemption, Recent, exemption
from persona_guest.core.leases import LeaseBook
from persona_guest.core.messages import admission_line, printable
from persona_guest.core.pam_wire import Caller, Verdict, reply
from persona_guest.core.sessions import Session, from_json, to_json
from persona_guest.gate.fallback import Fallback
from persona_guest.gate.kernel_layer import LastWord
from persona_guest.gate.supervisor import Supervisor
from persona_guest.ipc.pam_socket import Reply
from persona_guest.ipc.standby_socket import Keeping
from persona_guest.kernel import layer_abi, seccomp
from persona_guest.kernel.task import Task
from persona_guest.personas import Personas
from persona_guest.questions import UNANSWERED, Admitted, Questions
from persona_guest.records import of_login, of_stop
from persona_guest.settings import Mode, Settings

log = logging.getLogger("persona.agent")

_SESSIONS_PER_USER = 500  # each holds a descriptor here and in systemd's store


class Agent:
    """Sessions from their first packet to their last exec."""

    def __init__(
        self,
        settings: Settings,
        supervisor: Supervisor,
        last_word: LastWord,
        leases: LeaseBook,
        questions: Questions,
        keeping: Keeping,
        record: Callable[[Recordable], None],
        personas: Personas,
    ) -> None:
        self.settings = settings
        self.supervisor = supervisor
        self.last_word = last_word
        self._fallback = Fallback(settings, last_word)
        self.leases = leases
        self.questions = questions
        self.connection = "connecting"
        self.keeping = keeping
        self._record = record
        self._names = Names()  # for the recorder's thread
        self._personas = personas
        self.began: Callable[[str], None] = lambda _session: None  # called with each session that the broker knows
        self._filter = seccomp.gate_filter()
        self._opening: dict[str, tuple[Session, Admitted | None]] = {}
        self.base: dict[str, Admitted] = {}
        self.bases: Bases | None = None  # only where personas bind
        self._recent: Recent[Admitted] = Recent()
        self._unannounced: dict[str, Session] = {}
        self._directory = Path(settings.paths.runtime_dir) / "sessions"
        self._directory.mkdir(mode=0o700, exist_ok=True)

    # --- the broker's push ------------------------------------------------------------------------

    def event(self, event: Event) -> None:
        """The event stream came, went or said something."""
        if isinstance(event, Connected):
            self.questions.streaming = True
            self.connection = "connected"
            log.info("the broker's event stream is up")
        elif isinstance(event, Lost):
            if self.questions.streaming:
                log.warning("the broker's event stream is lost: %s; leases run out", event.detail)
            self.questions.streaming = False
            self.connection = "unreachable"
        elif isinstance(event, Changed):
            self.leases.advance(event.generation)

    # --- the PAM module ---------------------------------------------------------------------------

    def account(self, caller: Caller, pid: int, reply_to: Reply) -> None:
        """May this user log in at all?"""
        if self._exempt(caller, "account"):
            reply_to(reply(Verdict.PASS))
            return
        session = self._session(caller, pid)

        def answered(result: Admitted | Denied) -> None:
            if isinstance(result, Admitted) and self.questions.streaming:
                self._recent.keep(pid, session.subject, result, self.leases.generation, time.monotonic())
            result = self._unguarded() or result
            if isinstance(result, Admitted) or self.settings.mode is Mode.COMPLAIN:
                reply_to(reply(Verdict.PASS))
            else:
                self._note_admission(session, result)
                reply_to(reply(Verdict.DENY, admission_line(caller.user, self.settings.vm.name, result)))

        self._admit(session, answered, opening=False)

    def open(self, caller: Caller, pid: int, reply_to: Reply) -> str | None:
        """A session opens: pass, refuse, or gate it."""
        if self._exempt(caller, "session"):
            reply_to(reply(Verdict.PASS))
            return None
        session = self._session(caller, pid)

        def refuse(denied: Denied) -> None:
            reply_to(reply(Verdict.DENY, admission_line(caller.user, self.settings.vm.name, denied)))

        if self._count(caller.uid) >= _SESSIONS_PER_USER:
            if self.settings.mode is Mode.COMPLAIN:
                reply_to(reply(Verdict.PASS))  # it stops nothing
            else:
                refuse(Denied(Reason.AGENT_OVERLOADED, help="too many sessions of this user are open"))
            return None
        self._open(session, refuse, lambda: self._gate(session, refuse, reply_to))
        return session.id

    def _gate(self, session: Session, refuse: Callable[[Denied], None], reply_to: Reply) -> None:
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

    def _open(self, session: Session, refuse: Callable[[Denied], None], gate: Callable[[], None]) -> None:
        """Calls one of the two, at once if the broker has just admitted this user to this process.

        Otherwise asks it first, and calls neither if the opener has gone away meanwhile.
        """
        unguarded = self._unguarded()
        if unguarded is not None:
            self._note_admission(session, unguarded)
            refuse(unguarded)
            return
        recent = self._recent.take(session.monitor, session.subject, self.leases.generation, time.monotonic())
        if recent is not None and self.questions.streaming:
            self._opening[session.id] = (session, recent)
            self.base[session.id] = recent
            self._note_admission(session, recent)
            if self._bind(session, recent, refuse):
                gate()
                self._announce(session)
            return
        self._opening[session.id] = (session, None)

        def answered(result: Admitted | Denied) -> None:
            if session.id not in self._opening:
                if isinstance(result, Admitted):
                    self.questions.closed(session)
                return
            self._note_admission(session, result)
            if isinstance(result, Admitted):
                self._opening[session.id] = (session, result)
                self.base[session.id] = result
                if not self._bind(session, result, refuse):
                    return
                self.began(session.id)
            elif self.settings.mode is Mode.ENFORCE:
                self._opening.pop(session.id)
                refuse(result)
                return
            elif result.reason in UNANSWERED:
                self._unannounced[session.id] = session
            gate()

        self._admit(session, answered, opening=True)

    def _bind(self, session: Session, admitted: Admitted, refuse: Callable[[Denied], None]) -> bool:
        """Before its first process: a login that starts nothing still has sshd's forwards."""
        try:
            if self.bases is not None:
                self.bases.opened(session, admitted.persona)
        except (PersonaError, OSError) as error:
            log.error("session %s: its network cannot be bound: %s", session.id, error)
            self.abandoned(session.id)
            refuse(Denied(Reason.ENFORCEMENT_FAILED, admitted.policy, help="the network rules cannot be put in place"))
            return False
        return True

    def _admit(self, session: Session, done: Callable[[Admitted | Denied], None], *, opening: bool) -> None:
        """The broker's word, once the document that it is about is here; without that, a refusal."""

        def answered(result: Admitted | Denied) -> None:
            if isinstance(result, Admitted) and result.persona is not None:
                self._personas.ensure(result.persona, lambda denied: backed(result, denied))
            else:
                done(result)

        def backed(admitted: Admitted, denied: Denied | None) -> None:
            if denied is not None and opening:
                self.questions.closed(session)
            done(denied or admitted)

        self.questions.admit(session, answered, opening=opening)

    def _unguarded(self) -> Denied | None:
        """Why no session may open on a machine whose operator demands what its kernel has not."""
        layer = self.last_word.layer
        if self._fallback.missing:
            help = "guest.toml has gate.landlock_execute, and this kernel neither Landlock nor the kernel layer"
            return Denied(Reason.KERNEL_LAYER_MISSING, help=help)
        if layer.active or not self.settings.gate.require_kernel_layer or self.settings.mode is Mode.COMPLAIN:
            return None
        help = f"guest.toml demands the kernel layer, which is not active: {layer.why}"
        return Denied(Reason.KERNEL_LAYER_MISSING, help=help)

    def _announce(self, session: Session) -> None:
        """Tells the broker that a session exists; ``announce_again`` repeats what did not arrive."""
        self._unannounced[session.id] = session

        def answered(result: Admitted | Denied) -> None:
            if isinstance(result, Denied) and result.reason in UNANSWERED:
                return
            self._unannounced.pop(session.id, None)
            self.began(session.id)
            if session.id not in self._opening and session.id not in self.supervisor.sessions:
                self.questions.closed(session)

        self.questions.admit(session, answered, opening=True)

    def announce_again(self) -> None:
        """Call every few seconds."""
        for session in list(self._unannounced.values()):
            self._announce(session)

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
        if self.supervisor.find(pid) is not None or self.settings.mode is Mode.COMPLAIN:
            reply_to(reply(Verdict.DONE))
        else:
            reply_to(reply(Verdict.DENY, "persona: another seccomp listener is in the way of the gate"))

    def abandoned(self, session_id: str) -> None:
        """An opened session whose listener will not come."""
        opening = self._opening.pop(session_id, None)
        self._unbase(session_id)
        self._unannounced.pop(session_id, None)
        if opening is not None and opening[1] is not None:
            self.questions.closed(opening[0])

    def _session(self, caller: Caller, pid: int) -> Session:
        return Session(
            id="s-" + secrets.token_hex(8),
            subject=Subject(caller.user, caller.groups, self.settings.vm.name),
            uid=caller.uid,
            service=caller.service,
            remote=caller.remote,
            shell=caller.shell,
            monitor=pid,
            audit=Task(pid).audit_session(),
            opened_at=time.time(),
            monitor_started=Task(pid).started(),
        )

    def _exempt(self, caller: Caller, where: str) -> Exemption | None:
        found = exemption(caller.uid, caller.groups, self.settings.gate)
        if found is Exemption.BREAK_GLASS and where == "session":
            log.critical("BREAK GLASS: %s logs in ungated by %s", printable(caller.user), caller.service)
            self._log("", caller.user, "break_glass")
            if self.bases is not None:
                self.bases.exempted(caller.uid)
        return found

    # --- sessions ---------------------------------------------------------------------------------

    def _take(self, session_id: str, fd: int) -> None:
        """Begins a session that was admitted.  Raises ``PersonaError`` and closes ``fd`` otherwise."""
        session, admitted = self._opening.pop(session_id, (None, None))
        if session is None or (admitted is None and self.settings.mode is Mode.ENFORCE):
            os.close(fd)
            raise PersonaError(Reason.SESSION_UNKNOWN, "this session was not admitted")
        if not seccomp.is_listener(fd) or self._count(session.uid) >= _SESSIONS_PER_USER:
            os.close(fd)
            self._unbase(session_id)
            self._unannounced.pop(session_id, None)
            self.questions.closed(session)
            raise PersonaError(Fault.BAD_REQUEST, "that is no listener, or this user has too many sessions")
        path = self._directory / f"{session.id}.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(to_json(session)))
        self.keeping.keep(session.id, fd)
        self.supervisor.add(session, fd, fresh=True)
        log.info("session %s of %s gated (%s)", session.id, printable(session.subject.user), session.service)

    def base_of(self, session_id: str) -> PersonaRef | None:
        """The persona that applies to a session as a whole, as far as it is known."""
        base = self.base.get(session_id)
        return base.persona if base is not None else None

    def rebase(self, session_id: str, persona: PersonaRef | None, policy: str | None) -> None:
        """From now on it is this one."""
        if session_id in self.base or session_id in self.supervisor.sessions:
            self.base[session_id] = Admitted(persona, policy)
        if self.bases is not None:
            self.bases.rebased(session_id, persona)

    def _unbase(self, session_id: str) -> None:
        self.base.pop(session_id, None)
        if self.bases is not None:
            self.bases.ended(session_id)

    def _count(self, uid: int) -> int:
        return sum(gated.session.uid == uid for gated in self.supervisor.sessions.values())

    def ended(self, session: Session) -> None:
        """The last process of a session is gone."""
        (self._directory / f"{session.id}.json").unlink(missing_ok=True)
        self._unbase(session.id)
        self._unannounced.pop(session.id, None)
        self.keeping.forget(session.id)
        self.questions.closed(session)
        self._log(session.id, session.subject.user, "session_end")
        log.info("session %s ended", session.id)

    def restore(self, listeners: dict[str, int]) -> None:
        """Takes up the sessions of the agent before this one from what was kept; ``listeners`` is emptied."""
        for path in self._directory.glob("s-*.json"):
            try:
                session = from_json(json.loads(path.read_text()))
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.error("%s: %s; its session is refused everything", path, error)
                continue
            fd = listeners.pop(path.stem, None)
            if fd is None:
                path.unlink(missing_ok=True)
            else:
                self.supervisor.add(session, fd)
        while listeners:  # no copy may be left anywhere: then execs there fail with ENOSYS, else they hang
            name, fd = listeners.popitem()
            os.close(fd)
            self.keeping.forget(name)

    def listeners(self) -> list[tuple[str, int]]:
        """Every session's id and listener."""
        return [(gated.session.id, gated.listener) for gated in self.supervisor.sessions.values()]

    def _note_admission(self, session: Session, result: Admitted | Denied) -> None:
        denied = result if isinstance(result, Denied) else None
        self._log(session.id, session.subject.user, "admission", denied)

    def _log(self, session: str, user: str, event: str, denied: Denied | None = None) -> None:
        self._record(of_login(session, user, event, denied, complain=self.settings.mode is Mode.COMPLAIN))

    def stopped(self, event: layer_abi.Event) -> None:
        """The kernel stopped, killed or would have stopped an exec that nobody had approved."""
        sessions = self.supervisor.sessions.values()
        gated = next((one for one in sessions if one.session.audit == event.audit_session), None)
        if gated is None or event.audit_session is None:
            gated = self.supervisor.find(event.tgid)
        if gated is not None:
            self._record(of_stop(event, gated.session.id, gated.session.subject.user))
        else:
            record, uid = of_stop(event, "", ""), event.uid if event.login is None else event.login
            self._record(lambda: dataclasses.replace(record, user=self._names.of(uid)))

    # --- what users ask ---------------------------------------------------------------------------

    def greeting(self, session: Session) -> str | None:
        """One line for an interactive login; ``None`` where the operator switched it off."""
        if not self.settings.gate.greeting:
            return None
        base = self.base.get(session.id)
        now = f"{base.persona.name} v{base.persona.version}" if base and base.persona else "none right now"
        mode = "" if self.settings.mode is Mode.ENFORCE else " (complain mode: nothing is stopped)"
        return f"persona: {now} on {self.settings.vm.name}{mode}; 'persona list' shows what you may run"

    def layers(self) -> dict[str, bool]:
        """The parts of the gate by name, and whether each is active.  Safe to call from any thread."""
        active = self.last_word.layer.active
        limits, network = self.supervisor.place is not None, self.bases is not None
        found = {"seccomp": True, "bpf": active, "verify": not active, "limits": limits, "network": network}
        return found | self._fallback.layers()

    def open_from_shell(self, caller: Caller, pid: int, reply_to: Callable[[dict[str, Any]], None]) -> str:
        """``persona-shell`` wants a gate; the session's id, for the listener that may follow."""
        session = self._session(caller, pid)

        def refuse(denied: Denied) -> None:
            line = admission_line(caller.user, self.settings.vm.name, denied)
            reply_to({"ok": False, "code": str(denied.reason), "message": line})

        def gate() -> None:
            instructions = base64.b64encode(self._filter).decode()
            greeting, below = self.greeting(session), self._fallback.directories
            answer = {"ok": True, "verdict": "install", "filter": instructions, "greeting": greeting}
            reply_to(answer | ({"landlock": list(below)} if below else {}))

        self._open(session, refuse, gate)
        return session.id

    def listener_from_shell(self, session_id: str, fd: int) -> None:
        """The listener of ``persona-shell``.  Raises ``PersonaError`` where it is not taken."""
        self._take(session_id, fd)
