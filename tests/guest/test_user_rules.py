"""What a user's network is under outside of every place, as sessions come, change and go, and over restarts."""

from pathlib import Path

import pytest
from persona_guest.core.persona_cgroups import PersonaCgroup, slice_of
from persona_guest.core.reassignment import NO_PERSONA_DOCUMENT
from persona_guest.enforce.network.orphan_sockets import OwnedCgroup, SocketOwners
from persona_guest.enforce.network.user_rules import UserRules
from persona_guest.enforce.plan import Plan
from persona_guest.session.model import Admitted, Login, Session, State

from persona.decisions import PersonaRef, Subject
from persona.documents import Persona
from persona.patterns import Whitelist
from persona.problems import PersonaError, Reason

ONE, TWO = PersonaRef("One", 1), PersonaRef("Two", 7)
DOCUMENTS = {ref: Persona(ref.name, Whitelist(())) for ref in (ONE, TWO)}


class Bound:
    """What was bound, user by user, in order; a fake for the kernel's part, which test_network_facility.py has."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, str | None]] = []
        self.fail = False
        self.user_rules = UserRules(self.document, self.bind)

    def document(self, ref: PersonaRef) -> Persona:
        if ref not in DOCUMENTS:
            raise PersonaError(Reason.PERSONA_UNAVAILABLE, f"{ref.name} is not here")
        return DOCUMENTS[ref]

    def bind(self, uid: int) -> Plan:
        if self.fail:
            raise PersonaError(Reason.ENFORCEMENT_FAILED, "no nftables")
        persona = self.user_rules.current.get(uid)
        self.calls.append((uid, persona.name if persona else None))
        return ()


@pytest.fixture
def bound() -> Bound:
    return Bound()


def session(name: str, uid: int = 1000) -> Session:
    return Session(name, Subject("alice", (), "vm"), uid, "sshd", "", "/bin/bash", 1, None, 0.0)


def ended(name: str, uid: int = 1000) -> Login:
    return Login(session(name, uid), State.GATED)


def test_the_last_word_holds_and_the_last_session_ends_it(bound: Bound) -> None:
    user_rules = bound.user_rules
    user_rules.opened(session("a"), ONE)
    user_rules.opened(session("b"), TWO)
    user_rules.default_changed("a", ONE)
    user_rules.ended(ended("a"))
    user_rules.ended(ended("a"))
    user_rules.default_changed("a", TWO)  # of one that is gone nothing is heard
    user_rules.ended(ended("b"))
    assert bound.calls == [(1000, "One"), (1000, "Two"), (1000, "One"), (1000, "Two"), (1000, None)]
    assert user_rules.current == {}


def test_no_persona_and_no_document_are_nothing_but_loopback(bound: Bound) -> None:
    bound.user_rules.opened(session("a"), None)
    assert bound.user_rules.current == {1000: NO_PERSONA_DOCUMENT}
    bound.user_rules.opened(session("b", 1001), PersonaRef("Unheard", 3))
    assert bound.user_rules.current[1001] == NO_PERSONA_DOCUMENT


def test_a_session_that_cannot_be_bound_does_not_begin(bound: Bound) -> None:
    bound.fail = True
    with pytest.raises(PersonaError, match="no nftables"):
        bound.user_rules.opened(session("a"), ONE)
    bound.fail = False
    bound.user_rules.ended(ended("a"))
    assert bound.calls == []


def test_a_session_that_cannot_be_bound_changes_nobodys_base(bound: Bound) -> None:
    bound.user_rules.opened(session("a", 1001), ONE)
    bound.fail = True
    for uid in (1000, 1001):
        with pytest.raises(PersonaError, match="no nftables"):
            bound.user_rules.opened(session("b", uid), TWO)
    assert {uid: persona.name for uid, persona in bound.user_rules.current.items()} == {1001: "One"}


def test_what_cannot_follow_now_is_known_for_the_next_look(bound: Bound, caplog: pytest.LogCaptureFixture) -> None:
    bound.user_rules.opened(session("a"), ONE)
    bound.fail = True
    bound.user_rules.default_changed("a", TWO)
    assert "does not follow" in caplog.text
    assert bound.user_rules.current[1000].name == "Two"


def test_a_restart_keeps_what_is_alive(bound: Bound) -> None:
    bound.user_rules.restore([Login(session("a"), State.GATED, Admitted(ONE, "p")), ended("b", 1001)])
    assert {uid: persona.name for uid, persona in bound.user_rules.current.items()} == {
        1000: "One",
        1001: NO_PERSONA_DOCUMENT.name,  # of whom nothing was kept
    }
    bound.user_rules.ended(ended("a"))
    assert bound.user_rules.current == {1001: NO_PERSONA_DOCUMENT}


def test_released_is_for_good(bound: Bound) -> None:
    bound.user_rules.opened(session("a"), ONE)
    bound.user_rules.release()
    bound.user_rules.opened(session("b"), ONE)
    assert bound.user_rules.current == {}


# --- cgroups that are not below a user's slice ----------------------------------------------------------


def in_fallback(session: str, persona: str = "One", uid: int = 1000) -> PersonaCgroup:
    return PersonaCgroup(
        session, PersonaRef(persona, 1), f"user.slice/persona-sessions.service/{session}/{persona}", uid
    )


def test_what_is_outside_of_its_users_slice() -> None:
    assert in_fallback("a").outside
    assert PersonaCgroup("a", ONE, "user.slice/persona-sessions.service/shared-One/a", 1000).outside
    assert PersonaCgroup("a", ONE, "user.slice/user-1001.slice/session-3.scope/One", 1000).outside
    assert not PersonaCgroup("a", ONE, "user.slice/user-1000.slice/session-3.scope/One", 1000).outside
    assert not PersonaCgroup("a", ONE, "user.slice/user-1000.slice/user@1000.service", 1000).outside


def kept(place: PersonaCgroup) -> OwnedCgroup:
    return OwnedCgroup(place.uid, place.session_id, place.cgroup)


def test_cgroups_of_live_sessions_are_all_known_and_those_of_ended_ones_not_for_ever(tmp_path: Path) -> None:
    alive = {"long"}
    owners = SocketOwners(tmp_path / "outside.json", alive.__contains__)
    for number in range(300):
        owners.add({number: kept(in_fallback("long", f"P{number}"))})
    for number in range(300):
        alive.add(f"job{number}")
        owners.add({1000 + number: kept(in_fallback(f"job{number}"))})
        alive.remove(f"job{number}")
    owners.add({5000: kept(in_fallback("other", uid=1001))})
    again = SocketOwners(tmp_path / "outside.json", alive.__contains__)
    for known in (owners, again):
        numbers = [number for number, _ in known.of(1000)]
        assert numbers == [*range(300), *range(1045, 1300)]
        assert known.of(1001) == [(5000, in_fallback("other").cgroup)]
        assert known.of_others([1000]) == known.of(1001)
    for number in range(300):
        owners.add({9000 + number: OwnedCgroup(1001, "", slice_of(1001))})
    assert [number for number, _ in owners.of(1001)] == [5000, *range(9044, 9300)]
    assert [number for number, _ in owners.of(1000)] == numbers
    again.forget()
    assert SocketOwners(tmp_path / "outside.json").of_others([]) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"1": 1}', '{"a": [1, "s", "c"]}'])
def test_a_file_of_cgroups_that_cannot_be_read_is_said(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "outside.json").write_text(text)
    assert SocketOwners(tmp_path / "outside.json").of(1000) == []
    assert "not known any more" in caplog.text


def test_a_cgroup_that_cannot_be_kept_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    owners = SocketOwners(tmp_path / "file" / "outside.json")
    for _ in range(2):
        with pytest.raises(NotADirectoryError):
            owners.add({1: kept(in_fallback("a"))})
    assert owners.of(1000) == []
