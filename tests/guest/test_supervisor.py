"""The supervisor's own promise: whatever goes wrong while an exec is judged, it is answered, with a denial."""

import ctypes
import os
from collections.abc import Callable

import pytest
from persona_guest.core.leases import LeaseBook
from persona_guest.core.sessions import Session
from persona_guest.gate import attempt
from persona_guest.gate.guard import Guard
from persona_guest.gate.identity import Identifier
from persona_guest.gate.inflight import InFlight
from persona_guest.gate.kernel_layer import LastWord
from persona_guest.gate.pending import Pending
from persona_guest.gate.supervisor import Place, Supervisor
from persona_guest.kernel import seccomp
from persona_guest.kernel.task import Task
from persona_guest.loop import Loop
from persona_guest.settings import Mode, Paths, Settings

from persona.decisions import Decision, Granted, Lease, PersonaRef, Request, Subject, Width


def gated_child(program: str) -> tuple[int, int]:
    """A child that puts the filter on itself and execs, its exit code the errno: (pid, its listener)."""
    parent, child = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        seccomp.set_no_new_privs()
        own = seccomp.install_listener(seccomp.gate_filter())
        os.write(child[1], str(own).encode())
        os.read(parent[0], 1)
        os.close(own)
        try:
            os.execv(program, [program])
        except OSError as error:
            os._exit(error.errno or 1)
    number = int(os.read(child[0], 16))
    pidfd = os.pidfd_open(pid)
    listener: int = ctypes.CDLL(None).syscall(438, pidfd, number, 0)
    os.write(parent[1], b"x")
    os.close(pidfd)
    return pid, listener


def supervise(
    listener: int, decide: Callable[[Request], Decision], place: Place | None = None, guard: Guard | None = None
) -> None:
    loop = Loop()

    def ask(request: Request, done: Callable[[Decision], None]) -> None:
        loop.deliver(lambda: done(decide(request)))  # later, as the broker answers

    settings = Settings(mode=Mode.ENFORCE, paths=Paths(bpf_dir=""))
    supervisor = Supervisor(
        settings, loop, Identifier(Settings().gate), LeaseBook(), InFlight(),
        guard or Guard(lambda: None), LastWord(settings, loop, lambda event: None), ask,
        lambda record: None, lambda session: loop.stop(),
    )  # fmt: skip
    supervisor.place = place
    session = Session("s-1", Subject("u", (), "vm"), os.getuid(), "t", "", "/nonexistent", os.getpid(), None, 0)
    supervisor.add(session, listener)
    loop.call_later(10, loop.stop)
    loop.run()


def granted(_request: Request) -> Decision:
    return Granted(PersonaRef("A", 1), "p", Lease(1, Width.PROGRAM))


def outcome(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_granted() -> None:
    pid, listener = gated_child("/usr/bin/true")
    supervise(listener, granted)
    assert outcome(pid) == 0


def test_an_error_while_judging_is_a_denial(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("unforeseen")

    monkeypatch.setattr(attempt, "read", broken)
    pid, listener = gated_child("/usr/bin/true")
    supervise(listener, granted)
    assert outcome(pid) == 13


def test_an_error_after_the_broker_s_answer_is_a_denial_and_the_agent_goes_on() -> None:
    def broken(*_: object) -> None:
        raise KeyError("unforeseen")

    pid, listener = gated_child("/usr/bin/true")
    supervise(listener, granted, broken)
    assert outcome(pid) == 13


def test_a_program_is_looked_at_while_the_guard_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    guard, running = Guard(lambda: None), Task.running
    watched: list[bool] = []  # at each look at the program of a task, which may lie on its user's own file system

    def looked(task: Task) -> tuple[int, int]:
        watched.append(guard._entered is not None)
        return running(task)

    def place(pending: Pending, _granted: Granted | None) -> None:
        assert guard._entered is None
        pending.before()

    monkeypatch.setattr(Task, "running", looked)
    pid, listener = gated_child("/usr/bin/true")
    supervise(listener, granted, place, guard)
    assert outcome(pid) == 0
    assert watched
    assert all(watched)


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
