"""What is looked after where a document is missing, over a fake hierarchy."""

from collections.abc import Callable
from pathlib import Path

import pytest
from persona_guest.core.places import place_of
from persona_guest.core.sessions import Session
from persona_guest.enforce.cgroups import Cgroups
from persona_guest.enforce.home import Home
from persona_guest.enforcer import Enforcer
from persona_guest.gate.identity import Image
from persona_guest.gate.pending import Gated
from persona_guest.loop import Loop
from persona_guest.personas import Personas

from persona.decisions import Denied, PersonaRef, Subject
from persona.problems import Reason
from tests.guest.fake_cgroups import FakeHierarchy

SCOPE = "user.slice/user-1000.slice/session-5.scope"
REFS = PersonaRef("One", 1), PersonaRef("Two", 1)


class Broker:
    """A fake one: its answers come when they are told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[PersonaRef, Callable[[object], None]]] = []

    def fetch(self, ref: PersonaRef, done: Callable[[object], None]) -> None:
        self.asked.append((ref, done))

    def answer(self) -> None:
        (ref, done), self.asked = self.asked[0], self.asked[1:]
        limits = {"pids": 60}
        document = {"kind": "Persona", "name": ref.name, "command_whitelist": ["ls"], "resource_limits": limits}
        done({"version": ref.version, "document": document})

    def refuse(self) -> None:
        (_, done), self.asked = self.asked[0], self.asked[1:]
        done(Denied(Reason.BROKER_UNREACHABLE))


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def tree(tmp_path: Path) -> FakeHierarchy:
    tree = FakeHierarchy(tmp_path / "tree")
    tree.grow(SCOPE)
    return tree


@pytest.fixture
def enforcer(tree: FakeHierarchy, broker: Broker, tmp_path: Path) -> Enforcer:
    """Of an agent that took up a session under two personas, and has neither document."""
    personas = Personas(tmp_path / "personas", broker.fetch)
    enforcer = Enforcer(
        Loop(), tree, [Cgroups(tree, "/dev/null")], personas, tmp_path / "places", lambda _: None, lambda _: None
    )
    home = enforcer.homes["s-1"] = Home("s-1", 1000, SCOPE, Image(0, 0), REFS[0])
    for ref in REFS:
        home.add(place_of("s-1", 1000, ref, SCOPE))
    return enforcer


def test_an_agent_thaws_what_the_one_before_it_stopped_and_leaves_what_was_withdrawn(
    enforcer: Enforcer, tree: FakeHierarchy, tmp_path: Path
) -> None:
    home = enforcer.homes.pop("s-1")
    home.add(place_of("s-1", 1000, REFS[0], SCOPE, withdrawn=True))
    home.save(tmp_path / "places")
    for place in home.places.values():
        tree.make(place.cgroup)
        tree.freeze(place.cgroup)
    session = Session("s-1", Subject("alice", (), "vm"), 1000, "sshd", "", "/bin/bash", 1, None, 0.0)
    enforcer.restore({"s-1": Gated(session, -1, 0, (), b"s-1")})
    assert [place.cgroup for place in home.places.values() if tree.freezes(place.cgroup)] == [f"{SCOPE}/-One"]


def test_with_the_last_document_that_was_missing_all_is_looked_after_at_once(
    enforcer: Enforcer, broker: Broker, tree: FakeHierarchy
) -> None:
    enforcer.reconcile()
    enforcer.reconcile()
    assert sorted(ref.name for ref, _ in broker.asked) == ["One", "Two"]  # each once
    broker.answer()
    assert not tree.exists(f"{SCOPE}/One")
    broker.answer()
    assert tree.read(f"{SCOPE}/One", "pids.max") == tree.read(f"{SCOPE}/Two", "pids.max") == "60\n"
    assert not broker.asked


def test_a_broker_that_refuses_is_not_asked_again_at_once(
    enforcer: Enforcer, broker: Broker, tree: FakeHierarchy
) -> None:
    enforcer.reconcile()
    broker.answer()
    broker.refuse()
    assert not broker.asked
    enforcer.reconcile()  # when it is due
    broker.answer()
    assert tree.exists(f"{SCOPE}/One")
