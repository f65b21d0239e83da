"""What a user may ask the agent over its open socket; who asks is the kernel's word, never the caller's."""

import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from persona.codec import encode_decision, encode_program
from persona.decisions import Decision, Denied, Granted, Lease, PersonaRef, Request, Width
from persona.problems import Fault, PersonaError, Reason
from persona_guest.agent.greeting import Greeting
from persona_guest.agent.resource_status import ResourceStatus
from persona_guest.agent.status import Status
from persona_guest.broker.client import BrokerClient
from persona_guest.core.denials import Book
from persona_guest.core.pam_protocol import Caller
from persona_guest.gate.decider import Decider
from persona_guest.gate.evaluate import Ask, Refused, judge
from persona_guest.gate.hang_watchdog import HangWatchdog
from persona_guest.gate.implicit_allow import rule_for
from persona_guest.gate.supervisor import Supervisor
from persona_guest.ipc.users import Call, Respond
from persona_guest.kernel.task import Task
from persona_guest.login.exemptions import exemption_of_account
from persona_guest.login.opening import Openings
from persona_guest.program import exec_request as exec_requests
from persona_guest.program.exec_request import ExecRequest
from persona_guest.program.identity import Identifier
from persona_guest.session.login_shells import login_shells, real_shell
from persona_guest.session.model import Login
from persona_guest.session.registry import Registry
from persona_guest.settings import Mode, Settings

ARGUMENTS_MAX = 1024
_NO_SESSION = "this process is in no gated session: nothing is decided here"
log = logging.getLogger("persona.agent")

_IMPLICIT = Granted(PersonaRef("", 0), "", Lease(0.0, Width.ARGV))  # granted by no policy
_OPENING_MAX = 64  # of one user: each holds a session of the broker's


class Users:
    """Runs the operations of agent.sock (docs/protocol.md) for their callers.

    ``decider`` says what would be decided (``explain``); ``release`` is called for root's operation of that name.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        registry: Registry,
        supervisor: Supervisor,
        openings: Openings,
        identifier: Identifier,
        hang_watchdog: HangWatchdog,
        decider: Decider,
        broker_client: BrokerClient,
        denials: Book,
        greeting: Greeting,
        status: Status,
        resource_status: ResourceStatus,
        release: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._supervisor = supervisor
        self._openings = openings
        self._identifier = identifier
        self._hang_watchdog = hang_watchdog
        self._decider = decider
        self._broker_client = broker_client
        self._book = denials
        self._greeting = greeting
        self._status = status
        self._resource_status = resource_status
        self._release = release
        # pid of a persona-shell -> its uid, and the session whose listener is to come
        self._opening: dict[int, tuple[int, str]] = {}
        self._ops: dict[str, Callable[[Call, Respond], None]] = {
            "status": self._tell_status,
            "list": self._list,
            "greeting": self._greet,
            "explain": self._explain,
            "denials": self._denials,
            "gate": self._gate,
            "listener": self._listener,
            "release": self._release_all,
            "plan": self._plan,
        }

    def handle(self, call: Call, respond: Respond) -> None:
        """Runs the operation that the call names.  Raises ``PersonaError`` for what is refused."""
        op = self._ops.get(call.op)
        if op is None:
            raise PersonaError(Fault.BAD_REQUEST, f"op: unknown; known: {', '.join(sorted(self._ops))}")
        op(call, respond)

    def _own(self, call: Call) -> Login | None:
        """The caller's session; only root sees one of another user."""
        login = self._registry.find(call.pid)
        return login if login is not None and call.uid in (0, login.session.uid) else None

    def _must_own(self, call: Call) -> Login:
        login = self._own(call)
        if login is None:
            raise PersonaError(Reason.SESSION_UNKNOWN, _NO_SESSION)
        return login

    def _tell_status(self, call: Call, respond: Respond) -> None:
        """Tells which persona applies to the caller's session, its limits and their use, and how the gate is."""
        call.only()
        login = self._own(call)
        user = call.caller.user if call.caller else str(call.uid)
        status = self._status.of(login, user, everything=call.uid == 0)
        if login is None or status["persona"] is None:
            respond(status)
            return
        status |= self._resource_status.stated(status["persona"])
        self._resource_status.use(login.session.id, lambda places: respond({**status, "places": places}))

    def _plan(self, call: Call, respond: Respond) -> None:
        """Shows what would be changed now so that what is found is what should be."""
        call.only()
        if call.uid != 0:
            raise PersonaError(Fault.UNAUTHENTICATED, "only root may see everybody's places")
        respond({"ok": True, **self._resource_status.plan()})

    def _list(self, call: Call, respond: Respond) -> None:
        """Lists all policies for the caller's session, in order, with what they allow."""
        call.only()
        login = self._must_own(call)

        def received(entries: list[Any] | Denied) -> None:
            if isinstance(entries, Denied):
                respond({"ok": False, "code": str(entries.reason), "message": entries.help})
            else:
                respond({"ok": True, "entries": entries})

        self._broker_client.entries(login.session, received)

    def _greet(self, call: Call, respond: Respond) -> None:
        """Makes the line that an interactive login shows; there is none outside of a gated session."""
        call.only()
        login = self._own(call)
        greeting = self._greeting.line(login.session, call.uid) if login is not None else None
        respond({"ok": True, "greeting": greeting})

    def _denials(self, call: Call, respond: Respond) -> None:
        """Lists what was denied to the caller lately, in all their sessions on this machine.

        Only in a session of their own: who became somebody else in it (su, sudo, a setuid program), root included,
        is told neither of the two's.
        """
        call.only()
        login = self._registry.find(call.pid)
        if login is None:
            raise PersonaError(Reason.SESSION_UNKNOWN, _NO_SESSION)
        if login.session.uid != call.uid:
            why = "this session is another user's: log in as yourself; an operator sees everything in the record"
            raise PersonaError(Fault.UNAUTHENTICATED, why)
        self._supervisor.notes.flush()
        respond({"ok": True, "items": [asdict(denial) for denial in self._book.of(call.uid)]})

    def _explain(self, call: Call, respond: Respond) -> None:
        """Says what would become of a command in the caller's session, and why; runs nothing.

        The program comes as a descriptor: what the caller cannot reach, they cannot ask about.
        """
        call.only("argv", "path", "cwd")
        login = self._must_own(call)
        argv = call.fields.get("argv")
        if (
            not isinstance(argv, list)
            or not 0 < len(argv) <= ARGUMENTS_MAX
            or not all(isinstance(argument, str) for argument in argv)
        ):
            raise PersonaError(Fault.BAD_REQUEST, f"argv: expected a list of 1 to {ARGUMENTS_MAX} strings")
        if len(call.fds) != 1:
            raise PersonaError(Fault.BAD_REQUEST, "expected the program as one descriptor")
        outer = self._hang_watchdog.enter(login.session)  # it may be a file of a file system of the caller's
        try:
            path = os.fsencode(call.text("path"))
            program = os.dup(call.fds[0])
            exec_request = exec_requests.request_for(
                Task(call.pid), program, path, tuple(map(os.fsencode, argv)), self._identifier,
                self._supervisor.owner(login),
            )  # fmt: skip
        except (OSError, UnicodeEncodeError) as error:
            # not the path in it: that may be the first line of a script which the caller cannot read
            why = error.strerror if isinstance(error, OSError) and error.strerror else "it cannot be looked at"
            raise PersonaError(Reason.PROGRAM_UNREADABLE, f"the program: {why}") from None
        finally:
            self._hang_watchdog.leave(outer)
        self._explain_on(exec_request, login, Task(call.pid), call.text("cwd", ""), {}, respond)

    def _explain_on(
        self, exec_request: ExecRequest, login: Login, task: Task, cwd: str, told: dict[int, Decision], respond: Respond
    ) -> None:
        """Walks over the stages as the gate does; ``told`` are the broker's answers so far.

        The broker is asked anew even where a lease holds.
        """
        gate = self._settings.gate
        judgement = judge(
            exec_request, 0, (), told.get,
            lambda denials: rule_for(exec_request, login, task, gate, self._identifier, denials),
        )  # fmt: skip
        question = exec_request.question(judgement.stage, login.holder)
        if isinstance(judgement, Ask):
            stage = judgement.stage

            def decided(decision: Decision) -> None:
                self._explain_on(exec_request, login, task, cwd, {**told, stage: decision}, respond)

            request = Request(
                login.session.subject,
                login.session.id,
                question.program,
                tuple(map(os.fsdecode, exec_request.stages[stage].argv)),
                cwd,
                question.complete,
            )
            self._decider.explain(request, decided)
            return
        found: dict[str, Any] = {"ok": True, "program": encode_program(question.program), "always": None}
        full = self._supervisor.unrecordable(login.session.subject.user)
        if isinstance(judgement, Refused):
            decision = encode_decision(judgement.denied)
        elif full is not None:
            decision = encode_decision(full)
        elif judgement.granted is not None:
            decision = encode_decision(judgement.granted)
        else:  # no persona and no policy says so
            decision = {**encode_decision(_IMPLICIT), "persona": None, "policy": None}
            found["always"] = str(judgement.own)
        respond({**found, "decision": decision})

    def _gate(self, call: Call, respond: Respond) -> None:
        """Opens a session for ``persona-shell`` where PAM did not; answers with the filter to install, if any."""
        call.only("shell", "interactive")
        login = self._registry.find(call.pid)
        # the filter as well: a session that root began for a user shares root's audit session
        if login is not None and _is_filtered(call.pid):
            greeting = self._greeting.line(login.session, call.uid)
            respond({"ok": True, "verdict": "present", "greeting": greeting})
            return
        caller = call.caller
        if exemption_of_account(call.uid, self._settings.gate):
            respond({"ok": True, "verdict": "pass", "greeting": None})
            return
        try:
            if caller is None:
                raise PersonaError(Fault.NOT_FOUND, f"uid {call.uid} is in no user database")
            if self._openings.exempt(caller):
                respond({"ok": True, "verdict": "pass", "greeting": None})
                return
            self._make_room(call)
        except PersonaError as error:
            if self._settings.mode is not Mode.COMPLAIN:
                raise
            log.warning("complain mode, uid %d goes on ungated: %s", call.uid, error.message)
            respond({"ok": True, "verdict": "pass", "greeting": None})
            return
        shell = _shell_of(caller, call.text("shell"))
        self._opening[call.pid] = (
            call.uid,
            self._openings.open_from_shell(caller._replace(shell=shell), call.pid, respond),
        )

    def _listener(self, call: Call, respond: Respond) -> None:
        """Takes the seccomp listener of the session that ``gate`` opened, and answers for it from now on."""
        call.only()
        uid, session_id = self._opening.pop(call.pid, (0, None))
        if (
            session_id is not None and uid != call.uid
        ):  # the number of a process that has ended is another user's by now
            self._openings.abandoned(session_id)
            session_id = None
        if session_id is None:
            raise PersonaError(Reason.SESSION_UNKNOWN, "expected 'gate' before the listener")
        try:
            if len(call.fds) != 1:
                raise PersonaError(Fault.BAD_REQUEST, "expected one descriptor")
            listener = os.dup(call.fds[0])
        except (PersonaError, OSError):
            self._openings.abandoned(session_id)
            raise
        self._openings.listener_from_shell(session_id, listener)
        respond({"ok": True, "session": session_id})

    def _release_all(self, call: Call, respond: Respond) -> None:
        """Lets every gated session go on ungated and unbound; the agent ends with the last of them."""
        call.only()
        if call.uid != 0:
            raise PersonaError(Fault.UNAUTHENTICATED, "only root may release the gate")
        self._release()
        respond({"ok": True, "sessions": len(self._registry.gated())})

    def _make_room(self, call: Call) -> None:
        """Forgets what the dead and this very process began.  Raises ``PersonaError`` where that is not enough."""
        for pid, (_, session_id) in list(self._opening.items()):
            if pid == call.pid or not os.path.exists(f"/proc/{pid}"):
                del self._opening[pid]
                self._openings.abandoned(session_id)
        if sum(uid == call.uid for uid, _ in self._opening.values()) >= _OPENING_MAX:
            raise PersonaError(Reason.AGENT_OVERLOADED, "too many logins of this user begin at once")


def _shell_of(caller: Caller, wanted: str) -> str:
    """The login shell that is allowed whatever the personas say: one that root has named as such."""
    named = {caller.shell, real_shell(caller.user, caller.shell)}
    return wanted if wanted in named or wanted in login_shells() else caller.shell


def _is_filtered(pid: int) -> bool:
    try:
        return Task(pid).is_filtered()
    except OSError:
        return False
