"""How a program start is decided, as scripts: what is asked of whom, what is answered, and what comes of it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from persona_guest.broker.client import BrokerClient
from persona_guest.broker.documents import Personas
from persona_guest.core import tasks
from persona_guest.core.tasks import FromCallback
from persona_guest.dependencies.resolve import Dependencies, Installed
from persona_guest.gate.decider import Decider
from persona_guest.settings import Gate

from persona.decisions import Decision, Denied, Granted, Lease, PersonaRef, Program, Request, Subject, Width
from persona.problems import Reason

GRANTED = Granted(PersonaRef("A", 1), "a", Lease(5.0, Width.ARGV), 1)
LATER = replace(GRANTED, persona=PersonaRef("A", 2))
DENIED = Denied(Reason.NO_MATCHING_POLICY)
MISSING = Denied(Reason.DEPENDENCY_MISSING)
REQUEST = Request(Subject("alice", (), "vm"), "s-1", Program("/usr/bin/ls", ("ls",), ("/usr/bin/ls",)), ("ls",), "/")
PLUMBING = replace(REQUEST, program=Program("/usr/bin/tty", ("tty",), ("/usr/bin/tty",)))


@dataclass
class Script:
    """A fake of all that the decider asks: each question waits in ``asked`` until it is answered."""

    asked: list[tuple[str, Callable[[Any], None]]] = field(default_factory=list)
    found: list[Decision] = field(default_factory=list)

    def __post_init__(self) -> None:
        fake = cast(Any, self)
        self.decider = Decider(
            cast(BrokerClient, fake.Broker(self)), cast(Personas, fake.Documents(self)),
            cast(Dependencies, fake.Needs(self)), Gate(plumbing=("/usr/bin/tty",)),
        )  # fmt: skip

    @dataclass
    class Broker:
        script: "Script"

        def decide(self, request: Request, done: Callable[[Decision], None], *, explain: bool) -> None:
            self.script.asked.append(("broker, explain" if explain else "broker", done))

    @dataclass
    class Documents:
        script: "Script"

        def backed(self, decision: Decision, done: Callable[[Decision], None]) -> None:
            self.script.asked.append(("document", done))

    @dataclass
    class Needs:
        script: "Script"

        def backed(self, decision: Decision, done: Callable[[Decision], None], lacks: str = "") -> None:
            self.script.asked.append(("dependencies", done))

        def installed(self, decision: Decision, request: Request, done: Callable[[Decision], None]) -> None:
            self.script.asked.append(("installation", done))

    def answer(self, whom: str, answer: Decision | Installed) -> None:
        """Answers the one question that waits, which must be of this part."""
        ((asked, done),) = self.asked
        self.asked.clear()
        assert asked == whom
        done(answer)


def test_a_grant_with_everything_there() -> None:
    script = Script()
    script.decider.decide(REQUEST, script.found.append)
    script.answer("broker", GRANTED)
    script.answer("document", GRANTED)
    assert script.found == []
    script.answer("installation", GRANTED)
    assert (script.found, script.asked) == ([GRANTED], [])


@pytest.mark.parametrize("stage", ["broker", "document", "installation"])
def test_each_part_can_deny(stage: str) -> None:
    script = Script()
    script.decider.decide(REQUEST, script.found.append)
    decision: Decision = GRANTED
    for part in ("broker", "document", "installation"):
        decision = DENIED if part == stage else decision
        script.answer(part, decision)
    assert script.found == [DENIED]


def test_after_an_installation_the_broker_is_asked_again_and_no_second_one_follows() -> None:
    script = Script()
    script.decider.decide(REQUEST, script.found.append)
    script.answer("broker", GRANTED)
    script.answer("document", GRANTED)
    script.answer("installation", Installed())
    script.answer("broker", LATER)  # it took its time: another version holds by now
    script.answer("document", LATER)
    script.answer("dependencies", MISSING)
    assert script.found == [MISSING]


def test_what_comes_before_any_terminal_waits_for_no_installation() -> None:
    script = Script()
    script.decider.decide(PLUMBING, script.found.append)
    script.answer("broker", GRANTED)
    script.answer("document", GRANTED)
    script.answer("dependencies", MISSING)
    assert script.found == [MISSING]


def test_a_question_is_one_to_the_broker_too_and_installs_nothing() -> None:
    script = Script()
    script.decider.explain(REQUEST, script.found.append)
    script.answer("broker, explain", GRANTED)
    script.answer("document", GRANTED)
    script.answer("dependencies", GRANTED)
    assert script.found == [GRANTED]


def test_several_at_once_do_not_meet() -> None:
    script = Script()
    other: list[Decision] = []
    script.decider.decide(REQUEST, script.found.append)
    script.decider.decide(PLUMBING, other.append)
    first, second = (done for _, done in script.asked)
    script.asked.clear()
    second(DENIED)
    script.answer("document", DENIED)
    script.answer("dependencies", DENIED)
    assert (script.found, other) == ([], [DENIED])
    first(GRANTED)
    script.answer("document", GRANTED)
    script.answer("installation", GRANTED)
    assert script.found == [GRANTED]


def test_answers_that_are_there_at_once_are_taken_at_once() -> None:
    async def sum_of(numbers: range) -> int:
        total = 0
        for number in numbers:
            total += await FromCallback[int](lambda done, number=number: done(number))  # type: ignore[misc]
        return total

    found: list[int] = []
    tasks.run(sum_of(range(10)), found.append)
    assert found == [45]


def test_what_a_coroutine_raises_reaches_whoever_answered() -> None:
    waiting: list[Callable[[int], None]] = []
    found: list[float] = []

    async def divide() -> float:
        return 1 / await FromCallback[int](waiting.append)

    tasks.run(divide(), found.append)
    with pytest.raises(ZeroDivisionError):
        waiting[0](0)
    assert found == []
