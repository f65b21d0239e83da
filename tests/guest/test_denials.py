"""``persona denials``: a user's own, wherever their standard error went; bounded, kept, and nobody else's."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from persona_guest.agent.greeting import Greeting
from persona_guest.agent.requests import Users
from persona_guest.audit.denials import DenialFiles
from persona_guest.core import denials as bounds
from persona_guest.core.denials import Book, Denial
from persona_guest.ipc.users import Call
from persona_guest.loop import Loop
from persona_guest.session.model import Session
from persona_guest.settings import Settings
from persona_guest.shell import trial

from persona.decisions import Denied, Subject
from persona.problems import Fault, PersonaError, Reason
from tests.guest.conftest import Run, SmallDisk, trial_of

ALICE, BOB = 1000, 1001


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A persona that has neither python nor ``persona``."""
    path = tmp_path_factory.mktemp("narrow") / "persona.yaml"
    path.write_text("kind: Persona\nname: Narrow\ncommand_whitelist: [bash, ls, ln, cp, mkdir, cat]\n")
    return path


@pytest.fixture(scope="module")
def narrow_agent(narrow: Path) -> Iterator[Path]:
    with trial_of(narrow) as socket:
        yield socket


# --- what is in it ---------------------------------------------------------------------------------


def shown(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(text.splitlines()[-1])["items"]
    return found


SILENT = {
    "to a file": "strace {} 2>file",
    "to nobody": "strace {} 2>&-",
    "to /dev/null": "strace {} 2>/dev/null",
    "to a socket": "python3 -c 'import os, socket; s, t = socket.socketpair(); os.dup2(s.fileno(), 2); "
    'os.execvp("strace", ["strace", "{}"])\'',
    "in the background": "(strace {} 2>&- &) ; wait; sleep 0.3",
}


@pytest.mark.parametrize("way", SILENT)
def test_a_denial_that_nobody_saw_is_there_with_its_reason_and_what_helps(gated: Run, way: str) -> None:
    mark = way.replace(" ", "-")
    done = gated(SILENT[way].format(mark) + "; persona denials --json; persona denials >&2")
    found = [one for one in shown(done.stdout) if mark in one["command"]]
    assert len(found) == 1, done
    assert {**found[0], "at": "", "first_at": "", "session": ""} == {
        "at": "", "first_at": "", "session": "", "count": 1, "event": "exec", "program": "/usr/bin/strace",
        "command": f"strace {mark}", "reason": "no_matching_policy", "persona": "Trial", "policy": "trial-Trial",
        "policy_origin": "policy-0.json:1",
        "help": "not in its whitelist; 'persona list' shows what is",
    }  # fmt: skip
    assert found[0]["at"].endswith("Z")
    under = "under persona Trial, policy trial-Trial (policy-0.json:1)"  # as in the line of the denial itself
    assert f"  /usr/bin/strace: denied, no_matching_policy {under}\n" in done.stderr
    assert f"    command: strace {mark}\n    not in its whitelist; 'persona list' shows what is\n" in done.stderr


def test_one_command_counts_once_and_the_same_again_counts_up(gated: Run) -> None:
    script = 'python3 -c \'import os; os.execvp("strace", ["strace", "counted"])\'; '
    done = gated(script * 3 + "persona denials --json")
    assert [one["count"] for one in shown(done.stdout) if one["command"] == "strace counted"] == [3]


def test_nothing_was_denied(gated: Run, narrow: Path) -> None:
    done = gated("persona denials; persona greeting", files=narrow)
    assert done.stdout.startswith("nothing was denied to you lately on this machine\npersona: Narrow v1 on trial;")
    assert done.stdout.endswith("'persona denials' what was refused\n")


def test_the_greeting_tells_of_them(gated: Run, narrow_agent: Path) -> None:
    done = gated("strace a; strace b; persona greeting", by=narrow_agent)
    assert done.stdout.endswith("'persona denials' what was refused (2 in the last day)\n")


# --- whose they are --------------------------------------------------------------------------------


def test_who_became_somebody_else_in_a_session_sees_nobody_s(gated: Run, agent: Path) -> None:
    """As su and sudo do; the kernel says who connects."""
    ask = (
        "import json, os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "os.setgroups([]); os.setgid(1234) if int(sys.argv[2]) else 0; os.setuid(int(sys.argv[2]))\n"
        "s.connect(sys.argv[1]); s.send(json.dumps({'op': sys.argv[3]}).encode()); print(s.recv(200000).decode())"
    )
    agent.parent.parent.chmod(0o711)
    try:
        done = gated(
            f'strace hidden; for op in denials greeting; do python3 -c "{ask}" {agent} 1234 $op; done; '
            f'python3 -c "{ask}" {agent} 0 denials'
        )
    finally:
        agent.parent.parent.chmod(0o700)
    denials, greeting, own = map(json.loads, done.stdout.splitlines())
    assert (denials["ok"], denials["code"]) == (False, "unauthenticated")
    assert greeting == {"ok": True, "greeting": None}
    assert own["items"][-1]["command"] == "strace hidden"


class Machine:
    """Users' requests, and the book that they are about."""

    def __init__(self) -> None:
        self.session = Session("s-1", Subject("alice", (), "vm"), ALICE, "sshd", "", "/bin/bash", 1, None, 0)
        self.book = Book()
        registry = Mock(find=lambda _pid: Mock(session=self.session), get=lambda _id: None)
        self.users = Users(
            settings=Settings(), registry=registry, supervisor=Mock(), openings=Mock(), identifier=Mock(),
            hang_watchdog=Mock(), decider=Mock(), broker_client=Mock(), denials=self.book,
            greeting=Greeting(Settings(), registry, self.book), status=Mock(), resource_status=Mock(), release=Mock(),
        )  # fmt: skip

    def ask(self, uid: int, op: str = "denials") -> dict[str, Any]:
        answers: list[dict[str, Any]] = []
        self.users.handle(Call(7, uid, uid, op, {"op": op}, ()), answers.append)
        return answers[0]


def denied(uid: int, command: str, at: float = 1.0) -> Denial:
    return Denial(at, "exec", f"/home/{uid}/x", command, Reason.NO_MATCHING_POLICY, help="h", first_at=at)


def test_root_in_another_s_session_is_refused_and_told_nothing() -> None:
    machine = Machine()
    machine.book.add(ALICE, denied(ALICE, "hers"))
    machine.book.add(0, denied(0, "root's"))
    assert [one["command"] for one in machine.ask(ALICE)["items"]] == ["hers"]
    with pytest.raises(PersonaError) as refused:
        machine.ask(0)
    assert refused.value.code is Fault.UNAUTHENTICATED
    assert "alice" not in refused.value.message


def test_a_greeting_that_another_reads_tells_of_no_denial() -> None:
    machine = Machine()
    machine.book.add(ALICE, denied(ALICE, "hers", at=1e12))
    machine.book.add(0, denied(0, "root's", at=1e12))
    assert "(1 in the last day)" in machine.ask(ALICE, "greeting")["greeting"]
    assert "last day" not in machine.ask(0, "greeting")["greeting"]


# --- bounds ----------------------------------------------------------------------------------------


def test_a_loop_of_one_user_pushes_out_nobody_else_s_and_stays_small() -> None:
    book = Book()
    book.add(BOB, denied(BOB, "bob's"))
    for number in range(20_000):
        book.add(ALICE, denied(ALICE, f"{number} " + "\U0001f600" * 5000))
    assert [one.command for one in book.of(BOB)] == ["bob's"]
    assert 0 < len(book.of(ALICE)) <= bounds.USER_MAX
    assert len(book.page(ALICE)) <= bounds.USER_BYTES
    assert book.of(ALICE)[-1].command.startswith("19999 ")


def test_many_users_are_bounded_and_those_of_long_ago_go_first() -> None:
    book = Book()
    for uid in range(3 * bounds.USERS_MAX):
        book.add(uid, denied(uid, "x"))
        book.add(ALICE, denied(ALICE, "again and again"))
    assert sum(bool(book.of(uid)) for uid in range(3 * bounds.USERS_MAX)) == bounds.USERS_MAX
    assert book.of(3 * bounds.USERS_MAX - 1)
    assert not book.of(0)
    assert book.of(ALICE)[-1].count > 1000


def test_the_same_command_takes_no_second_place_and_is_the_newest_again() -> None:
    book = Book()
    for at, command in enumerate(["a", "b", "a"], 1):
        book.add(ALICE, denied(ALICE, command, float(at)))
    assert [(one.command, one.count, one.first_at, one.at) for one in book.of(ALICE)] == [
        ("b", 1, 2, 2),
        ("a", 2, 1, 3),
    ]
    assert (book.since(ALICE, 2.5), book.since(ALICE, 0), book.since(BOB, 0)) == (1, 2, 0)


# --- kept for the next agent -----------------------------------------------------------------------


def test_they_outlive_the_agent(tmp_path: Path) -> None:
    book = Book()
    kept = DenialFiles(Loop(), tmp_path / "denials", book)
    for number in range(3):
        refused = Denied(Reason.LOAD_UNKNOWN, "p", "P", "h", policy_origin="a.yaml:3")
        book.note(ALICE, number, "exec", "/x\udcff", f"{number}", refused, "s-1")
    book.add(BOB, denied(BOB, "b"))
    kept.write()
    after = Book()
    DenialFiles(Loop(), tmp_path / "denials", after)
    assert after.of(ALICE) == book.of(ALICE)
    assert [one.policy_origin for one in after.of(ALICE)] == ["a.yaml:3"] * 3
    assert after.of(BOB) == book.of(BOB)
    assert after.changed == set()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "denials").iterdir()} == {0o600}


def test_a_page_of_an_agent_that_kept_no_origins_is_taken_up() -> None:
    book = Book()
    book.note(ALICE, 1, "exec", "/x", "x", Denied(Reason.LOAD_UNKNOWN, "p", "P", "h", policy_origin="a.yaml:3"), "s-1")
    (kept,) = json.loads(book.page(ALICE))
    assert kept.pop("policy_origin") == "a.yaml:3"
    after = Book()
    assert after.restore([(ALICE, json.dumps([kept]))]) == []
    assert after.of(ALICE) == (replace(book.of(ALICE)[0], policy_origin=""),)
    assert after.restore([(BOB, json.dumps([{**kept, "policy_origin": None}]))]) == [BOB]


def test_the_same_command_has_the_origin_of_the_newest_denial() -> None:
    book = Book()
    for line in (3, 4):
        origin = f"a.yaml:{line}"
        book.note(ALICE, line, "exec", "/x", "x", Denied(Reason.LOAD_UNKNOWN, "p", "P", policy_origin=origin))
    assert [(one.count, one.policy_origin) for one in book.of(ALICE)] == [(2, "a.yaml:4")]


def test_a_real_agent_tells_what_the_one_before_it_denied(gated: Run, narrow: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="persona-") as name:
        home = Path(name)
        for command in ("strace before", "true"):
            with ExitStack() as stack:
                trial.start(stack, home, [str(narrow)])
                done = gated(f"{command}; persona denials --json", by=home / "run" / "agent.sock")
                assert [one["command"] for one in shown(done.stdout)][:1] == ["strace before"]
            (home / "notify").unlink()  # what a trial makes once
            shutil.rmtree(home / "bin")


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", '[{"at": 1}]', "[" * 100_000, "[1]", '[{"at": "x"}]'])
def test_a_page_that_cannot_be_read_is_forgotten_and_goes(tmp_path: Path, text: str) -> None:
    good = Book()
    good.add(BOB, denied(BOB, "b"))
    (tmp_path / f"{ALICE}.json").write_text(text)
    (tmp_path / f"{BOB}.json").write_text(good.page(BOB))
    (tmp_path / "x.json").write_text("x")
    book = Book()
    kept = DenialFiles(Loop(), tmp_path, book)
    assert (book.of(ALICE), len(book.of(BOB))) == ((), 1)
    kept.write()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{BOB}.json", "x.json"]


def test_a_full_disk_keeps_no_denial_from_its_user_and_they_are_written_later(
    small_disk: SmallDisk, caplog: pytest.LogCaptureFixture
) -> None:
    book = Book()
    kept = DenialFiles(Loop(), small_disk.path / "denials", book)
    small_disk.fill()
    small_disk.fill_files()
    book.add(ALICE, denied(ALICE, "x" * 700))
    kept.write()
    kept.write()
    assert len(caplog.records) == 1
    assert len(book.of(ALICE)) == 1
    small_disk.empty()
    kept.write()
    assert (small_disk.path / "denials" / f"{ALICE}.json").read_text() == book.page(ALICE)


def test_what_is_written_at_once_is_bounded(tmp_path: Path) -> None:
    book = Book()
    kept = DenialFiles(Loop(), tmp_path, book)
    for uid in range(100):
        book.add(uid, denied(uid, "x"))
    kept.write(32)
    assert len(os.listdir(tmp_path)) == 32
    for _ in range(3):
        kept.write(32)
    assert len(os.listdir(tmp_path)) == 100
