"""The supervisor's own promise: whatever goes wrong while an exec is judged, it is answered, with a denial."""

import ctypes
import errno
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from persona_guest.core.denials import Book
from persona_guest.core.leases import LeaseBook
from persona_guest.core.masks import Masks
from persona_guest.gate import implicit_allow
from persona_guest.gate.hang_watchdog import INTERRUPT, HangWatchdog
from persona_guest.gate.inflight import InFlight
from persona_guest.gate.notes import Notes
from persona_guest.gate.parts import AskBroker, DecisionParts, RecordParts, StartParts, WaitingParts
from persona_guest.gate.pending import Pending
from persona_guest.gate.placing import NoPlacing
from persona_guest.gate.post_exec_check import Wrong
from persona_guest.gate.supervisor import Supervisor
from persona_guest.gate.waiting import Waiting
from persona_guest.kernel import seccomp
from persona_guest.kernel.task import Task
from persona_guest.loop import Loop
from persona_guest.lsm.layer import KernelLayer
from persona_guest.program import exec_request
from persona_guest.program.identity import Identifier, image_of
from persona_guest.session.model import Login, Session, State
from persona_guest.session.registry import Registry
from persona_guest.settings import Gate, Mode, Paths, Settings

from persona.decisions import Decision, Denied, Granted, Lease, PersonaRef, Request, Subject, Width
from persona.problems import Reason
from persona.record_codec import Record


def gated_child(program: str, uid: int = 0) -> tuple[int, int]:
    """A child that puts the filter on itself and execs, its exit code the errno: (pid, its listener).

    It becomes ``uid`` before, where that is not 0.
    """
    parent, child = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        seccomp.set_no_new_privs()
        own = seccomp.install_listener(seccomp.gate_filter())
        os.write(child[1], str(own).encode())
        os.read(parent[0], 1)
        os.close(own)
        if uid:
            os.setgid(uid)
            os.setuid(uid)
        try:
            os.execv(program, [program])
        except OSError as error:
            os._exit(error.errno or 1)
    number = int(os.read(child[0], 16))
    pidfd = os.pidfd_open(pid)
    listener: int = ctypes.CDLL(None).syscall(438, pidfd, number, 0)
    os.write(parent[1], b"x")
    for fd in (pidfd, *parent, *child):
        os.close(fd)
    return pid, listener


class Placing(NoPlacing):
    """A fake, which places by a function."""

    def __init__(self, place: Callable[[Pending, Granted | None], None]) -> None:
        self._place = place

    def read_task(self, pending: Pending) -> None:
        pending.before()

    def place(self, pending: Pending, granted: Granted | None) -> None:
        self._place(pending, granted)


@dataclass
class Supervised:
    """A session, and what answers for it."""

    supervisor: Supervisor
    registry: Registry
    denials: Book
    loop: Loop
    session: Session


def supervised(
    listener: int,
    ask: AskBroker,
    place: Callable[[Pending, Granted | None], None] = lambda _pending, _granted: None,
    hang_watchdog: HangWatchdog | None = None,
    *,
    shell: str = "/nonexistent",
    uid: int | None = None,
    home: str = "",
    record: Callable[[Record], None] = lambda _record: None,
    gate: Gate | None = None,
    fresh: bool = False,
    unrecordable: Denied | None = None,
    loop: Loop | None = None,
) -> Supervised:
    """A session that is gated, and what answers for it once ``loop`` runs."""
    loop = loop or Loop()
    settings = Settings(mode=Mode.ENFORCE, paths=Paths(bpf_dir=""), gate=gate or Gate())
    hang_watchdog, denials = hang_watchdog or HangWatchdog(lambda: None), Book()
    registry = Registry(Path("/nonexistent"))
    supervisor = Supervisor(
        settings,
        loop,
        registry,
        DecisionParts(Identifier(Settings().gate), LeaseBook(), ask, lambda asked: home if asked == uid else ""),
        WaitingParts(InFlight(), Waiting(hang_watchdog), hang_watchdog),
        StartParts(Placing(place), KernelLayer(settings, loop, lambda event: None)),
        RecordParts(
            Notes(loop, record, denials, Masks(), complain=False),
            lambda user: unrecordable if user == "u" else None,
        ),
    )
    owner = os.getuid() if uid is None else uid
    session = Session("s-1", Subject("u", (), "vm"), owner, "t", "", shell, os.getpid(), None, 0)
    login = registry.open(session)
    login.listener, login.state = listener, State.GATED
    supervisor.answer_for(login, fresh=fresh)
    return Supervised(supervisor, registry, denials, loop, session)


def supervise(
    listener: int,
    decide: Callable[[Request], Decision],
    place: Callable[[Pending, Granted | None], None] = lambda _pending, _granted: None,
    hang_watchdog: HangWatchdog | None = None,
    *,
    before: Callable[[Session], None] = lambda _session: None,
    **more: Any,
) -> Supervised:
    """Until the session has ended.  ``before`` is called once it has begun, and the program starts after it."""
    loop = Loop()

    def ask(request: Request, done: Callable[[Decision], None]) -> None:
        loop.call_soon_threadsafe(lambda: done(decide(request)))  # later, as the broker answers

    site = supervised(listener, ask, place, hang_watchdog, loop=loop, **more)
    site.registry.at_end(lambda _login: loop.stop())
    before(site.session)
    loop.call_later(10, loop.stop)
    loop.run()
    loop.run_until(lambda: not site.supervisor.verifier._open, 5)  # what was started has been looked at, or is gone
    site.supervisor.notes.flush()
    return site


def granted(_request: Request) -> Decision:
    return Granted(PersonaRef("A", 1), "p", Lease(1, Width.PROGRAM))


def outcome(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_granted() -> None:
    pid, listener = gated_child("/usr/bin/true")
    supervise(listener, granted)
    assert outcome(pid) == 0


def denied(_request: Request) -> Decision:
    return Denied(Reason.NO_MATCHING_POLICY)


def test_what_could_not_be_recorded_does_not_start() -> None:
    records: list[Record] = []
    pid, listener = gated_child("/usr/bin/true")
    full = Denied(Reason.AUDIT_FULL, help="no room")
    supervisor = supervise(listener, granted, record=records.append, unrecordable=full)
    assert outcome(pid) == errno.EACCES
    assert [(record.decision, record.reason) for record in records] == [("denied", Reason.AUDIT_FULL)]
    assert [denial.reason for denial in supervisor.denials.of(os.getuid())] == [Reason.AUDIT_FULL]


@pytest.mark.parametrize("upgraded", [False, True])
def test_the_login_shell_is_what_lies_at_its_path(upgraded: bool) -> None:
    """By its number alone, a file that got it later would be the shell, and an upgraded shell would be none."""
    with tempfile.TemporaryDirectory(dir=Path.home(), prefix="shell-") as name:
        Path(name).chmod(0o755)
        shell, kept = f"{name}/shell", f"{name}/kept"
        shutil.copy("/usr/bin/true", shell)

        def upgrade(_session: Session) -> None:
            os.rename(shell, kept)
            shutil.copy("/usr/bin/true", shell)

        pid, listener = gated_child(shell if upgraded else kept)
        supervise(listener, denied, shell=shell, before=upgrade)
        assert outcome(pid) == (0 if upgraded else 13)


@pytest.mark.parametrize("fresh", [True, False])
def test_the_user_s_own_command_waits_for_no_broker_where_the_session_is_known_to_hold(fresh: bool) -> None:
    """Otherwise it is asked for: the session may have been revoked."""
    asked: list[Request] = []

    def away(request: Request) -> Decision:
        asked.append(request)
        return Denied(Reason.BROKER_UNREACHABLE)

    pid, listener = gated_child("/usr/bin/true")
    supervise(listener, away, gate=Gate(user_command="/usr/bin/true"), fresh=fresh)
    assert outcome(pid) == 0
    assert bool(asked) is not fresh


def test_the_user_s_own_command_does_not_start_in_a_revoked_session() -> None:
    pid, listener = gated_child("/usr/bin/true")
    gate = Gate(user_command="/usr/bin/true")
    supervise(listener, lambda _request: Denied(Reason.SESSION_REVOKED), gate=gate)
    assert outcome(pid) == 13


def test_an_error_while_judging_is_a_denial(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("unforeseen")

    monkeypatch.setattr(exec_request, "read", broken)
    pid, listener = gated_child("/usr/bin/true")
    records: list[Record] = []
    site = supervise(listener, granted, record=records.append)
    assert outcome(pid) == 13
    seen = [(record.program, record.decision, record.reason) for record in records]
    assert seen == [("unknown", "denied", Reason.PROGRAM_UNREADABLE)]
    assert [one.reason for one in site.denials.of(os.getuid())] == [Reason.PROGRAM_UNREADABLE]


def test_what_runs_in_the_place_of_what_was_allowed_is_what_the_record_names() -> None:
    """As after a race that was won: the look after the start finds another file."""
    pid, listener = gated_child("/usr/bin/true")
    records: list[Record] = []
    supervisor = supervise(listener, granted, record=records.append).supervisor
    assert outcome(pid) == 0
    pending = Pending(a_login(), 0, 0, Task(os.getpid()), look_at("/usr/bin/true"))
    ran = image_of("/usr/bin/sleep")
    supervisor._caught(pending, Wrong("another program", ran, (b"sleep", b"60")))
    supervisor.notes.flush()
    assert [(record.event, record.program, record.argv) for record in records[-1:]] == [
        ("killed", "/usr/bin/sleep", ("sleep", "60"))
    ]


def a_login() -> Login:
    session = Session("s-1", Subject("u", (), "vm"), os.getuid(), "t", "", "/bin/sh", os.getpid(), None, 0)
    return Login(session, State.GATED)


def look_at(path: str) -> exec_request.ExecRequest:
    found = os.open(path, os.O_PATH)
    return exec_request.request_for(
        Task(os.getpid()), found, path.encode(), (path.encode(),), Identifier(Settings().gate)
    )


def test_an_error_after_the_broker_s_answer_is_a_denial_and_the_agent_goes_on() -> None:
    def broken(*_: object) -> None:
        raise KeyError("unforeseen")

    pid, listener = gated_child("/usr/bin/true")
    supervise(listener, granted, broken)
    assert outcome(pid) == 13


def test_a_program_is_looked_at_while_the_guard_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    hang_watchdog, running = HangWatchdog(lambda: None), Task.running
    watched: list[bool] = []  # at each look at the program of a task, which may lie on its user's own file system

    def looked(task: Task) -> tuple[int, int]:
        watched.append(hang_watchdog._entered is not None)
        return running(task)

    def place(pending: Pending, _granted: Granted | None) -> None:
        assert hang_watchdog._entered is None
        pending.before()

    monkeypatch.setattr(Task, "running", looked)
    pid, listener = gated_child("/usr/bin/true")
    supervise(listener, granted, place, hang_watchdog)
    assert outcome(pid) == 0
    assert watched
    assert all(watched)


def test_who_reads_a_listener_that_was_handed_over_does_not_hold_the_agent_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the agent was woken for is taken by another; its own receipt would wait for the next, for ever."""
    nobody = 54_322
    child, listener = gated_child("/usr/bin/true")
    thief = os.dup(listener)
    receive = seccomp.receive

    def late(fd: int, buffer: bytearray) -> seccomp.Notification | None:
        taken = receive(thief, bytearray(seccomp.NOTIF_SIZE))
        assert taken is not None
        monkeypatch.setattr(seccomp, "receive", receive)
        return receive(fd, buffer)

    monkeypatch.setattr(seccomp, "receive", late)
    before = signal.signal(INTERRUPT, lambda _number, _frame: None)
    began = time.monotonic()
    try:
        site = supervise(listener, granted, hang_watchdog=HangWatchdog(lambda: None, 0.3), uid=nobody)
    finally:
        signal.signal(INTERRUPT, before)
        os.close(thief)
    assert time.monotonic() - began < 8
    assert site.registry.ids() == []
    assert outcome(child) == errno.ENOSYS  # nobody is left who could answer it


@pytest.mark.parametrize("apart", [False, True])
def test_what_left_the_service_s_cgroup_is_not_the_service_s_own(monkeypatch: pytest.MonkeyPatch, apart: bool) -> None:
    """A sibling of the session's first process (CLONE_PARENT) is a child of the monitor, too."""
    child = os.fork()
    if child == 0:
        signal.pause()
    monkeypatch.setattr(implicit_allow, "cgroup_of", lambda pid: "place" if apart and pid == child else "service")
    session = Session(
        "s-1", Subject("u", (), "vm"), 1000, "cron", "", "", os.getpid(), None, 0, Task(os.getpid()).started()
    )
    try:
        assert implicit_allow._is_services_own(Mock(foreign=None), session, Task(child)) is not apart
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_slot_that_is_cleared_twice_is_free_once() -> None:
    table = InFlight()
    slot = table.put(b"s-1", bytes(seccomp.NOTIF_SIZE))
    table.clear(slot)
    table.clear(slot)
    assert table.put(b"s-1", bytes(seccomp.NOTIF_SIZE)) != table.put(b"s-2", bytes(seccomp.NOTIF_SIZE))


def test_no_descriptor_left_is_a_denial(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(_tid: int) -> None:
        raise OSError(24, "too many open files")

    monkeypatch.setattr("persona_guest.gate.supervisor.Process", exhausted)
    pid, listener = gated_child("/usr/bin/true")
    supervise(listener, granted)
    assert outcome(pid) == 13


def test_only_a_listener_is_taken_for_one() -> None:
    pid, listener = gated_child("/usr/bin/true")
    assert seccomp.is_listener(listener)
    with open("/dev/null") as null:
        assert not seccomp.is_listener(null.fileno())
    supervise(listener, granted)
    assert outcome(pid) == 0


@pytest.mark.parametrize("what", ["ended", "released"])
def test_an_answer_that_comes_late(what: str) -> None:
    """When the session of an exec that waited has ended, nobody is there; after a release, it goes on."""
    pid, listener = gated_child("/usr/bin/true")
    answers: list[Callable[[], None]] = []
    site = supervised(listener, lambda _request, done: answers.append(lambda: done(denied(_request))))
    site.loop.run_until(lambda: answers, 10)
    if what == "ended":
        (login,) = site.registry.gated()
        os.kill(pid, signal.SIGKILL)
        site.supervisor._end(login)
    else:
        site.supervisor.released = True
    answers.pop()()
    assert outcome(pid) == (-signal.SIGKILL if what == "ended" else 0)
    assert not site.supervisor._waiting._execs
    for login in site.registry.gated():
        site.supervisor._end(login)
