"""The gate: every execve of every gated session comes here, is decided, and goes on or fails.

A notification is received as soon as it is there.  It is decided from leases where they hold, else the broker is asked;
whatever prevents a decision is a denial.  In complain mode the same happens, is recorded, and goes on.
"""

import contextlib
import errno
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from persona.decisions import Decision, Denied, Granted, Request
from persona.problems import PersonaError, Reason
from persona_guest.core.leases import Question
from persona_guest.core.messages import denial_line
from persona_guest.core.unanswered import UNANSWERED
from persona_guest.gate import implicit_allow
from persona_guest.gate.evaluate import Ask, Refused, Runs, judge
from persona_guest.gate.hang_watchdog import LIMIT_S
from persona_guest.gate.parts import DecisionParts, RecordParts, StartParts, WaitingParts
from persona_guest.gate.pending import Pending
from persona_guest.gate.post_exec_check import Expectation, Verifier, Wrong
from persona_guest.gate.terminal import tell
from persona_guest.kernel import seccomp
from persona_guest.kernel.task import Process, Task
from persona_guest.loop import GONE, READABLE, Loop
from persona_guest.lsm.layer import HangsOn
from persona_guest.program import exec_request as exec_requests
from persona_guest.program.identity import images_of
from persona_guest.program.own_home import Owner
from persona_guest.session.login_shells import real_shell
from persona_guest.session.model import Login, Session, State
from persona_guest.session.registry import Registry
from persona_guest.settings import Mode, Settings

log = logging.getLogger("persona.gate")


class Supervisor:
    """Answers for every session of ``registry`` that is gated, and closes its listener when it ends."""

    def __init__(
        self,
        settings: Settings,
        loop: Loop,
        registry: Registry,
        decision: DecisionParts,
        waiting: WaitingParts,
        start: StartParts,
        record: RecordParts,
    ) -> None:
        self.settings = settings
        self.released = False
        self._loop = loop
        self._registry = registry
        self._identifier = decision.identifier
        self._leases = decision.leases
        self._ask = decision.ask
        self._home_of = decision.home_of
        self._inflight = waiting.inflight
        self._waiting = waiting.waiting
        self._hang_watchdog = waiting.hang_watchdog
        self._placing = start.placing
        self._kernel_layer = start.kernel_layer
        self.notes = record.notes
        self.unrecordable = record.refusal
        self.verifier = Verifier(loop, time.monotonic, waiting.hang_watchdog)
        self._buffer = bytearray(seccomp.NOTIF_SIZE)
        self._holders: dict[object, int] = {}
        self.times: deque[float] = deque(maxlen=4096)  # CPU seconds from a notification's receipt to its answer

    # --- sessions ---------------------------------------------------------------------------------

    def holder(self, session: Session) -> int:
        """The number under which decisions for this session's subject are leased."""
        return self._holders.setdefault(session.subject, len(self._holders) + 1)

    def owner(self, login: Login) -> Owner:
        """Whose programs in a home may run in this session, where a persona names them."""
        return Owner(login.session.uid, self._home_of)

    def answer_for(self, login: Login, *, fresh: bool = False) -> None:
        """Reads the login's listener from now on; ``fresh`` = just admitted.  Raises ``OSError``."""
        session = login.session
        seccomp.use_synchronous_wakeup(login.listener)
        login.shells = _shells_of(session)
        login.shell_files = images_of(login.shells)
        login.holder = self.holder(session)
        if fresh:
            login.confirmed = self._leases.generation
        self._home_of(session.uid)  # asked for before it is needed
        self._loop.add_reader(login.listener, READABLE, lambda events: self._ready(login, events))

    def answer_left_over(self) -> None:
        """Answers what an agent before this one received and did not answer."""
        for slot, name, raw, readable in self._inflight.left_over():
            login = self._registry.get(name)
            notification = seccomp.parse_notification(raw)
            if login is None:
                self._inflight.clear(slot)
            elif readable:
                self._answer(login, notification, slot)
            else:
                self._not_judged(login, notification.id, slot, "the agent hung in it")

    def _end(self, login: Login) -> None:
        self._loop.remove_reader(login.listener)
        os.close(login.listener)
        login.listener = -1  # what still waits of it must not reach whatever gets the number next
        self._registry.end(login)

    # --- one exec ---------------------------------------------------------------------------------

    def _ready(self, login: Login, events: int) -> None:
        if events & READABLE:
            started = time.monotonic()
            outer = self._hang_watchdog.enter(login.session)
            try:
                notification = seccomp.receive(login.listener, self._buffer)
            finally:
                self._hang_watchdog.leave(outer)
            if notification is None and time.monotonic() - started > LIMIT_S:
                log.error("session %s: somebody else reads its listener; nothing more starts in it", login.session.id)
                self._end(login)
            elif notification is not None:
                began = time.thread_time()
                slot = self._inflight.put(login.name, self._buffer)
                self._answer(login, notification, slot)
                self.times.append(time.thread_time() - began)
        elif events & GONE:
            self._end(login)

    def _answer(self, login: Login, notification: seccomp.Notification, slot: int) -> None:
        self._guarded(login, notification.id, slot, lambda: self._handle(login, notification, slot))

    def _guarded(self, login: Login, ident: int, slot: int, work: Callable[[], None]) -> None:
        """Whatever a caller's exec can provoke while it is judged: it is denied, and the agent serves the others."""
        outer = self._hang_watchdog.enter(
            login.session
        )  # memory, files and standard error of the task may all be its user's own
        try:
            work()
        except Exception:  # no list is complete of what may go wrong, and not to answer would be to hang
            log.exception("an exec could not be judged; it is denied")
            with contextlib.suppress(OSError):  # the session has ended meanwhile
                self._not_judged(login, ident, slot, "the agent's journal says why")
        finally:
            self._hang_watchdog.leave(outer)

    def _handle(self, login: Login, notification: seccomp.Notification, slot: int) -> None:
        if self.released:
            self.verifier.forget(notification.tid)
            self._go_on(login, notification.id, slot)
            return
        task = Task(notification.tid)
        try:
            exec_request = exec_requests.read(task, notification, self._identifier, self.owner(login))
        except OSError as error:
            self._unreadable(login, notification.id, slot, error)
            return
        self._decide(Pending(login, notification.id, slot, task, exec_request))

    def _not_judged(self, login: Login, ident: int, slot: int, why: str) -> None:
        self._unreadable(login, ident, slot, OSError(errno.EACCES, why))  # first: not to answer would be to hang
        self.notes.add_unjudged(login.session, f"this program start could not be judged: {why}")

    def _unreadable(self, login: Login, ident: int, slot: int, error: OSError) -> None:
        # The kernel reports these for the same call; answering them ourselves leaves no second reading.
        if self.settings.mode is Mode.COMPLAIN:
            self._go_on(login, ident, slot)
        else:
            self._fail(login, ident, slot, error.errno or errno.EACCES)

    def _decide(self, pending: Pending) -> None:
        """Goes through the stages until one is granted, all are denied, or the broker must be asked."""
        login, exec_request = pending.login, pending.exec_request
        judgement = judge(
            exec_request,
            pending.stage,
            pending.denials,
            lambda stage: self._known(login, exec_request.question(stage, login.holder)),
            lambda denials: implicit_allow.rule_for(
                exec_request, login, pending.task, self.settings.gate, self._identifier, denials
            ),
        )
        pending.denials = judgement.denials
        match judgement:
            case Refused(denied=denied):
                self._deny(pending, denied)
            case Runs(stage=stage, granted=granted):
                pending.stage = stage
                self._allow(pending, granted)
            case Ask(stage=stage):
                pending.stage = stage
                if login.confirmed == self._leases.generation and (
                    implicit_allow.is_login_shell(exec_request, login, self._identifier)
                    or implicit_allow.is_users_command(exec_request, self.settings.gate)
                ):
                    self._allow(pending, None)
                    return
                pending.leased = False
                self._enquire(pending, exec_request.question(stage, login.holder), exec_request.stages[stage].argv)

    def _known(self, login: Login, question: Question) -> Decision | None:
        """Returns the decision that holds without asking the broker, ``None`` where it must be asked.

        Leases are the user's, over all their sessions.  After each event the broker must have answered once for this
        very session, which may have been revoked, before a lease counts in it.
        """
        if login.confirmed != self._leases.generation:
            return None
        return login.revoked or self._leases.lookup(question, time.monotonic())

    def _enquire(self, pending: Pending, question: Question, argv: tuple[bytes, ...]) -> None:
        if self._drop_if_gone(pending):
            return
        self._inflight.mark_read(pending.slot)
        login, session = pending.login, pending.login.session
        if self._waiting.add(pending, question) > 1:
            return
        request = Request(
            subject=session.subject,
            session=session.id,
            program=question.program,
            argv=tuple(os.fsdecode(argument) for argument in argv),
            cwd=pending.task.working_directory(),
            argv_complete=question.complete,
        )
        self._ask(request, lambda decision: self._broker_answered(login, question, decision))

    def _broker_answered(self, login: Login, question: Question, decision: Decision) -> None:
        if login.state is State.ENDED:  # its listener is closed: nobody waits any more
            for pending in self._waiting.take(login.session.id, question):
                self._inflight.clear(pending.slot)
            return
        now = time.monotonic()
        if not _is_answered(question, decision):
            if login.revoked is None:
                decision = self._leases.within_grace(question, now) or decision
        else:
            login.confirmed = decision.generation
            login.revoked = None
            if isinstance(decision, Denied) and decision.reason is Reason.SESSION_REVOKED:
                login.revoked = decision
            else:
                self._leases.keep(question, decision, now)
        for pending in self._waiting.take(login.session.id, question):
            self._guarded(login, pending.ident, pending.slot, partial(self._resume, pending, decision))

    def _resume(self, pending: Pending, decision: Decision) -> None:
        if self.released:  # meanwhile: nothing is decided or bound any more
            self._go_on(pending.login, pending.ident, pending.slot)
        elif isinstance(decision, Granted):
            self._allow(pending, decision)
        else:
            pending.denials += (decision,)
            pending.stage += 1
            self._decide(pending)

    def _drop_if_gone(self, pending: Pending) -> bool:
        """Forgets an exec whose task waits no more, and says whether it did.

        What was read of it may be another task's: nothing may be said or asked of that.  An answer needs no such
        look: one that the kernel takes proves that the task waited all along.
        """
        if seccomp.still_valid(pending.login.listener, pending.ident):
            return False
        self._inflight.clear(pending.slot)
        return True

    # --- the answers ------------------------------------------------------------------------------

    def _allow(self, pending: Pending, granted: Granted | None) -> None:
        login = pending.login
        full = self.unrecordable(login.session.subject.user)
        if full is not None:
            self._deny(pending, full)
            return
        layer = self._kernel_layer.layer
        # complain mode lets go on what it would deny: a look could not tell that from a race
        verifying = self.settings.mode is Mode.ENFORCE and not (layer.active and pending.exec_request.final.is_unique)
        try:
            self._placing.read_task(pending)  # watched: its program may be a file of a file system of the user's own
            outer = self._hang_watchdog.rest()
            try:
                self._placing.place(pending, granted)
            finally:
                self._hang_watchdog.resume(outer)
            expected = self._expectation(pending, granted) if verifying else None
        except PersonaError as error:
            reason = error.code if isinstance(error.code, Reason) else Reason.ENFORCEMENT_FAILED
            self._deny(pending, Denied(reason, help=error.message))
            return
        except OSError:  # killed while it waited, or no descriptor left: never leave it waiting
            self._fail(login, pending.ident, pending.slot, errno.EACCES)
            return
        if layer.active:
            if self._drop_if_gone(pending):  # its number may be another exec's by now
                if expected is not None:
                    expected[0].close()
                return
            hangs, script = pending.hangs_on(granted), pending.script(granted)
            layer.approve(pending.task.tid, login.session.uid, pending.exec_request, hangs_on=hangs, script=script)
        if not self._go_on(login, pending.ident, pending.slot):
            layer.withdraw(pending.task.tid)
            if expected is not None:
                expected[0].close()
            return  # what was read may have been another task's
        if expected is not None:
            self.verifier.expect(*expected, login.session, lambda found: self._caught(pending, found))
        if granted is not None:
            login.last = granted
        self.notes.add(pending, "exec", granted)

    def _expectation(self, pending: Pending, granted: Granted | None) -> tuple[Process, Expectation]:
        """The waiting process, held, and what it must be once it goes on.  Raises ``OSError`` when it is gone."""
        exec_request, task = pending.exec_request, pending.task
        before = pending.before()
        argv = argv_before = None
        if exec_request.complete and (
            pending.hangs_on(granted) is not HangsOn.NOTHING or pending.script(granted) is not None
        ):
            argv = b"".join(argument + b"\0" for argument in exec_request.final_argv)
            argv_before = task.command_line(65536) if before == exec_request.final else None
        loader = exec_request.loader.kernel if exec_request.loader is not None else None
        return Process(task), Expectation(before, exec_request.final, argv, argv_before, loader)

    def _deny(self, pending: Pending, denied: Denied) -> None:
        if self._drop_if_gone(pending):
            return
        login = pending.login
        complain = self.settings.mode is Mode.COMPLAIN
        self.notes.add(pending, "exec", denied)
        if complain:
            layer = self._kernel_layer.layer
            layer.approve(pending.task.tid, login.session.uid, pending.exec_request)
            if not self._go_on(login, pending.ident, pending.slot):
                layer.withdraw(pending.task.tid)
        else:
            if login.claim_line(time.monotonic()):
                with contextlib.suppress(OSError):  # killed meanwhile: nobody is there to be told
                    self._tell_denied(pending, denied)
            self._fail(login, pending.ident, pending.slot, errno.EACCES)

    def _tell_denied(self, pending: Pending, denied: Denied) -> None:
        """One line a command: whoever tries it again along PATH is not told again.  Raises ``OSError``."""
        login, exec_request = pending.login, pending.exec_request
        pid = pending.task.credentials().tgid
        line = denial_line(exec_request.name, denied)
        words = hash((line, exec_request.argv))
        pending.again = login.repeats(pid, words, pending.since)
        told = pending.again and login.said[pid][2]
        if told:
            login.lines -= 1
        else:
            told = tell(pid, line)
        login.has_said(pid, words, time.monotonic(), told=told)

    def _go_on(self, login: Login, ident: int, slot: int) -> bool:
        alive = seccomp.respond_continue(login.listener, ident)
        self._inflight.clear(slot)
        return alive

    def _fail(self, login: Login, ident: int, slot: int, number: int) -> None:
        seccomp.respond_error(login.listener, ident, number)
        self._inflight.clear(slot)

    def _caught(self, pending: Pending, found: Wrong) -> None:
        denied = Denied(Reason.PROGRAM_NOT_TRUSTED, help=f"killed: what started was {found.what}")
        ran = self._identifier.where(found.image) if found.image is not None else None
        self.notes.add(pending, "killed", denied, ran=ran, argv=found.argv)


def _is_answered(question: Question, decision: Decision) -> bool:
    """Whether the broker said this of the session: only then is it known to be revoked, or not to be.

    A broker that is too old to know of programs in homes is not asked about them; its answers have a generation.
    """
    if isinstance(decision, Granted):
        return True
    unasked = decision.reason is Reason.PROGRAM_NOT_TRUSTED and question.program.home and not decision.generation
    return decision.reason not in UNANSWERED and not unasked


def _shells_of(session: Session) -> tuple[str, ...]:
    return tuple(dict.fromkeys((session.shell, real_shell(session.subject.user, session.shell))))
