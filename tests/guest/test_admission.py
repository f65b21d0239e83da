"""Who is let in: every answer of the broker's, and its absence, met in both modes."""

import errno
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from persona_guest.agent.requests import Users
from persona_guest.audit.logins import Logins
from persona_guest.broker.client import BrokerClient
from persona_guest.broker.documents import Personas
from persona_guest.broker.http import BrokerError
from persona_guest.broker.pool import Answer, Outcome
from persona_guest.core.denials import Book
from persona_guest.core.leases import LeaseBook
from persona_guest.core.pam_protocol import Caller, PamVerdict
from persona_guest.ipc.users import Call
from persona_guest.kernel import seccomp
from persona_guest.login.admission import Admission
from persona_guest.login.opening import Openings
from persona_guest.loop import Loop
from persona_guest.lsm.landlock_fallback import Fallback
from persona_guest.reassign.reevaluate import Reevaluator
from persona_guest.session.model import Admitted
from persona_guest.session.registry import Registry
from persona_guest.settings import Gate, Mode, Settings

from persona.codec import encode_decision
from persona.decisions import Denied, PersonaRef
from persona.problems import PersonaError, Reason
from persona.record_codec import Record
from tests.guest.conftest import SmallDisk

ALICE = Caller(1000, "sshd", "alice", "far", "/bin/bash", ("staff",))
WORK = {"kind": "Persona", "name": "Work", "command_whitelist": ["ls"]}
YES = Answer(200, {"admitted": True, "persona": {"name": "Work", "version": 1}, "policy": "work"})
NO = Answer(200, {"admitted": False, "denied": encode_decision(Denied(Reason.NO_MATCHING_POLICY))})
AWAY = BrokerError(Reason.BROKER_UNREACHABLE, "it is off")


class Link:
    """A fake link: answers by path, at once or when it is told to."""

    def __init__(self) -> None:
        self.answers: dict[str, Outcome] = {}
        self.asked: list[str] = []
        self.held: list[Callable[[], None]] = []
        self.hold = False

    def post(
        self, _who: str, method: str, path: str, _body: Any, done: Callable[[Outcome], None], *, urgent: bool = True
    ) -> None:
        head = path.partition("/s-")[0]
        self.asked.append(f"{method} {head}")
        if (outcome := self.answers.get(f"{method} {head}")) is not None:
            self.held.append(lambda: done(outcome))
            if not self.hold:
                self.held.pop()()


class Site:
    """A door with real sessions, leases and documents behind it."""

    def __init__(self, directory: Path, mode: Mode = Mode.ENFORCE, **gate: Any) -> None:
        settings = replace(Settings(), mode=mode, gate=replace(Gate(), **gate))
        self.settings = settings
        self.link = Link()
        self.records: list[Record] = []
        self.leases = LeaseBook()
        self.registry = Registry(directory / "sessions")
        self.broker_client = BrokerClient(self.link, self.leases, self.registry.subject_of)  # type: ignore[arg-type]  # a fake
        self.broker_client.streaming = True
        self.supervisor = Mock()
        self.denials = Book()
        self.user_rules = Mock()
        note = Logins(self.records.append, complain=mode is Mode.COMPLAIN)  # type: ignore[arg-type]  # ready ones only
        kernel_layer = Mock(layer=Mock(active=False, why="not here"))
        fallback = Fallback(settings, kernel_layer)
        self.personas = Personas(directory / "personas", self.broker_client.persona)
        self.exempted: list[int] = []
        self.excluded_s = 0.0
        self.began: list[str] = []
        admission = Admission(
            settings, kernel_layer, fallback, self.broker_client, self.personas, self.denials, note,
            lambda _uid: self.excluded_s, self.exempted.append,
        )  # fmt: skip
        self.openings = Openings(
            settings, self.registry, self.supervisor, Mock(), admission, self.user_rules, fallback, self.leases,
            self.broker_client, lambda _session, _reader: "hello", self.began.append,
        )  # fmt: skip
        self.registry.at_end(self.user_rules.ended, self.broker_client.ended, note.ended)
        self.answered: list[tuple[PamVerdict, str]] = []
        self.link.answers = {
            "POST /v1/admissions": YES,
            "POST /v1/sessions": YES,
            "DELETE /v1/sessions": Answer(204, None),
            "GET /v1/personas/Work/versions/1": Answer(200, {"version": 1, "document": WORK}),
        }

    def reply(self, packet: bytes, fd: int | None = None) -> None:
        self.answered.append((PamVerdict(packet[4]), packet[8:].split(b"\0")[-2].decode(errors="replace")))

    def account(self, caller: Caller = ALICE) -> PamVerdict:
        self.openings.account(caller, os.getpid(), self.reply)
        return self.answered[-1][0]

    def open(self, caller: Caller = ALICE) -> str | None:
        return self.openings.open(caller, os.getpid(), self.reply)

    @property
    def verdict(self) -> PamVerdict:
        return self.answered[-1][0]

    def events(self) -> list[tuple[str, str]]:
        return [(record.event, record.decision) for record in self.records]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_one_login_asks_once_and_is_announced(site: Site) -> None:
    assert site.account() is PamVerdict.PASS
    session = site.open()
    assert site.verdict is PamVerdict.GATE
    assert site.link.asked == ["POST /v1/admissions", "GET /v1/personas/Work/versions/1", "POST /v1/sessions"]
    assert site.began == [session]
    assert site.events() == [("admission", "granted")]
    site.user_rules.opened.assert_called_once()


@pytest.mark.parametrize("overtaken", ["by an event", "by a lost stream", "by a second login"])
def test_an_admission_counts_once_and_only_while_nothing_has_changed(site: Site, overtaken: str) -> None:
    site.account()
    if overtaken == "by an event":
        site.leases.advance(8)
    elif overtaken == "by a lost stream":
        site.broker_client.streaming = False
    else:
        site.open()
    site.link.answers["POST /v1/sessions"] = NO
    site.open()
    assert site.verdict is PamVerdict.DENY


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (NO, Reason.NO_MATCHING_POLICY),
        (AWAY, Reason.BROKER_UNREACHABLE),
        (Answer(200, {"admitted": "yes"}), Reason.BROKER_MISBEHAVED),
        (Answer(500, None), Reason.BROKER_MISBEHAVED),
    ],
)
def test_without_a_yes_nobody_comes_in(site: Site, outcome: Outcome, code: Reason) -> None:
    site.link.answers |= {"POST /v1/admissions": outcome, "POST /v1/sessions": outcome}
    assert site.account() is PamVerdict.DENY
    site.open()
    assert site.verdict is PamVerdict.DENY
    assert str(code) in site.answered[-1][1]
    assert [record.reason for record in site.records] == [code, code]
    told = [(one.event, one.command, one.reason) for one in site.denials.of(ALICE.uid)]
    assert told == [("admission", "a login by sshd", code)]
    site.user_rules.opened.assert_not_called()


def test_who_made_the_gate_wait_stays_out_for_a_while(site: Site) -> None:
    site.excluded_s = 7.0
    assert site.account() is PamVerdict.DENY
    assert site.open() is not None
    assert (site.verdict, "refused for 7 s more" in site.answered[-1][1]) == (PamVerdict.DENY, True)
    assert "POST /v1/sessions" not in site.link.asked
    site.excluded_s = 0.0
    site.open()
    assert site.verdict is PamVerdict.GATE


def test_without_the_persona_s_document_nobody_comes_in_and_the_broker_hears_so(site: Site) -> None:
    site.link.answers["GET /v1/personas/Work/versions/1"] = AWAY
    site.open()
    assert site.verdict is PamVerdict.DENY
    assert site.link.asked[-1] == "DELETE /v1/sessions"


def test_what_cannot_be_bound_does_not_begin(site: Site) -> None:
    site.user_rules.opened.side_effect = OSError("no nftables")
    session = site.open()
    assert site.verdict is PamVerdict.DENY
    assert site.link.asked[-1] == "DELETE /v1/sessions"
    assert site.began == []
    assert [call.args[0].session.id for call in site.user_rules.ended.call_args_list] == [session]


def test_an_opener_that_goes_before_the_answer_leaves_nothing(site: Site) -> None:
    site.link.hold = True
    session = site.open()
    assert session is not None
    site.openings.abandoned(session)
    while site.link.held:
        site.link.held.pop(0)()
    assert site.answered == []
    assert site.link.asked[-1] == "DELETE /v1/sessions"
    site.user_rules.opened.assert_not_called()


def test_complain_mode_lets_everybody_in_and_says_who_would_not_have_been(tmp_path: Path) -> None:
    site = Site(tmp_path, Mode.COMPLAIN)
    site.link.answers |= {"POST /v1/admissions": NO, "POST /v1/sessions": NO}
    assert site.account() is PamVerdict.PASS
    site.open()
    assert site.verdict is PamVerdict.GATE
    assert [(record.decision, record.complain) for record in site.records] == [("denied", True)]
    assert site.denials.of(ALICE.uid) == ()


@pytest.mark.parametrize("what", ["its network", "its landlock", "too many sessions"])
def test_complain_mode_lets_in_whom_it_cannot_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    site = Site(tmp_path, Mode.COMPLAIN)
    full = OSError(errno.ENOSPC, "full")
    if what == "its network":
        site.user_rules.opened.side_effect = full
    elif what == "its landlock":
        monkeypatch.setattr(Fallback, "ruleset", Mock(side_effect=full))
    else:
        monkeypatch.setattr(site.registry, "is_full", lambda _uid: True)
    site.open()
    assert site.verdict is PamVerdict.PASS
    if what == "its network":
        answers: list[dict[str, Any]] = []
        site.openings.open_from_shell(ALICE, os.getpid(), answers.append)
        assert answers == [{"ok": True, "verdict": "pass", "greeting": None}]


def test_complain_mode_announces_a_session_when_the_broker_is_back(tmp_path: Path) -> None:
    site = Site(tmp_path, Mode.COMPLAIN)
    site.link.answers["POST /v1/sessions"] = AWAY
    session = site.open()
    assert site.verdict is PamVerdict.GATE
    site.openings.announce_again()
    assert site.began == []
    site.link.answers["POST /v1/sessions"] = YES
    site.openings.announce_again()
    assert site.began == [session]
    site.openings.announce_again()
    assert site.began == [session]


@pytest.mark.parametrize(
    ("caller", "events"),
    [
        (ALICE._replace(uid=0, user="root"), []),
        (ALICE._replace(uid=33, user="www-data"), []),
        (ALICE._replace(groups=("persona-break-glass",)), [("break_glass", "granted")]),
    ],
)
def test_who_is_exempt_passes_without_a_question(site: Site, caller: Caller, events: list[tuple[str, str]]) -> None:
    assert site.account(caller) is PamVerdict.PASS
    assert site.open(caller) is None
    assert site.verdict is PamVerdict.PASS
    assert site.link.asked == []
    assert site.events() == events
    assert bool(site.exempted) == bool(events)


def test_a_demanded_kernel_layer_that_is_missing_keeps_everybody_out(tmp_path: Path) -> None:
    site = Site(tmp_path, require_kernel_layer=True)
    assert site.account() is PamVerdict.DENY
    site.open()
    assert site.verdict is PamVerdict.DENY
    assert str(Reason.KERNEL_LAYER_MISSING) in site.answered[-1][1]


def test_a_listener_is_taken_once_and_only_of_who_was_admitted(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "is_listener", lambda _fd: True)
    session = site.open()
    assert session is not None
    for name, verdict in ((session, PamVerdict.DONE), (session, PamVerdict.DENY), ("s-other", PamVerdict.DENY)):
        fd, other = os.pipe()
        os.close(other)
        site.openings.listener(name, fd, site.reply)
        assert site.verdict is verdict
        if verdict is PamVerdict.DENY:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.close(fd)
        else:
            os.close(fd)
    site.supervisor.answer_for.assert_called_once()


def test_what_is_no_listener_ends_what_had_begun(site: Site) -> None:
    session = site.open()
    assert session is not None
    fd, other = os.pipe()
    os.close(other)
    with pytest.raises(PersonaError, match="not a seccomp listener"):
        site.openings.listener_from_shell(session, fd)
    assert site.link.asked[-1] == "DELETE /v1/sessions"
    assert [call.args[0].session.id for call in site.user_rules.ended.call_args_list] == [session]
    site.supervisor.answer_for.assert_not_called()


def test_a_session_that_cannot_be_kept_does_not_begin_and_hangs_nobody(
    small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seccomp, "is_listener", lambda _fd: True)
    site = Site(small_disk.path)
    session = site.open()
    assert session is not None
    small_disk.fill()
    fd, other = os.pipe()
    os.close(other)
    site.openings.listener(session, fd, site.reply)
    assert site.verdict is PamVerdict.DENY
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(fd)
    assert site.link.asked[-1] == "DELETE /v1/sessions"
    assert [call.args[0].session.id for call in site.user_rules.ended.call_args_list] == [session]
    site.supervisor.answer_for.assert_not_called()


def test_in_complain_mode_a_session_that_cannot_be_kept_goes_on_and_is_kept_later(
    small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seccomp, "is_listener", lambda _fd: True)
    site = Site(small_disk.path, Mode.COMPLAIN)
    session = site.open()
    assert session is not None
    small_disk.fill()
    fd, other = os.pipe()
    os.close(other)
    site.openings.listener(session, fd, site.reply)
    assert site.verdict is PamVerdict.DONE
    site.supervisor.answer_for.assert_called_once()
    site.registry.save_again()
    kept = small_disk.path / "sessions" / f"{session}.json"
    assert not kept.exists()
    small_disk.empty()
    site.registry.save_again()
    assert json.loads(kept.read_text())["session"]["id"] == session
    os.close(fd)


def test_a_session_that_opens_is_among_those_that_there_are(site: Site) -> None:
    site.link.hold = True
    session = site.open()
    assert site.link.asked == ["POST /v1/sessions"]  # and its answer is not here yet
    assert site.registry.ids() == [session]


def test_the_journal_says_once_what_applies_to_a_session(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "persona.enforce")
    session = site.open()
    assert session is not None
    login = site.registry.get(session)
    assert login is not None
    reevaluator = Reevaluator(Loop(), site.registry, Mock(), site.personas, Mock(), site.user_rules)
    for _ in range(3):
        reevaluator._set_default(login, Admitted(PersonaRef("Rest", 2), "at-night"))
    for _ in range(3):
        reevaluator._set_default(login, Admitted(None, None))
    assert caplog.messages == [
        f"session {session}: Rest v2 (policy at-night) applies now, before Work v1",
        f"session {session}: no persona (policy -) applies now, before Rest v2",
    ]


def test_a_listener_that_comes_before_the_answer_leaves_nothing(site: Site) -> None:
    site.link.hold = True
    session = site.openings.open_from_shell(ALICE, os.getpid(), lambda _answer: None)
    fd, other = os.pipe()
    os.close(other)
    with pytest.raises(PersonaError, match="not admitted"):
        site.openings.listener_from_shell(session, fd)
    while site.link.held:
        site.link.held.pop(0)()
    assert site.registry.ids() == []
    assert site.link.asked[-1] == "DELETE /v1/sessions"
    site.user_rules.opened.assert_not_called()


def users_of(site: Site) -> Users:
    return Users(
        settings=site.settings, registry=site.registry, supervisor=Mock(), openings=site.openings, identifier=Mock(),
        hang_watchdog=Mock(), decider=Mock(), broker_client=Mock(), denials=Mock(), greeting=Mock(), status=Mock(),
        resource_status=Mock(), release=Mock(),
    )  # fmt: skip


@pytest.mark.parametrize("fds", [0, 1, 2])
def test_no_user_can_leave_logins_behind(site: Site, fds: int) -> None:
    site.link.hold = True
    users, fd = users_of(site), os.open("/dev/null", os.O_PATH)
    for _ in range(3):
        gate = Call(os.getpid(), 1000, 1000, "gate", {"op": "gate", "shell": "/bin/bash"}, (), caller=ALICE)
        users.handle(gate, lambda _answer: None)
        with pytest.raises(PersonaError):
            users.handle(
                Call(os.getpid(), 1000, 1000, "listener", {"op": "listener"}, (fd,) * fds), lambda _answer: None
            )
        while site.link.held:
            site.link.held.pop(0)()
    os.close(fd)
    assert site.registry.ids() == []


@pytest.mark.parametrize("more", [{}, {"interactive": True}])  # what a persona-shell before 0.2.0 says, too
def test_who_breaks_glass_by_persona_shell_is_recorded(site: Site, more: dict[str, Any]) -> None:
    caller = ALICE._replace(groups=("persona-break-glass",))
    answers: list[dict[str, Any]] = []
    gate = Call(os.getpid(), 1000, 1000, "gate", {"op": "gate", "shell": "/bin/bash", **more}, (), caller=caller)
    users_of(site).handle(gate, answers.append)
    assert answers == [{"ok": True, "verdict": "pass", "greeting": None}]
    assert site.events() == [("break_glass", "granted")]
    assert site.exempted == [caller.uid]


def test_who_has_too_many_sessions_is_told_so_before_the_filter(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.registry, "is_full", lambda _uid: True)
    answers: list[dict[str, Any]] = []
    site.openings.open_from_shell(ALICE, os.getpid(), answers.append)
    assert [(answer["ok"], answer["code"]) for answer in answers] == [(False, Reason.AGENT_OVERLOADED)]
