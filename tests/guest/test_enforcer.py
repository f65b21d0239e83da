"""What is looked after where a document is missing, over a fake hierarchy."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from persona_guest.broker.documents import Personas
from persona_guest.core.file_id import Image
from persona_guest.core.persona_cgroups import place_of
from persona_guest.enforce.cgroups.facility import Cgroups
from persona_guest.enforce.cgroups.user_memory import lacking
from persona_guest.enforce.enforcer import Enforcer
from persona_guest.enforce.plan_text import WORDS
from persona_guest.loop import Loop
from persona_guest.session.model import Session
from persona_guest.session.placement import Placement
from persona_guest.session.registry import Registry

from persona.decisions import Denied, PersonaRef, Subject
from persona.documents import Persona, ResourceLimits
from persona.patterns import Whitelist
from persona.problems import Reason
from tests.guest.conftest import ROOT
from tests.guest.fake_cgroups import FILES, FakeHierarchy
from tests.guest.migrate_site import gated

SLICE = "user.slice/user-1000.slice"
SCOPE = f"{SLICE}/session-5.scope"
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
def placement() -> Placement:
    """Of a session under two personas."""
    placement = Placement("s-1", 1000, SCOPE, Image(0, 0), REFS[0])
    for ref in REFS:
        placement.add(place_of("s-1", 1000, ref, SCOPE))
    return placement


@pytest.fixture
def enforcer(tree: FakeHierarchy, broker: Broker, placement: Placement, tmp_path: Path) -> Enforcer:
    """Of an agent that took up that session, and has neither document."""
    personas = Personas(tmp_path / "personas", broker.fetch)
    registry = Registry(tmp_path / "sessions")
    session = Session("s-1", Subject("alice", (), "vm"), 1000, "sshd", "", "/bin/bash", 1, None, 0.0)
    gated(registry, session).placement = placement
    return Enforcer(Loop(), registry, tree, [Cgroups(tree, "/dev/null")], personas, lambda _: None)


def test_an_agent_thaws_what_the_one_before_it_stopped_and_leaves_what_was_withdrawn(
    enforcer: Enforcer, tree: FakeHierarchy, placement: Placement
) -> None:
    placement.add(place_of("s-1", 1000, REFS[0], SCOPE, withdrawn=True))
    for place in placement.places.values():
        tree.make(place.cgroup)
        tree.freeze(place.cgroup)
    enforcer.restore()
    assert [place.cgroup for place in placement.places.values() if tree.freezes(place.cgroup)] == [f"{SCOPE}/-One"]


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


def test_how_much_of_a_limit_is_taken_by_what_was_left(placement: Placement, tree: FakeHierarchy) -> None:
    place = placement.places["One"]
    persona = Persona("One", Whitelist(()), ResourceLimits(memory_bytes=(128 << 20) + 5))
    tree.make(place.cgroup)
    tree.write(place.cgroup, "memory.max", str(40 << 20))
    assert lacking(tree, place, persona) == 88 << 20
    tree.write(place.cgroup, "memory.max", str(128 << 20))
    assert lacking(tree, place, persona) == 0
    tree.write(place.cgroup, "memory.max", "max")
    assert lacking(tree, place, persona) == 0
    tree.remove(place.cgroup)
    assert lacking(tree, place, persona) == 0


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


def test_the_journal_has_one_line_for_each_change_that_matters(
    enforcer: Enforcer,
    broker: Broker,
    placement: Placement,
    tree: FakeHierarchy,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def said(level: int = logging.INFO) -> list[str]:
        lines = [record.getMessage() for record in caplog.records if record.levelno == level]
        caplog.clear()
        return lines

    caplog.set_level(logging.DEBUG, "persona.enforce")
    placement.places.clear()
    enforcer._personas.ensure(REFS[0], lambda _: None)
    ask, broker.asked = broker.asked, []
    limits = {"pids": 60, "memory": "256MiB"}
    document = {"kind": "Persona", "name": "One", "command_whitelist": ["ls"], "resource_limits": limits}
    ask[0][1]({"version": 1, "document": document})
    tree.use(SLICE, 100 << 20)
    place = enforcer.enter(placement, REFS[0])
    assert said() == ["session s-1 (uid 1000): One v1 is in use"]
    enforcer.reconcile()
    said()
    for number in range(100, 0, -1):  # what the user left in memory becomes less, and their limit more
        tree.use(SLICE, number << 20)
        enforcer.reconcile()
    assert len([record for record in caplog.records if record.levelno == logging.DEBUG]) > 10  # there were plans
    assert said() == []
    tree.write(place.cgroup, "memory.max", str(300 << 20))
    enforcer.reconcile()
    assert "memory.max" in said()[0]
    tree.write(place.cgroup, "pids.max", "77")
    enforcer.reconcile()
    (line,) = said()
    assert line == f"cgroups was not as it should be and is again: pids.max of {place.cgroup} was 77 and is 60"
    tree.write(place.cgroup, "pids.max", "77")
    enforcer.reconcile()
    (line,) = said(logging.DEBUG)
    plan = json.loads(line.removeprefix("plan: "))
    assert [(step["op"], step["file"], step["value"]) for step in plan] == [("cgroup.set", "pids.max", "60")]


def test_every_operation_has_its_words() -> None:
    code = "".join(file.read_text() for file in (ROOT / "guest" / "persona_guest").rglob("*.py"))
    named = set(re.findall(r'"((?:cgroup|network|routes)\.[a-z_]+)"', code)) - set(FILES)
    used = {op for op in named if re.search(rf'"op":[^\n]*"{op}"', code)}
    assert used == WORDS.keys()


def test_a_place_that_was_taken_apart_does_not_come_back(
    enforcer: Enforcer, tree: FakeHierarchy, placement: Placement
) -> None:
    """As where an agent of complain mode did that on a full disk, and could not write it down."""
    tree.make(placement.places["One"].cgroup)
    enforcer.restore()
    assert list(placement.places) == ["One"]


def test_after_a_release_nothing_is_bound_anew(enforcer: Enforcer) -> None:
    """Not even an exec that waited for the broker meanwhile."""
    enforcer.release()
    pending = Mock()
    enforcer.place(pending, Mock(persona=REFS[0]))
    assert enforcer.wanted() == {}
    assert pending.mock_calls == []
