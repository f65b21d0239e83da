"""Asking what applies to running sessions: coalesced, retried without piling up, documents first."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from persona_guest.broker.current import read
from persona_guest.broker.documents import Personas
from persona_guest.core.file_id import Image
from persona_guest.core.reassignment import Applicable, Revocation
from persona_guest.loop import Loop
from persona_guest.reassign import reevaluate as module
from persona_guest.reassign.reevaluate import Reevaluator
from persona_guest.session.model import Session
from persona_guest.session.placement import Placement
from persona_guest.session.registry import Registry

from persona.decisions import Denied, PersonaRef, Subject
from persona.patterns import Whitelist, parse_pattern
from persona.problems import Reason
from tests.guest.migrate_site import gated

ANSWER = {
    "sessions": {
        f"s-{number}": {
            "personas": [{"name": "P", "version": 1, "policy": "p", "commands": ["**"]}],
            "others": [{"name": "Q", "version": 2}],
            "revoked": False,
        }
        for number in range(5)
    }
}
DOCUMENT = {"kind": "Persona", "command_whitelist": ["ls"]}


class Site:
    """Fakes of everything around the reevaluator: what it asks, and what it does with the answers."""

    def __init__(self, directory: Path) -> None:
        self.loop = Loop()
        self.asked: list[list[str]] = []
        self.fetched: list[PersonaRef] = []
        self.followed: list[str] = []
        self.words: list[Revocation] = []
        self.based: dict[str, PersonaRef | None] = {}
        self.answers: Callable[[Callable[[Any], None]], None] = lambda done: done(ANSWER)
        self.documents: Callable[[PersonaRef], Any] = lambda ref: {
            "version": ref.version,
            "document": {**DOCUMENT, "name": ref.name},
        }
        self.registry = registry = Registry(directory.parent / "sessions")
        for number in range(5):
            session = Session(f"s-{number}", Subject("u", (), "vm"), 1000, "sshd", "", "/bin/bash", 1, None, 0.0)
            gated(registry, session).placement = Placement(session.id, 1000, "x", Image(1, 2))

        def current(sessions: list[str], done: Callable[[Any], None]) -> None:
            self.asked.append(sessions)
            self.answers(lambda answer: done(answer if isinstance(answer, Denied) else read(answer)))

        def fetch(ref: PersonaRef, done: Callable[[Any], None]) -> None:
            self.fetched.append(ref)
            done(self.documents(ref))

        self.meanwhile: Callable[[str], None] = lambda _session: None

        def follow(placement: Placement, _gated: object, _holding: object, word: Revocation) -> bool:
            self.followed.append(placement.session_id)
            self.words.append(word)
            self.meanwhile(placement.session_id)
            return True

        self.reevaluator = Reevaluator(
            self.loop,
            registry,
            SimpleNamespace(current=current, batches=lambda sessions: [sessions]),  # type: ignore[arg-type]  # a fake
            Personas(directory, fetch),
            SimpleNamespace(follow=follow),  # type: ignore[arg-type]
            SimpleNamespace(default_changed=self.based.__setitem__),  # type: ignore[arg-type]
        )

    def run(self, seconds: float) -> None:
        self.loop.call_later(seconds, self.loop.stop)
        self.loop.run()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(module, "_AGAIN_S", 0.05)
    return Site(tmp_path / "personas")


def test_one_question_for_all_and_the_documents_before_anything_moves(site: Site) -> None:
    site.reevaluator.changed()
    site.run(0.05)
    assert site.asked == [[f"s-{number}" for number in range(5)]]
    assert set(site.fetched) == {PersonaRef("P", 1), PersonaRef("Q", 2)}  # the next one's too
    assert len(site.fetched) == 2
    assert site.followed == site.asked[0]
    assert set(site.based.values()) == {PersonaRef("P", 1)}


@pytest.mark.parametrize("held", [True, False])
def test_between_two_sessions_others_have_their_turn(site: Site, held: bool) -> None:
    if not held:
        for_all = {"personas": [], "others": [], "revoked": True}
        site.answers = lambda done: done({"sessions": dict.fromkeys(ANSWER["sessions"], for_all)})
    site.meanwhile = lambda _session: site.loop.call_soon_threadsafe(lambda: site.followed.append("an exec"))
    site.reevaluator.changed()
    site.run(0.1)
    assert site.followed == [name for number in range(5) for name in (f"s-{number}", "an exec")]


def test_one_that_is_tried_again_and_again_is_not_first_again(site: Site) -> None:
    def again(session: str) -> None:
        if session == "s-0" and len(site.followed) < 12:
            site.reevaluator.changed()

    site.meanwhile = again
    site.reevaluator.changed()
    site.run(0.1)
    assert site.followed[:6] == ["s-0", "s-1", "s-2", "s-3", "s-4", "s-0"]


def test_what_was_said_before_is_void(site: Site) -> None:
    def away(_session: str) -> None:
        for placement in site.registry.placements():
            placement.holding = holding  # as what was asked for meanwhile will say
        site.reevaluator.changed()

    holding = (Applicable(PersonaRef("P", 1), "p", Whitelist((parse_pattern("**"),))),)
    site.meanwhile = away
    site.reevaluator.changed()
    site.run(0.1)
    assert site.followed == ["s-0"]


def test_events_while_a_question_is_under_way_make_one_more(site: Site) -> None:
    waiting: list[Callable[[Any], None]] = []
    site.answers = waiting.append
    for _ in range(4):
        site.reevaluator.changed()
    assert len(site.asked) == 1
    waiting.pop()(ANSWER)
    assert len(site.asked) == 2
    waiting.pop()(ANSWER)
    assert len(site.asked) == 2


def test_failures_are_tried_again_and_do_not_pile_up(site: Site) -> None:
    there, seen = site.documents, list[int]()
    site.documents = lambda _ref: Denied(Reason.BROKER_UNREACHABLE, help="away")

    def back() -> None:
        seen.append(len(site.asked))
        assert site.followed == []
        site.documents = there

    site.reevaluator.changed()
    site.loop.call_later(0.5, back)
    site.run(0.8)
    assert 3 <= seen[0] <= 11  # one question in a while, not one for each session of each before
    assert site.followed


def test_a_broker_that_is_away_is_asked_again(site: Site) -> None:
    site.answers = lambda done: done(Denied(Reason.BROKER_UNREACHABLE, help="away"))
    site.reevaluator.changed()
    site.run(0.3)
    assert 3 <= len(site.asked) <= 7


@pytest.mark.parametrize("answer", [None, [], {"sessions": {"s-0": {}}}, {"sessions": {"s-0": {"personas": [1]}}}])
def test_an_answer_that_is_none_moves_nothing(site: Site, answer: Any) -> None:
    site.answers = lambda done: done(answer)
    site.reevaluator.changed()
    site.run(0.05)
    assert site.followed == []


def test_one_session_that_cannot_be_read_does_not_keep_the_others(site: Site) -> None:
    sessions: dict[str, Any] = dict(ANSWER["sessions"])
    odd = {**sessions["s-1"]["personas"][0], "commands": ["ls", "./newer-grammar"]}
    sessions["s-1"] = {**sessions["s-1"], "personas": [odd, *sessions["s-1"]["personas"]]}
    sessions["s-2"] = {"personas": [1]}
    site.answers = lambda done: done({"sessions": sessions})
    site.reevaluator.changed()
    site.run(0.1)
    assert sorted(set(site.followed)) == ["s-0", "s-1", "s-3", "s-4"]
    assert site.based["s-0"] == PersonaRef("P", 1)
    assert site.based["s-1"] is None  # what comes after the policy that cannot be read is not known to be meant


def test_a_persona_that_this_agent_cannot_read_does_not_keep_its_sessions_from_following(site: Site) -> None:
    newer = {"version": 1, "document": {**DOCUMENT, "name": "P", "field_of_a_newer_broker": 1}}
    there = site.documents
    site.documents = lambda ref: newer if ref.name == "P" else there(ref)
    site.reevaluator.changed()
    site.run(0.1)
    assert site.followed == site.asked[0]
    assert set(site.based.values()) == {None}  # and none after it: what it would have allowed is not known
    assert len(site.asked) == 1  # to ask again would not help


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ({"revoked": False}, Revocation.NONE),
        ({"revoked": True}, Revocation.REVOKED),
        ({"revoked": True, "end": True}, Revocation.END),
        ({"revoked": True, "end": "yes"}, Revocation.REVOKED),
        ({"revoked": False, "end": True}, Revocation.NONE),
    ],
)
def test_what_an_operator_said_of_a_session(site: Site, said: dict[str, object], word: Revocation) -> None:
    answer = {"personas": [], "others": [], "a field of a newer broker": 1, **said}
    site.answers = lambda done: done({"sessions": {"s-1": answer}})
    site.reevaluator.changed()
    site.run(0.05)
    assert site.words == [word]
