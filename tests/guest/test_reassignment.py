"""Which persona a running process belongs to, the store of documents, and plans that fail: pure or on files."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from persona_guest.broker.documents import Personas
from persona_guest.core.file_id import Image
from persona_guest.core.messages import limit_line
from persona_guest.core.persona_cgroups import MANAGED, PersonaCgroup, place_of
from persona_guest.core.reassignment import NO_PERSONA, NO_PERSONA_DOCUMENT, Applicable, bereft, choose
from persona_guest.enforce.cgroups.limit_events import Alarms
from persona_guest.enforce.plan import PlanError, apply, apply_each, undo
from persona_guest.loop import Loop
from persona_guest.program.identity import Identifier
from persona_guest.program.process import read_running
from persona_guest.session.placement import Placement
from persona_guest.settings import Gate
from persona_guest.shell.bars import place_lines

from persona.canonical import to_mapping
from persona.decisions import Denied, Granted, Lease, PersonaRef, Program, Width
from persona.documents import Persona, ResourceLimits, parse_document
from persona.network import parse_rule
from persona.patterns import Whitelist, parse_pattern
from persona.problems import PersonaError, Reason
from persona.shown import amount
from tests.guest.fake_cgroups import FakeHierarchy

SCOPE = "user.slice/user-1000.slice/session-5.scope"


def program(name: str) -> Program:
    return Program(f"/usr/bin/{name}", (name,), (f"/usr/bin/{name}",))


def patterns(*texts: str) -> Whitelist:
    return Whitelist(tuple(map(parse_pattern, texts)))


def held(name: str, *whitelist: str, commands: str = "**") -> tuple[Applicable, Persona]:
    return Applicable(PersonaRef(name, 1), f"to-{name}", patterns(commands)), Persona(name, patterns(*whitelist))


# --- which persona ---------------------------------------------------------------------------------


def test_the_first_policy_that_speaks_for_it_and_allows_it() -> None:
    pairs = [held("Git", "git log **", commands="git"), held("Rest", "**", "!nmap")]
    assert choose([(program("git"), ("git", "log"))], pairs) == PersonaRef("Git", 1)
    assert choose([(program("git"), ("git", "push"))], pairs) == PersonaRef("Rest", 1)
    assert choose([(program("ls"), ("ls",))], pairs) == PersonaRef("Rest", 1)
    assert choose([(program("nmap"), ("nmap",))], pairs) is None
    assert choose([(program("ls"), ("ls",))], []) is None
    assert choose([(program("ld.so"), ("ld.so", "/usr/bin/nmap"))], pairs) is None
    assert choose([(program("ld.so"), ("ld.so",))], [held("Loader", "ld.so")]) == PersonaRef("Loader", 1)


def test_a_script_is_looked_for_before_its_interpreter() -> None:
    stages = [(program("report"), ("/usr/bin/report",)), (program("sh"), ("sh", "/usr/bin/report"))]
    assert choose(stages, [held("Shell", "sh"), held("Report", "report")]) == PersonaRef("Report", 1)
    assert choose(stages, [held("Shell", "sh")]) == PersonaRef("Shell", 1)


def test_a_withdrawn_persona_keeps_its_limits_and_no_network() -> None:
    persona = Persona("P", patterns("ls"), ResourceLimits(pids=3), network_access=(parse_rule("any:tcp/443"),))
    assert bereft(persona).resource_limits == persona.resource_limits
    assert bereft(persona).network_access == ()
    assert NO_PERSONA_DOCUMENT.network_access == ()
    assert NO_PERSONA_DOCUMENT.command_whitelist.patterns == ()


def test_a_running_process_is_known_by_its_file(tmp_path: Path) -> None:
    script = tmp_path / "s.sh"
    script.write_text("#!/bin/sh\necho ready; read line\n")
    script.chmod(0o755)
    identifier = Identifier(Gate())
    with subprocess.Popen([str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        running = read_running(process.pid, identifier)
        process.communicate()
    assert running.name == f"{script} (script, run by dash)"
    assert len(running.stages) == 2
    assert "sh" in running.stages[1][0].program.names
    assert [shown.path for shown, _ in running.trusted] == [running.stages[1][0].program.path]  # not the user's script
    with pytest.raises(OSError, match="No such"):
        read_running(process.pid, identifier)


def test_a_process_that_calls_itself_something_else_gains_nothing() -> None:
    argv = ["tail", "-f", "/usr/bin/ldd"]  # a script of bash's, which tail is not
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as liar:
        assert liar.stdout is not None
        liar.stdout.read(2)
        running = read_running(liar.pid, Identifier(Gate()))
        liar.kill()
    assert len(running.stages) == 1


# --- documents --------------------------------------------------------------------------------------


class Broker:
    """A fake broker: remembers what it was asked, answers when told to."""

    def __init__(self) -> None:
        self.asked: list[PersonaRef] = []
        self.answer: Callable[[Any], None] = lambda _answer: None

    def fetch(self, ref: PersonaRef, done: Callable[[Any], None]) -> None:
        self.asked.append(ref)
        self.answer = done


DOCUMENT = {"kind": "Persona", "name": "P", "command_whitelist": ["ls"], "resource_limits": {"pids": 9}}
REF = PersonaRef("P", 3)


def granted(ref: PersonaRef = REF) -> Granted:
    return Granted(ref, "p", Lease(30, Width.PROGRAM))


def test_a_grant_waits_for_its_document_and_many_for_one(tmp_path: Path) -> None:
    broker, got = Broker(), list[Any]()
    personas = Personas(tmp_path / "p", broker.fetch)
    personas.backed(granted(), got.append)
    personas.backed(granted(), got.append)
    assert (got, broker.asked) == ([], [REF])
    broker.answer({"version": 3, "document": DOCUMENT})
    assert got == [granted(), granted()]
    assert personas.get(REF).resource_limits.pids == 9
    later = Personas(tmp_path / "p", broker.fetch)  # after a restart, with no broker
    later.backed(granted(), got.append)
    assert len(got) == 3
    assert broker.asked == [REF]


def test_what_an_older_agent_kept_is_fetched_anew_and_will_do_until_then(tmp_path: Path) -> None:
    """It may lack what that one did not know, and so allows less."""
    broker, got = Broker(), list[Any]()
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "P.3.json").write_text(json.dumps({"version": 3, "document": DOCUMENT}))  # as 0.1.0 keeps it
    personas = Personas(tmp_path / "p", broker.fetch)
    assert personas.get(REF).resource_limits.pids == 9
    personas.backed(granted(), got.append)
    assert (got, broker.asked) == ([], [REF])
    broker.answer(Denied(Reason.BROKER_UNREACHABLE, help="away"))
    assert got == [granted()]
    personas.backed(granted(), got.append)
    broker.answer({"version": 3, "document": {**DOCUMENT, "description": "the whole"}})
    personas.backed(granted(), got.append)
    assert got == [granted()] * 3
    assert broker.asked == [REF, REF]
    assert personas.get(REF).description == "the whole"
    later = Personas(tmp_path / "p", broker.fetch)
    later.backed(granted(), got.append)
    assert len(got) == 4


@pytest.mark.parametrize(
    "answer",
    [
        Denied(Reason.BROKER_UNREACHABLE, help="away"),
        None,
        {"version": 4, "document": DOCUMENT},
        {"version": 3, "document": {**DOCUMENT, "name": "Q"}},
        {"version": 3, "document": {**DOCUMENT, "unknown": 1}},
        {"version": 3, "document": {"kind": "Policy", "name": "P", "subjects": {"users": ["a"]}, "persona": "P"}},
    ],
)
def test_what_is_no_such_document_denies(tmp_path: Path, answer: Any) -> None:
    broker, got = Broker(), list[Any]()
    personas = Personas(tmp_path / "p", broker.fetch)
    personas.backed(granted(), got.append)
    broker.answer(answer)
    assert isinstance(got[0], Denied)
    assert got[0].reason in (Reason.PERSONA_UNAVAILABLE, Reason.BROKER_UNREACHABLE)
    assert list((tmp_path / "p").glob("*")) == []
    personas.backed(granted(), got.append)
    assert len(broker.asked) == 2  # it is asked again: a refusal is not kept


def test_a_name_that_is_a_path_reaches_no_file(tmp_path: Path) -> None:
    broker, got = Broker(), list[Any]()
    personas = Personas(tmp_path / "p", broker.fetch)
    personas.backed(granted(PersonaRef("../../etc/x", 1)), got.append)
    assert got[0].reason is Reason.PERSONA_UNAVAILABLE
    assert broker.asked == []


def test_a_broken_file_is_fetched_anew_and_their_number_is_bounded(tmp_path: Path) -> None:
    broker = Broker()
    personas = Personas(tmp_path / "p", broker.fetch)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "P.3.json").write_text('{"version": 3')
    personas.ensure(REF, lambda _denied: None)
    assert broker.asked == [REF]
    for version in range(1, 600):
        personas.ensure(PersonaRef("P", version), lambda _denied: None)
        broker.answer({"version": version, "document": DOCUMENT})
    assert len(os.listdir(tmp_path / "p")) <= 512
    assert personas.get(PersonaRef("P", 599)).name == "P"


def test_a_document_survives_the_way_to_disk() -> None:
    persona = parse_document(DOCUMENT)
    assert parse_document(json.loads(json.dumps(to_mapping(persona)))) == persona


# --- homes ------------------------------------------------------------------------------------------


def test_a_home_outlives_the_agent() -> None:
    home = Placement("s-1", 1000, SCOPE, Image(1, 2), PersonaRef("P", 3))
    assert home.add(place_of("s-1", 1000, PersonaRef("P", 3), SCOPE)) is None
    assert home.only == PersonaRef("P", 3)
    home.add(place_of("s-1", 1000, PersonaRef("P", 2), SCOPE, withdrawn=True))
    home.add(place_of("s-1", 1000, PersonaRef("Q", 1), SCOPE, shared=True))
    assert home.only is None
    assert Placement.from_json(json.loads(json.dumps(home.to_json()))) == home
    home.drop("-P")
    home.drop("Q")
    assert home.only == PersonaRef("P", 3)
    with pytest.raises(KeyError):
        Placement.from_json({})


def test_a_service_manager_is_one_place_under_any_persona() -> None:
    manager = "user.slice/user-1000.slice/user@1000.service"
    home = Placement("s-1", 1000, f"{manager}/init.scope", Image(1, 2))
    home.add(place_of("s-1", 1000, NO_PERSONA, home.found))
    home.add(place_of("s-1", 1000, PersonaRef("P", 1), home.found))
    assert list(home.places) == [MANAGED]
    assert home.managed


# --- plans ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Notes what is done with it; fails where it is told to."""

    name: str
    log: list[str]
    fails: tuple[str, ...] = ()

    def describe(self) -> dict[str, object]:
        return {"op": self.name}

    def _do(self, what: str) -> None:
        self.log.append(f"{what} {self.name}")
        if what in self.fails:
            raise OSError(f"{what} failed")

    def apply(self) -> None:
        self._do("apply")

    def undo(self) -> None:
        self._do("undo")


def test_a_plan_that_fails_is_undone_in_reverse_and_says_all_that_failed() -> None:
    log: list[str] = []
    with pytest.raises(PlanError) as caught:
        apply((Step("a", log), Step("b", log, ("undo",)), Step("c", log, ("apply",)), Step("d", log)))
    assert log == ["apply a", "apply b", "apply c", "undo b", "undo a"]
    assert caught.value.message == "c: apply failed; undoing it: b: undo failed"


def test_of_some_plans_as_much_as_can_be_is_applied() -> None:
    log: list[str] = []
    assert apply_each((Step("a", log), Step("b", log, ("apply",)), Step("c", log))) == ["b: apply failed"]
    assert log == ["apply a", "apply b", "apply c"]


def test_undoing_goes_on_after_a_failure_and_raises_once() -> None:
    log: list[str] = []
    with pytest.raises(PlanError, match=r"c: undo failed; a: undo failed"):
        undo((Step("a", log, ("undo",)), Step("b", log), Step("c", log, ("undo",))))
    assert log == ["undo c", "undo b", "undo a"]


# --- alarms and what is shown -----------------------------------------------------------------------


@pytest.fixture
def counted(tmp_path: Path) -> Iterator[tuple[Loop, FakeHierarchy, list[Reason]]]:
    tree, told = FakeHierarchy(tmp_path / "cgroup"), list[Reason]()
    tree.grow(f"{SCOPE}/P")
    for file, text in (("memory.events", "low 0\noom_kill 1\n"), ("pids.events", "max 4\n")):
        Path(tree.path(f"{SCOPE}/P", file)).write_text(text)
    loop = Loop()
    alarms = Alarms(loop, tree, lambda _place, reason: told.append(reason))
    alarms.watch(place_of("s-1", 1000, PersonaRef("P", 1), SCOPE))
    yield loop, tree, told


def test_a_limit_that_is_met_is_told_once_in_a_while(counted: tuple[Loop, FakeHierarchy, list[Reason]]) -> None:
    loop, tree, told = counted

    def later() -> None:
        for count in (5, 6, 7):
            Path(tree.path(f"{SCOPE}/P", "pids.events")).write_text(f"max {count}\n")
        Path(tree.path(f"{SCOPE}/P", "memory.events")).write_text("low 9\noom_kill 1\n")  # nothing was killed
        loop.call_later(0.1, loop.stop)

    loop.call_later(0.0, later)
    loop.run()
    assert told == [Reason.PIDS_LIMIT]


def test_an_alarm_that_fails_ends_no_loop(counted: tuple[Loop, FakeHierarchy, list[Reason]]) -> None:
    loop, tree, _ = counted
    tried: list[Reason] = []

    def fails(_place: PersonaCgroup, reason: Reason) -> None:
        tried.append(reason)
        raise (OSError(24, "too many open files") if reason is Reason.PIDS_LIMIT else PersonaError(reason, "full"))

    alarms = Alarms(loop, tree, fails)
    alarms.watch(place_of("s-1", 1000, PersonaRef("P", 1), SCOPE))
    for file, text in (("memory.events", "oom_kill 2\n"), ("pids.events", "max 5\n")):
        Path(tree.path(f"{SCOPE}/P", file)).write_text(text)
    loop.call_later(0.1, loop.stop)
    loop.run()
    assert sorted(tried) == [Reason.MEMORY_LIMIT, Reason.PIDS_LIMIT]


def test_lines_for_people() -> None:
    persona = Persona("P", patterns("ls"), ResourceLimits(memory_bytes=512 << 20, pids=20))
    assert "out of memory, a program was killed: persona P allows 512 MiB" in limit_line(persona, Reason.MEMORY_LIMIT)
    left = limit_line(persona, Reason.MEMORY_LIMIT, 90 << 20)
    assert left.endswith("allows 512 MiB, and files in memory (see /dev/shm) that you left there have 90 MiB of it")
    assert "persona P allows 20 at once" in limit_line(persona, Reason.PIDS_LIMIT)
    assert [amount(size) for size in (0, 1536, 3 << 30, 5 << 40)] == ["0 B", "1.5 KiB", "3 GiB", "5 TiB"]
    place = {
        "persona": {"name": "P", "version": 1},
        "withdrawn": False,
        "limits": {"cpu": "150%", "memory": 1 << 30, "disk_io": {"read_bps": 1000}},
        "use": {"cpu_percent": 75.0, "memory": 1 << 28, "pids": 3, "read_bps": 0, "write_bps": 5,
                "pressure": {"cpu": 1.5, "memory": 0.0, "io": 0.0}},
    }  # fmt: skip
    lines = list(place_lines([place], bars=True))
    assert lines[1] == "  cpu        [##########..........] 75 % of 150 %; pressure 1.5 %"
    assert lines[2].endswith("[#####...............] 256 MiB of 1 GiB; pressure 0 %")
    assert "processes" in lines[3]
    assert lines[3].endswith("3, no limit")
    assert "[" not in "".join(place_lines([place], bars=False))
