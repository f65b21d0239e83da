"""What a user may ask the agent over its open socket; who asks is the kernel's word, never the caller's."""

import os
from collections.abc import Callable
from typing import Any

from persona.codec import encode_decision, encode_program
from persona.decisions import Decision, Denied, Request
from persona.problems import Fault, PersonaError, Reason
from persona_guest.agent import Agent
from persona_guest.bounds import Bounds
from persona_guest.core.admission import exemption
from persona_guest.core.pam_wire import Caller
from persona_guest.door import Door
from persona_guest.gate import attempt as attempts
from persona_guest.gate.attempt import Attempt
from persona_guest.gate.guard import Guard
from persona_guest.gate.identity import Identifier
from persona_guest.gate.pending import Gated
from persona_guest.gate.supervisor import untrusted
from persona_guest.ipc.user_socket import Answer, Call
from persona_guest.kernel.task import Task
from persona_guest.login_shells import login_shells, real_shell
from persona_guest.status import status as status_of

Backed = Callable[[Decision, Callable[[Decision], None]], None]

ARGUMENTS_MAX = 1024
_OPENING_MAX = 64  # of one user: each holds a session of the broker's


class Users:
    """Handles each ``op``; ``release`` is root's, ``backed`` says what a grant counts on this machine."""

    def __init__(
        self,
        agent: Agent,
        door: Door,
        identifier: Identifier,
        guard: Guard,
        release: Callable[[], None],
        bounds: Bounds,
        backed: Backed,
    ) -> None:
        self._agent = agent
        self._door = door
        self._bounds = bounds
        self._identifier = identifier
        self._guard = guard
        self._release = release
        self._backed = backed
        # pid of a persona-shell -> its uid, and the session whose listener is to come
        self._opening: dict[int, tuple[int, str]] = {}
        self._ops: dict[str, Callable[[Call, Answer], None]] = {
            "status": self._status,
            "list": self._list,
            "greeting": self._greeting,
            "explain": self._explain,
            "gate": self._gate,
            "listener": self._listener,
            "release": self._release_all,
            "plan": self._plan,
        }

    def handle(self, call: Call, answer: Answer) -> None:
        """Raises ``PersonaError`` for what is refused."""
        op = self._ops.get(call.op)
        if op is None:
            raise PersonaError(Fault.BAD_REQUEST, f"op: unknown; known: {', '.join(sorted(self._ops))}")
        op(call, answer)

    def _own(self, call: Call) -> Gated | None:
        """The caller's session; only root sees one of another user."""
        gated = self._agent.supervisor.find(call.pid)
        return gated if gated is not None and call.uid in (0, gated.session.uid) else None

    def _must_own(self, call: Call) -> Gated:
        gated = self._own(call)
        if gated is None:
            raise PersonaError(Reason.SESSION_UNKNOWN, "this process is in no gated session: nothing is decided here")
        return gated

    def _status(self, call: Call, answer: Answer) -> None:
        call.only()
        gated = self._own(call)
        status = status_of(self._agent, gated, call.caller.user if call.caller else str(call.uid))
        if gated is None or status["persona"] is None:
            answer(status)
            return
        status |= self._bounds.stated(status["persona"])
        self._bounds.use(gated.session.id, lambda places: answer({**status, "places": places}))

    def _plan(self, call: Call, answer: Answer) -> None:
        call.only()
        if call.uid != 0:
            raise PersonaError(Fault.UNAUTHENTICATED, "only root may see everybody's places")
        answer({"ok": True, **self._bounds.plan()})

    def _list(self, call: Call, answer: Answer) -> None:
        call.only()
        gated = self._must_own(call)

        def received(entries: list[Any] | Denied) -> None:
            if isinstance(entries, Denied):
                answer({"ok": False, "code": str(entries.reason), "message": entries.help})
            else:
                answer({"ok": True, "entries": entries})

        self._agent.questions.entries(gated.session, received)

    def _greeting(self, call: Call, answer: Answer) -> None:
        call.only()
        gated = self._own(call)
        answer({"ok": True, "greeting": self._agent.greeting(gated.session) if gated else None})

    def _explain(self, call: Call, answer: Answer) -> None:
        """The program comes as a descriptor: what the caller cannot reach, he cannot ask about."""
        call.only("argv", "path", "cwd")
        gated = self._must_own(call)
        argv = call.fields.get("argv")
        if (
            not isinstance(argv, list)
            or not 0 < len(argv) <= ARGUMENTS_MAX
            or not all(isinstance(argument, str) for argument in argv)
        ):
            raise PersonaError(Fault.BAD_REQUEST, f"argv: expected a list of 1 to {ARGUMENTS_MAX} strings")
        if len(call.fds) != 1:
            raise PersonaError(Fault.BAD_REQUEST, "expected the program as one descriptor")
        outer = self._guard.enter(gated.session)  # it may be a file of a file system of the caller's
        try:
            path = os.fsencode(call.text("path"))
            program = os.dup(call.fds[0])
            attempt = attempts.look(Task(call.pid), program, path, tuple(map(os.fsencode, argv)), self._identifier)
        except (OSError, UnicodeEncodeError) as error:
            # not the path in it: that may be the first line of a script which the caller cannot read
            why = error.strerror if isinstance(error, OSError) and error.strerror else "it cannot be looked at"
            raise PersonaError(Reason.PROGRAM_UNREADABLE, f"the program: {why}") from None
        finally:
            self._guard.leave(outer)
        self._explain_stage(attempt, gated, call.text("cwd", ""), 0, [], answer)

    def _explain_stage(
        self, attempt: Attempt, gated: Gated, cwd: str, stage: int, denials: list[Denied], answer: Answer
    ) -> None:
        found, argv = attempt.stages[stage]
        question = attempt.question(stage, gated.holder)

        def decided(decision: Decision) -> None:
            if isinstance(decision, Denied):
                denials.append(decision)
                if stage + 1 < len(attempt.stages):
                    self._explain_stage(attempt, gated, cwd, stage + 1, denials, answer)
                    return
                decision = denials[0 if attempt.stages[0][0].trusted else -1]
            program = encode_program(question.program)
            answer({"ok": True, "program": program, "decision": encode_decision(decision)})

        if not found.trusted:
            decided(untrusted(found))
            return
        request = Request(
            gated.session.subject,
            gated.session.id,
            question.program,
            tuple(map(os.fsdecode, argv)),
            cwd,
            question.complete,
        )
        self._agent.questions.decide(request, lambda decision: self._backed(decision, decided), explain=True)

    def _gate(self, call: Call, answer: Answer) -> None:
        call.only("shell", "interactive")
        gated = self._agent.supervisor.find(call.pid)
        # the filter as well: a session that root began for a user shares root's audit session
        if gated is not None and _is_filtered(call.pid):
            greeting = self._agent.greeting(gated.session)
            answer({"ok": True, "verdict": "present", "greeting": greeting})
            return
        caller = call.caller
        if caller is None:
            raise PersonaError(Fault.NOT_FOUND, f"uid {call.uid} is in no user database")
        if exemption(caller.uid, caller.groups, self._agent.settings.gate):
            answer({"ok": True, "verdict": "pass", "greeting": None})
            return
        self._make_room(call)
        shell = _shell_of(caller, call.text("shell"))
        self._opening[call.pid] = call.uid, self._door.open_from_shell(caller._replace(shell=shell), call.pid, answer)

    def _listener(self, call: Call, answer: Answer) -> None:
        call.only()
        _, session = self._opening.pop(call.pid, (0, None))
        if session is None or len(call.fds) != 1:
            raise PersonaError(Reason.SESSION_UNKNOWN, "expected one descriptor, after 'gate'")
        self._door.listener_from_shell(session, os.dup(call.fds[0]))
        answer({"ok": True, "session": session})

    def _release_all(self, call: Call, answer: Answer) -> None:
        call.only()
        if call.uid != 0:
            raise PersonaError(Fault.UNAUTHENTICATED, "only root may release the gate")
        self._release()
        answer({"ok": True, "sessions": len(self._agent.supervisor.sessions)})

    def _make_room(self, call: Call) -> None:
        """Forgets what the dead and this very process began.  Raises ``PersonaError`` where that is not enough."""
        for pid, (_, session) in list(self._opening.items()):
            if pid == call.pid or not os.path.exists(f"/proc/{pid}"):
                del self._opening[pid]
                self._door.abandoned(session)
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
