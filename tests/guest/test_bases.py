"""What a user's network is under outside of every place, as sessions come, change and go, and over restarts."""

import json
from pathlib import Path

import pytest
from persona_guest.bases import Bases
from persona_guest.core.following import NOBODYS
from persona_guest.core.places import Place, slice_of
from persona_guest.core.sessions import Session
from persona_guest.enforce.nft import Kept, Outside
from persona_guest.enforce.plan import Plan

from persona.decisions import PersonaRef, Subject
from persona.documents import Persona
from persona.patterns import Whitelist
from persona.problems import PersonaError, Reason

ONE, TWO = PersonaRef("One", 1), PersonaRef("Two", 7)
DOCUMENTS = {ref: Persona(ref.name, Whitelist(())) for ref in (ONE, TWO)}


class Bound:
    """What was bound, user by user, in order; a fake for the kernel's part, which test_nft.py has."""

    def __init__(self, path: Path) -> None:
        self.calls: list[tuple[int, str | None]] = []
        self.fail = False
        self.bases = Bases(path, self.document, self.bind)

    def document(self, ref: PersonaRef) -> Persona:
        if ref not in DOCUMENTS:
            raise PersonaError(Reason.PERSONA_UNAVAILABLE, f"{ref.name} is not here")
        return DOCUMENTS[ref]

    def bind(self, uid: int) -> Plan:
        if self.fail:
            raise PersonaError(Reason.ENFORCEMENT_FAILED, "no nftables")
        persona = self.bases.current.get(uid)
        self.calls.append((uid, persona.name if persona else None))
        return ()


@pytest.fixture
def bound(tmp_path: Path) -> Bound:
    return Bound(tmp_path / "bases.json")


def session(name: str, uid: int = 1000) -> Session:
    return Session(name, Subject("alice", (), "vm"), uid, "sshd", "", "/bin/bash", 1, None, 0.0)


def test_the_last_word_holds_and_the_last_session_ends_it(bound: Bound) -> None:
    bases = bound.bases
    bases.opened(session("a"), ONE)
    bases.opened(session("b"), TWO)
    bases.rebased("a", ONE)
    bases.ended("a")
    bases.ended("a")
    bases.rebased("a", TWO)  # of one that is gone nothing is heard
    bases.ended("b")
    assert bound.calls == [(1000, "One"), (1000, "Two"), (1000, "One"), (1000, "Two"), (1000, None)]
    assert bases.current == {}


def test_no_persona_and_no_document_are_nothing_but_loopback(bound: Bound) -> None:
    bound.bases.opened(session("a"), None)
    assert bound.bases.current == {1000: NOBODYS}
    bound.bases.opened(session("b", 1001), PersonaRef("Unheard", 3))
    assert bound.bases.current[1001] == NOBODYS


def test_a_session_that_cannot_be_bound_does_not_begin(bound: Bound) -> None:
    bound.fail = True
    with pytest.raises(PersonaError, match="no nftables"):
        bound.bases.opened(session("a"), ONE)
    bound.fail = False
    bound.bases.ended("a")
    assert bound.calls == []


def test_a_session_that_cannot_be_bound_changes_nobodys_base(bound: Bound) -> None:
    bound.bases.opened(session("a", 1001), ONE)
    bound.fail = True
    for uid in (1000, 1001):
        with pytest.raises(PersonaError, match="no nftables"):
            bound.bases.opened(session("b", uid), TWO)
    assert {uid: persona.name for uid, persona in bound.bases.current.items()} == {1001: "One"}


def test_what_cannot_follow_now_is_known_for_the_next_look(bound: Bound, caplog: pytest.LogCaptureFixture) -> None:
    bound.bases.opened(session("a"), ONE)
    bound.fail = True
    bound.bases.rebased("a", TWO)
    assert "does not follow" in caplog.text
    assert bound.bases.current[1000].name == "Two"


def test_a_restart_keeps_what_is_alive(bound: Bound, tmp_path: Path) -> None:
    bound.bases.opened(session("a"), ONE)
    bound.bases.opened(session("b", 1001), TWO)
    after = Bound(tmp_path / "bases.json")
    after.bases.restore({"a": 1000})
    assert {uid: persona.name for uid, persona in after.bases.current.items()} == {1000: "One"}
    after.bases.ended("a")
    assert after.bases.current == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": [1]}'])
def test_of_whom_nothing_was_kept_reaches_nothing(bound: Bound, tmp_path: Path, text: str) -> None:
    (tmp_path / "bases.json").write_text(text)
    bound.bases.restore({"a": 1000})
    assert bound.bases.current == {1000: NOBODYS}


def test_released_is_for_good(bound: Bound, tmp_path: Path) -> None:
    bound.bases.opened(session("a"), ONE)
    bound.bases.release()
    bound.bases.opened(session("b"), ONE)
    assert bound.bases.current == {}
    assert not (tmp_path / "bases.json").exists()


def test_the_file_says_who_is_under_what(bound: Bound, tmp_path: Path) -> None:
    bound.bases.opened(session("a"), TWO)
    assert json.loads((tmp_path / "bases.json").read_text()) == {"a": [1000, "Two", 7]}


# --- cgroups that are not below a user's slice ----------------------------------------------------------


def housed(session: str, persona: str = "One", uid: int = 1000) -> Place:
    return Place(session, PersonaRef(persona, 1), f"user.slice/persona-sessions.service/{session}/{persona}", uid)


def test_what_is_outside_of_its_users_slice() -> None:
    assert housed("a").outside
    assert Place("a", ONE, "user.slice/persona-sessions.service/shared-One/a", 1000).outside
    assert Place("a", ONE, "user.slice/user-1001.slice/session-3.scope/One", 1000).outside
    assert not Place("a", ONE, "user.slice/user-1000.slice/session-3.scope/One", 1000).outside
    assert not Place("a", ONE, "user.slice/user-1000.slice/user@1000.service", 1000).outside


def kept(place: Place) -> Kept:
    return Kept(place.uid, place.session, place.cgroup)


def test_cgroups_of_live_sessions_are_all_known_and_those_of_ended_ones_not_for_ever(
    bound: Bound, tmp_path: Path
) -> None:
    outside = Outside(tmp_path / "outside.json", bound.bases.alive)
    bound.bases.opened(session("long"), ONE)
    for number in range(300):
        outside.add({number: kept(housed("long", f"P{number}"))})
    for number in range(300):
        bound.bases.opened(session(f"job{number}"), ONE)
        outside.add({1000 + number: kept(housed(f"job{number}"))})
        bound.bases.ended(f"job{number}")
    outside.add({5000: kept(housed("other", uid=1001))})
    again = Outside(tmp_path / "outside.json", bound.bases.alive)
    for known in (outside, again):
        numbers = [number for number, _ in known.of(1000)]
        assert numbers == [*range(300), *range(1045, 1300)]
        assert known.of(1001) == [(5000, housed("other").cgroup)]
        assert known.of_others([1000]) == known.of(1001)
    for number in range(300):
        outside.add({9000 + number: Kept(1001, "", slice_of(1001))})
    assert [number for number, _ in outside.of(1001)] == [5000, *range(9044, 9300)]
    assert [number for number, _ in outside.of(1000)] == numbers
    again.forget()
    assert Outside(tmp_path / "outside.json").of_others([]) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"1": 1}', '{"a": [1, "s", "c"]}'])
def test_a_file_of_cgroups_that_cannot_be_read_is_said(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "outside.json").write_text(text)
    assert Outside(tmp_path / "outside.json").of(1000) == []
    assert "not known any more" in caplog.text


def test_a_cgroup_that_cannot_be_kept_is_not_known(tmp_path: Path) -> None:
    outside = Outside(tmp_path / "gone" / "outside.json")
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            outside.add({1: kept(housed("a"))})
    assert outside.of(1000) == []
