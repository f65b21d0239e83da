"""The gate: every execve of every gated session comes here, is decided, and goes on or fails.

Received eagerly, decided from leases where they hold, asked of the broker otherwise; whatever
prevents a decision is a denial.  In complain mode the same happens, is recorded, and goes on.
"""

import contextlib
import errno
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from persona.codec import Record
from persona.decisions import Decision, Denied, Granted, Request
from persona.problems import PersonaError, Reason
from persona_guest.core.leases import LeaseBook, Question
from persona_guest.core.messages import denial_line, printable, shown_name
from persona_guest.core.sessions import Session
from persona_guest.gate import attempt as attempts
from persona_guest.gate import own
from persona_guest.gate.guard import Guard
from persona_guest.gate.identity import Identified, Identifier, Image, image_of
from persona_guest.gate.inflight import InFlight
from persona_guest.gate.kernel_layer import LastWord
from persona_guest.gate.notes import Notes
from persona_guest.gate.pending import Gated, Pending
from persona_guest.gate.terminal import tell
from persona_guest.gate.verify import Expectation, Verifier
from persona_guest.kernel import seccomp
from persona_guest.kernel.task import Process, Task
from persona_guest.login_shells import real_shell
from persona_guest.loop import GONE, READABLE, Loop
from persona_guest.questions import UNANSWERED
from persona_guest.settings import Mode, Settings

log = logging.getLogger("persona.gate")

Ask = Callable[[Request, Callable[[Decision], None]], None]
Place = Callable[[Pending, Granted | None], None]

_LINES_PER_SECOND = 20  # denial lines to one session: a loop of denied commands must not flood
_ANCESTORS_MAX = 128


class Supervisor:
    """Owns the listeners; ``ask`` puts a question to the broker and calls back in the loop's thread."""

    def __init__(
        self,
        settings: Settings,
        loop: Loop,
        identifier: Identifier,
        leases: LeaseBook,
        inflight: InFlight,
        guard: Guard,
        last_word: LastWord,
        ask: Ask,
        record: Callable[[Record], None],
        ended: Callable[[Session], None],
    ) -> None:
        self.settings = settings
        self.sessions: dict[str, Gated] = {}
        self.released = False
        self.place: Place | None = None  # brings a task under its persona before it goes on
        self.verifier = Verifier(loop, time.monotonic, guard)
        self._loop = loop
        self._identifier = identifier
        self._leases = leases
        self._inflight = inflight
        self._guard = guard
        self._last_word = last_word
        self._ask = ask
        self.notes = Notes(loop, record, complain=settings.mode is Mode.COMPLAIN)
        self._ended = ended
        self._buffer = bytearray(seccomp.NOTIF_SIZE)
        self._holders: dict[object, int] = {}
        self._waiting: dict[tuple[str, Question], list[Pending]] = {}
        self.times: deque[float] = deque(maxlen=4096)  # CPU seconds from a notification's receipt to its answer

    # --- sessions ---------------------------------------------------------------------------------

    def holder(self, session: Session) -> int:
        """The number under which decisions for this session's subject are leased."""
        return self._holders.setdefault(session.subject, len(self._holders) + 1)

    def add(self, session: Session, listener: int, *, fresh: bool = False) -> None:
        """Takes over the listener of a session and answers for it from now on; ``fresh`` = just admitted."""
        seccomp.use_synchronous_wakeup(listener)
        gated = Gated(session, listener, self.holder(session), _shells_of(session), session.id.encode())
        if fresh:
            gated.confirmed = self._leases.generation
        self.sessions[session.id] = gated
        self._loop.watch(listener, READABLE, lambda events: self._ready(gated, events))

    def answer_left_over(self) -> None:
        """Answers what an agent before this one received and did not answer."""
        for slot, name, raw, readable in self._inflight.left_over():
            gated = self.sessions.get(name)
            notification = seccomp.parse_notification(raw)
            if gated is None:
                self._inflight.clear(slot)
            elif readable:
                self._answer(gated, notification, slot)
            else:
                self._unreadable(gated, notification.id, slot, OSError(errno.EACCES, "the agent hung in it"))

    def find(self, pid: int) -> Gated | None:
        """The session that a process belongs to, by audit session id or by descent; ``None`` = none."""
        try:
            audit = Task(pid).audit_session()
        except OSError:
            return None
        if audit is not None:
            for gated in self.sessions.values():
                if gated.session.audit == audit:
                    return gated
        monitors = {gated.session.monitor: gated for gated in self.sessions.values()}
        for _ in range(_ANCESTORS_MAX):
            found = monitors.get(pid)
            if found is not None and Task(pid).started() == found.session.monitor_started:
                return found
            try:
                pid = Task(pid).credentials().ppid
            except OSError:
                return None
            if pid <= 1:
                return None
        return None

    def _end(self, gated: Gated) -> None:
        self._loop.unwatch(gated.listener)
        os.close(gated.listener)
        self.sessions.pop(gated.session.id, None)
        self._ended(gated.session)

    # --- one exec ---------------------------------------------------------------------------------

    def _ready(self, gated: Gated, events: int) -> None:
        if events & READABLE:
            notification = seccomp.receive(gated.listener, self._buffer)
            if notification is not None:
                began = time.thread_time()
                slot = self._inflight.put(gated.name, self._buffer)
                self._answer(gated, notification, slot)
                self.times.append(time.thread_time() - began)
        elif events & GONE:
            self._end(gated)

    def _answer(self, gated: Gated, notification: seccomp.Notification, slot: int) -> None:
        self._guarded(gated, notification.id, slot, lambda: self._handle(gated, notification, slot))

    def _guarded(self, gated: Gated, ident: int, slot: int, judge: Callable[[], None]) -> None:
        """Whatever a caller's exec can provoke while it is judged: it is denied, and the agent serves the others."""
        outer = self._guard.enter(
            gated.session
        )  # memory, files and standard error of the task may all be its user's own
        try:
            judge()
        except Exception:  # no list is complete of what may go wrong, and not to answer would be to hang
            log.exception("an exec could not be judged; it is denied")
            self._unreadable(gated, ident, slot, OSError(errno.EACCES, "not judged"))
        finally:
            self._guard.leave(outer)

    def _handle(self, gated: Gated, notification: seccomp.Notification, slot: int) -> None:
        if self.released:
            self.verifier.forget(notification.tid)
            self._go_on(gated, notification.id, slot)
            return
        task = Task(notification.tid)
        try:
            attempt = attempts.read(task, notification, self._identifier)
        except OSError as error:
            self._unreadable(gated, notification.id, slot, error)
            return
        self._decide(Pending(gated, notification.id, slot, task, attempt))

    def _unreadable(self, gated: Gated, ident: int, slot: int, error: OSError) -> None:
        # The kernel reports these for the same call; answering them ourselves leaves no second reading.
        if self.settings.mode is Mode.COMPLAIN:
            self._go_on(gated, ident, slot)
        else:
            self._fail(gated, ident, slot, error.errno or errno.EACCES)

    def _decide(self, pending: Pending) -> None:
        """Goes through the stages; the first that is granted wins, a stage that must be asked ends the walk."""
        gated, attempt = pending.gated, pending.attempt
        while pending.stage < len(attempt.stages):
            found, argv = attempt.stages[pending.stage]
            question = attempt.question(pending.stage, gated.holder)
            if not found.trusted:
                pending.denials += (untrusted(found),)
                pending.stage += 1
                continue
            decision = self._known(gated, question)
            if decision is None:
                if gated.confirmed == self._leases.generation and own.is_login_shell(pending):
                    self._allow(pending, None)
                    return
                pending.leased = False
                self._enquire(pending, question, argv)
                return
            if isinstance(decision, Granted):
                self._allow(pending, decision)
                return
            pending.denials += (decision,)
            pending.stage += 1
        if own.is_own(pending, self.settings.gate, revoked=gated.revoked is not None):
            self._allow(pending, None)
        else:
            # A user's own script is its interpreter's start: then that is what was refused.
            first = attempt.stages[0][0]
            self._deny(pending, pending.denials[0 if first.trusted else -1])

    def _known(self, gated: Gated, question: Question) -> Decision | None:
        """What holds without asking.  Leases are the user's, over all his sessions: since the last event the
        broker must have answered for this very one, which may have been revoked.
        """
        if gated.confirmed != self._leases.generation:
            return None
        return gated.revoked or self._leases.lookup(question, time.monotonic())

    def _enquire(self, pending: Pending, question: Question, argv: tuple[bytes, ...]) -> None:
        if not self._still_waits(pending):
            return
        self._inflight.read(pending.slot)
        gated, session = pending.gated, pending.gated.session
        waiting = self._waiting.get((session.id, question))
        if waiting is not None:
            waiting.append(pending)
            return
        self._waiting[session.id, question] = [pending]
        request = Request(
            subject=session.subject,
            session=session.id,
            program=question.program,
            argv=tuple(os.fsdecode(argument) for argument in argv),
            cwd=pending.task.working_directory(),
            argv_complete=question.complete,
        )
        self._ask(request, lambda decision: self._told(gated, question, decision))

    def _told(self, gated: Gated, question: Question, decision: Decision) -> None:
        now = time.monotonic()
        if isinstance(decision, Denied) and decision.reason in UNANSWERED:
            if gated.revoked is None:
                decision = self._leases.within_grace(question, now) or decision
        else:
            gated.confirmed = decision.generation
            gated.revoked = None
            if isinstance(decision, Denied) and decision.reason is Reason.SESSION_REVOKED:
                gated.revoked = decision
            else:
                self._leases.keep(question, decision, now)
        for pending in self._waiting.pop((gated.session.id, question), ()):
            self._guarded(gated, pending.ident, pending.slot, partial(self._resume, pending, decision))

    def _resume(self, pending: Pending, decision: Decision) -> None:
        if isinstance(decision, Granted):
            self._allow(pending, decision)
        else:
            pending.denials += (decision,)
            pending.stage += 1
            self._decide(pending)

    def tell_waiting(self, session: str, line: str) -> None:
        """A line to one of the session's tasks that wait for an answer, if there is one and it may be spoken to."""
        for (ident, _), waiting in self._waiting.items():
            for pending in waiting if ident == session else ():
                gated = pending.gated
                if seccomp.still_valid(gated.listener, pending.ident) and self._may_speak(gated):
                    with self._guard.watching(gated.session), contextlib.suppress(OSError):  # killed meanwhile
                        tell(pending.task.credentials().tgid, printable(line))
                    return

    def _still_waits(self, pending: Pending) -> bool:
        """Whether what was read of the task was its own; without, nothing may be said or asked of it.

        An answer needs no such look: one that the kernel takes proves that the task waited all along.
        """
        if seccomp.still_valid(pending.gated.listener, pending.ident):
            return True
        self._inflight.clear(pending.slot)
        return False

    # --- the answers ------------------------------------------------------------------------------

    def _allow(self, pending: Pending, granted: Granted | None) -> None:
        gated = pending.gated
        layer = self._last_word.layer
        # complain mode lets go on what it would deny: a look could not tell that from a race
        verifying = self.settings.mode is Mode.ENFORCE and not (layer.active and pending.attempt.final.is_unique)
        try:
            if self.place is not None:
                pending.before()  # watched: its program may be a file of a file system of the user's own
                outer = self._guard.rest()
                try:
                    self.place(pending, granted)
                finally:
                    self._guard.resume(outer)
            look = self._before(pending, granted) if verifying else None
        except PersonaError as error:
            reason = error.code if isinstance(error.code, Reason) else Reason.ENFORCEMENT_FAILED
            self._deny(pending, Denied(reason, help=error.message))
            return
        except OSError:  # killed while it waited, or no descriptor left: never leave it waiting
            self._fail(gated, pending.ident, pending.slot, errno.EACCES)
            return
        if layer.active:
            arguments = pending.hangs_on_arguments(granted)
            layer.approve(pending.task.tid, gated.session.uid, pending.attempt, arguments=arguments)
        if not self._go_on(gated, pending.ident, pending.slot):
            layer.withdraw(pending.task.tid)
            if look is not None:
                look[0].close()
            return  # what was read may have been another task's
        if look is not None:
            self.verifier.expect(*look, gated.session, lambda found: self._caught(pending, found))
        if granted is not None:
            gated.last = granted
        self.notes.add(pending, "exec", granted)

    def _before(self, pending: Pending, granted: Granted | None) -> tuple[Process, Expectation]:
        """The waiting process, held, and what it must be once it goes on.  Raises ``OSError`` when it is gone."""
        attempt, task = pending.attempt, pending.task
        before = pending.before()
        argv = argv_before = None
        if attempt.complete and pending.hangs_on_arguments(granted):
            argv = b"".join(argument + b"\0" for argument in attempt.final_argv)
            argv_before = task.command_line(65536) if before == attempt.final else None
        return Process(task), Expectation(before, attempt.final, argv, argv_before)

    def _deny(self, pending: Pending, denied: Denied) -> None:
        if not self._still_waits(pending):
            return
        gated = pending.gated
        complain = self.settings.mode is Mode.COMPLAIN
        self.notes.add(pending, "exec", denied)
        if complain:
            self._last_word.layer.approve(pending.task.tid, gated.session.uid, pending.attempt, arguments=False)
            self._go_on(gated, pending.ident, pending.slot)
        else:
            if self._may_speak(gated):
                name = shown_name(pending.attempt.path, pending.attempt.argv)
                with contextlib.suppress(OSError):  # killed meanwhile: nobody is there to be told
                    tell(pending.task.credentials().tgid, denial_line(name, denied))
            self._fail(gated, pending.ident, pending.slot, errno.EACCES)

    def _go_on(self, gated: Gated, ident: int, slot: int) -> bool:
        alive = seccomp.respond_continue(gated.listener, ident)
        self._inflight.clear(slot)
        return alive

    def _fail(self, gated: Gated, ident: int, slot: int, number: int) -> None:
        seccomp.respond_error(gated.listener, ident, number)
        self._inflight.clear(slot)

    def _caught(self, pending: Pending, found: str) -> None:
        denied = Denied(Reason.PROGRAM_NOT_TRUSTED, help=f"killed: what started was {found}")
        self.notes.add(pending, "killed", denied)

    def _may_speak(self, gated: Gated) -> bool:
        second = int(time.monotonic())
        if gated.lines_at != second:
            gated.lines_at, gated.lines = second, 0
        gated.lines += 1
        return gated.lines <= _LINES_PER_SECOND


def _shells_of(session: Session) -> tuple[Image, ...]:
    paths = dict.fromkeys((session.shell, real_shell(session.subject.user, session.shell)))
    return tuple(image for image in map(image_of, paths) if image is not None)


def untrusted(found: Identified) -> Denied:
    """Why a program cannot be on any whitelist, whatever it says."""
    if not found.visible:
        why = "it is not a file of this machine that a whitelist could name"
    else:
        why = f"others than root could change {found.program.path}, so no whitelist can vouch for it"
    return Denied(Reason.PROGRAM_NOT_TRUSTED, help=why)
