"""Leases are a user's; a session of his that was revoked lives on none of them, and the others on theirs."""

import time
from pathlib import Path

from persona_guest.core.denials import Book
from persona_guest.core.leases import LeaseBook, Question
from persona_guest.core.masks import Masks
from persona_guest.gate.hang_watchdog import HangWatchdog
from persona_guest.gate.inflight import InFlight
from persona_guest.gate.notes import Notes
from persona_guest.gate.parts import DecisionParts, RecordParts, StartParts, WaitingParts
from persona_guest.gate.placing import NoPlacing
from persona_guest.gate.supervisor import Supervisor
from persona_guest.gate.waiting import Waiting
from persona_guest.loop import Loop
from persona_guest.lsm.layer import KernelLayer
from persona_guest.program.identity import Identifier
from persona_guest.session.model import Login, Session, State
from persona_guest.session.registry import Registry
from persona_guest.settings import Mode, Paths, Settings

from persona.decisions import Decision, Denied, Granted, Lease, PersonaRef, Program, Request, Subject, Width
from persona.problems import Reason
from tests.guest.test_supervisor import gated_child, outcome

LEASE = Lease(30, Width.PROGRAM)


class Site:
    """A supervisor with two sessions of one user, and a broker that is a function; a fake."""

    def __init__(self, directory: Path) -> None:
        self.asked: list[str] = []
        self.known: dict[str, Login] = {}
        self.revoked: set[str] = set()
        self.away = False
        self.loop = Loop()
        self.leases = LeaseBook()
        settings = Settings(mode=Mode.ENFORCE, paths=Paths(bpf_dir=""))
        self.registry = Registry(directory / "sessions")
        hang_watchdog = HangWatchdog(lambda: None)
        self.supervisor = Supervisor(
            settings,
            self.loop,
            self.registry,
            DecisionParts(Identifier(Settings().gate), self.leases, self._ask),
            WaitingParts(InFlight(), Waiting(hang_watchdog), hang_watchdog),
            StartParts(NoPlacing(), KernelLayer(settings, self.loop, lambda event: None)),
            RecordParts(Notes(self.loop, lambda record: None, Book(), Masks(), complain=False)),
        )

    def _ask(self, request: Request, done: object) -> None:
        self.asked.append(request.session)
        generation = self.leases.generation
        decision: Decision = Granted(PersonaRef("A", 1), "p", LEASE, generation)
        if self.away:
            decision = Denied(Reason.BROKER_UNREACHABLE)
        elif request.session in self.revoked:
            decision = Denied(Reason.SESSION_REVOKED, lease=LEASE, generation=generation)
        assert callable(done)
        done(decision)

    def run(
        self, ident: str, program: str = "/usr/bin/true", *, fresh: bool = False, login_shell: str = "/nonexistent"
    ) -> int:
        """What an exec in a session that begins now, under an id that may have been there, comes to."""
        pid, listener = gated_child(program)
        session = Session(ident, Subject("u", (), "vm"), 1234, "t", "", login_shell, 1, None, time.time())
        now, known = self.registry.open(session), self.known.get(ident)
        now.listener, now.state = listener, State.GATED
        self.supervisor.answer_for(now, fresh=fresh)
        if known is not None:
            now.confirmed, now.revoked = known.confirmed, known.revoked
        self.known[ident] = now
        self.loop.call_later(0.5, self.loop.stop)
        self.loop.run()
        return outcome(pid)


def test_a_revoked_session_has_nothing_of_its_sibling_and_does_it_no_harm(tmp_path: Path) -> None:
    site = Site(tmp_path)
    assert site.run("s-a", fresh=True) == 0
    assert site.run("s-b", fresh=True) == 0
    assert site.asked == ["s-a"]  # one lease for both
    site.revoked.add("s-b")
    site.leases.advance(1)
    assert site.run("s-a") == 0
    assert site.run("s-b") == 13  # though its sibling's lease says that it may
    assert site.run("s-b") == 13
    assert site.run("s-a") == 0  # though its sibling was refused
    assert site.asked == ["s-a", "s-a", "s-b"]
    site.revoked.clear()
    site.leases.advance(2)
    assert site.run("s-b") == 0


def test_while_nobody_answers_a_session_goes_on_by_its_leases(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.leases.advance(5)
    assert site.run("s-a", fresh=True) == 0
    site.away = True
    assert site.run("s-a", "/usr/bin/id") == 13
    assert site.run("s-a") == 0
    site.leases.advance(6)  # the last that was heard: the lease is over
    assert site.run("s-a") == 13


def test_a_revoked_session_starts_no_shell_either(tmp_path: Path) -> None:
    site = Site(tmp_path)
    assert site.run("s-a", "/usr/bin/dash", fresh=True, login_shell="/usr/bin/dash") == 0
    assert site.asked == []  # admission is a shell
    site.revoked.add("s-a")
    site.leases.advance(1)
    assert site.run("s-a", "/usr/bin/dash", login_shell="/usr/bin/dash") == 13  # asked, for it may have been revoked
    assert site.run("s-a", "/usr/bin/dash", login_shell="/usr/bin/dash") == 13
    site.away = True
    site.leases.advance(2)
    assert site.run("s-b", "/usr/bin/dash", login_shell="/usr/bin/dash") == 0  # nobody said that this one was


def test_what_an_older_broker_is_not_asked_does_not_make_a_session_hold_again(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.revoked.add("s-a")
    site.leases.advance(1)
    assert site.run("s-a") == 13
    login = site.known["s-a"]
    site.leases.advance(2)
    tool = Program("/home/u/tool", (), ("/home/u/tool",), home="tool")
    question = Question(login.holder, 1, b"tool", (b"tool",), True, tool)
    unasked = Denied(Reason.PROGRAM_NOT_TRUSTED)  # as it is of a broker of 0.1.0
    site.supervisor._broker_answered(login, question, unasked)
    assert login.revoked is not None
    site.away = True
    assert site.run("s-a", "/usr/bin/dash", login_shell="/usr/bin/dash") == 13
