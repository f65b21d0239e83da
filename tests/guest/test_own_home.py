"""Programs in a home: which files count as a user's own, and what the gate does with them, on real files and tasks."""

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from persona_broker.policy.conditions import ConditionState
from persona_broker.policy.snapshot import Snapshot, Versioned
from persona_guest.core.reassignment import Applicable, choose
from persona_guest.kernel.task import Task
from persona_guest.program import exec_request as exec_requests
from persona_guest.program.exec_request import ExecRequest
from persona_guest.program.identity import Identifier
from persona_guest.program.own_home import Owner
from persona_guest.program.process import read_running
from persona_guest.settings import Gate
from persona_guest.system.homes import Homes, home_in_database

from persona import codec
from persona.decisions import Decision, PersonaRef, Request
from persona.documents import Persona, Policy, parse_document
from persona.patterns import Whitelist, parse_pattern
from tests.guest.test_supervisor import gated_child, outcome, supervise
from tests.waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to others")

UID, OTHER = 61234, 61235
LOADER = "/lib64/ld-linux-x86-64.so.2"
NODE = ".tool-server/bin/v1/node"


def give(path: Path, uid: int = UID) -> Path:
    os.chown(path, uid, uid)
    return path


@pytest.fixture
def home() -> Iterator[Path]:
    """A home with a program of its user's in it."""
    with tempfile.TemporaryDirectory(prefix="homes-") as name:
        Path(name).chmod(0o755)
        found = Path(name) / "user"
        for part in ("", ".tool-server", ".tool-server/bin", ".tool-server/bin/v1"):
            (found / part).mkdir()
            give(found / part)
        shutil.copy("/usr/bin/sleep", found / NODE)
        give(found / NODE)
        yield found


@pytest.fixture
def task(home: Path) -> Iterator[Task]:
    """A process of the user's."""
    with subprocess.Popen(["/usr/bin/sleep", "60"], user=UID, group=UID, extra_groups=[]) as process:
        yield Task(process.pid)
        process.kill()


Look = Callable[..., ExecRequest]


@pytest.fixture
def exec_request(home: Path, task: Task) -> Look:
    identifier = Identifier(Gate())

    def found(path: Path = home / NODE, at: str | None = None, task: Task = task) -> ExecRequest:
        owner = Owner(UID, lambda uid: (str(home) if at is None else at) if uid == UID else "")
        return exec_requests.request_for(
            task, task.open_program(os.fsencode(path)), os.fsencode(path), (b"x",), identifier, owner
        )

    return found


def below(exec_request: ExecRequest) -> str:
    assert (exec_request.obstacles[0] is None) == bool(exec_request.stages[0].found.program.home)
    return exec_request.stages[0].found.program.home


def test_a_program_in_the_home_is_known_by_its_path(exec_request: Look, home: Path) -> None:
    program = exec_request().stages[0].found.program
    assert (program.home, program.path, program.names) == (NODE, str(home / NODE), ())
    assert not exec_request().stages[0].found.trusted


def capable(path: Path) -> None:
    os.setxattr(path, "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))


SPOILED: dict[str, Callable[[Path], object]] = {
    "another's": lambda path: os.chown(path, OTHER, UID),
    "root's": lambda path: os.chown(path, 0, 0),
    "setuid": lambda path: path.chmod(0o4755),
    "setgid": lambda path: path.chmod(0o2755),
    "capabilities": capable,
    "everybody may write it": lambda path: path.chmod(0o757),
    "a script": lambda path: path.write_text("#!/bin/true\n"),
    "a loader": lambda path: give(Path(shutil.copy(LOADER, path))),
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_what_is_no_program_of_the_users_own(exec_request: Look, home: Path, spoil: str) -> None:
    SPOILED[spoil](home / NODE)
    assert below(exec_request()) == ""


def test_group_members_may_write_it(exec_request: Look, home: Path) -> None:
    (home / NODE).chmod(0o775)
    assert below(exec_request()) == NODE


def test_only_below_the_home_of_the_account_database(exec_request: Look, home: Path, tmp_path: Path) -> None:
    assert below(exec_request(at="")) == ""
    assert below(exec_request(at="/")) == ""
    assert below(exec_request(at="/nonexistent")) == ""
    assert below(exec_request(at=f"{home}/.tool-server")) == NODE.removeprefix(".tool-server/")
    assert below(exec_request(at=str(home.parent))) == ""  # that is not the user's directory
    (home.parent / "link").symlink_to(home)
    assert below(exec_request(at=str(home.parent / "link"))) == NODE
    outside = give(Path(shutil.copy("/usr/bin/sleep", home.parent / "outside")))
    assert below(exec_request(outside)) == ""
    (home / "way").symlink_to(home.parent)
    assert below(exec_request(home / "way" / "outside")) == ""
    assert below(exec_request(home / "way" / "user" / NODE)) == NODE  # where it really is counts


def test_another_s_process_starts_none(exec_request: Look) -> None:
    assert below(exec_request(task=Task(os.getpid()))) == ""


def test_a_mount_is_not_the_home(exec_request: Look, home: Path) -> None:
    there = home / "mnt"
    there.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(there)], check=True)
    try:
        give(Path(shutil.copy("/usr/bin/sleep", there / "node")))
        assert below(exec_request(there / "node")) == ""
    finally:
        subprocess.run(["umount", str(there)], check=True)
    subprocess.run(["mount", "--bind", str(home / ".tool-server"), str(there)], check=True)
    try:
        assert below(exec_request(there / "bin/v1/node")) == ""
    finally:
        subprocess.run(["umount", str(there)], check=True)


def test_a_mount_of_the_task_s_own_is_not_the_home(home: Path) -> None:
    program = give(Path(shutil.copy("/usr/bin/sleep", home.parent / "outside")))
    script = f"mount --bind {program} {home / NODE} && exec setpriv --reuid {UID} --regid {UID} --clear-groups sleep 60"
    with subprocess.Popen(["unshare", "-m", "sh", "-c", script]) as process:
        try:
            until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
            path, task = os.fsencode(home / NODE), Task(process.pid)
            owner = Owner(UID, lambda _uid: str(home))
            found = exec_requests.request_for(task, task.open_program(path), path, (b"x",), Identifier(Gate()), owner)
            assert found.stages[0].found.image.inode == program.stat().st_ino
            assert below(found) == ""
        finally:
            process.kill()


# --- what a decision is about -------------------------------------------------------------------------


def key(exec_request: ExecRequest) -> tuple[int, bytes]:
    question = exec_request.question(0, 1)
    return question.file, question.argv0


def test_a_lease_holds_for_one_path_and_one_state_of_the_file(exec_request: Look, home: Path) -> None:
    first = key(exec_request())
    assert key(exec_request()) == first
    os.link(home / NODE, home / "another")
    assert key(exec_request()) != key(exec_request(home / "another"))
    before = key(exec_request())
    (home / ".tool-server/bin").rename(home / ".tool-server/moved")  # which leaves no mark on the file
    moved = exec_request(home / ".tool-server/moved/v1/node")
    assert key(moved) != before
    assert moved.question(0, 1).program.home == ".tool-server/moved/v1/node"
    before = key(moved)
    with open(home / ".tool-server/moved/v1/node", "ab") as file:
        file.write(b"x")
    assert key(exec_request(home / ".tool-server/moved/v1/node")) != before


# --- the gate -----------------------------------------------------------------------------------------


def broker(*whitelist: str, home_programs: tuple[str, ...] = ()) -> Callable[[Request], Decision]:
    """A broker's own decision, the request over the wire."""
    persona = parse_document(
        {"kind": "Persona", "name": "A", "command_whitelist": list(whitelist), "home_programs": list(home_programs)}
    )
    policy = parse_document({"kind": "Policy", "name": "a", "subjects": {"users": ["u"]}, "persona": "A"})
    assert isinstance(persona, Persona) and isinstance(policy, Policy)
    snapshot = Snapshot([policy], {"A": Versioned(persona, 1)})
    return lambda request: snapshot.decide(codec.decode_request(codec.encode_request(request)), ConditionState(1, {}))


def start(path: Path | str, decide: Callable[[Request], Decision], home: Path, shell: str = "/nonexistent") -> int:
    pid, listener = gated_child(str(path), UID)
    supervise(listener, decide, uid=UID, home=str(home), shell=shell)
    return outcome(pid)


WRONG_USE = 1  # what sleep ends with, without an argument: it ran
DENIED = 13


def test_the_gate_starts_what_the_persona_names(home: Path) -> None:
    node = home / NODE
    assert start(node, broker("**", "/usr/bin/*"), home) == DENIED
    assert start(node, broker(home_programs=("other/**",)), home) == DENIED
    assert start(node, broker(home_programs=(".tool-server/**/node",)), home) == WRONG_USE
    (home / "way").symlink_to(node)
    assert start(home / "way", broker(home_programs=("way",)), home) == DENIED
    assert start(home / "way", broker(home_programs=(".tool-server/**/node",)), home) == WRONG_USE
    assert start(node, broker(home_programs=("**",)), home.parent) == DENIED


def test_it_is_the_interpreter_of_nothing(home: Path) -> None:
    script = home / "script"
    script.write_text(f"#!{home / NODE}\n")
    script.chmod(0o755)
    assert start(give(script), broker(home_programs=("**",)), home) == DENIED
    trusted = home.parent / "trusted"
    trusted.write_text(f"#!{home / NODE}\n")
    trusted.chmod(0o755)
    assert start(trusted, broker(str(trusted), "**", home_programs=("**",)), home) == DENIED


def test_it_is_the_loader_of_nothing(home: Path, tmp_path: Path) -> None:
    """A program in the home whose loader is one too: both would be the user's."""
    loader = give(Path(shutil.copy(os.path.realpath(LOADER), home / "loader")))
    (tmp_path / "x.c").write_text("int main(void) { return 7; }\n")
    for name, linked in (("foreign", loader), ("plain", LOADER)):
        argv = ["cc", "-o", str(home / name), str(tmp_path / "x.c"), f"-Wl,--dynamic-linker={linked}"]
        subprocess.run(argv, check=True, timeout=60)
        give(home / name)
    assert start(home / "plain", broker(home_programs=("**",)), home) == 7
    assert start(home / "foreign", broker(home_programs=("**",)), home) == DENIED
    assert start(loader, broker(home_programs=("**",)), home) == DENIED


def test_it_is_no_login_shell(home: Path) -> None:
    node = home / NODE
    assert start(node, broker(), home, shell=str(node)) == DENIED


# --- what runs already --------------------------------------------------------------------------------


def test_what_runs_from_the_home_follows_its_persona(home: Path) -> None:
    persona = parse_document(
        {"kind": "Persona", "name": "A", "command_whitelist": [], "home_programs": [".tool-server/**/node"]}
    )
    assert isinstance(persona, Persona)
    held = Applicable(PersonaRef("A", 1), "a", Whitelist((parse_pattern("**"),)))
    with subprocess.Popen([home / NODE, "60"], user=UID, group=UID, extra_groups=[]) as process:
        try:
            running = read_running(process.pid, Identifier(Gate()), Owner(UID, lambda _uid: str(home)))
            assert choose(running.trusted, [(held, persona)]) == held.ref
            stranger = read_running(process.pid, Identifier(Gate()), Owner(OTHER, lambda _uid: str(home)))
            assert choose(stranger.trusted, [(held, persona)]) is None
            assert choose(read_running(process.pid, Identifier(Gate())).trusted, [(held, persona)]) is None
        finally:
            process.kill()


# --- the account database -----------------------------------------------------------------------------


def test_homes_are_asked_for_in_a_thread_and_anew_after_a_while() -> None:
    now = [0.0]
    asked: list[int] = []
    delivered: list[Callable[[], None]] = []
    entries = {7: "/home/seven"}

    def look_up(uid: int) -> str:
        asked.append(uid)
        return entries.get(uid, "")

    def settle(count: int) -> None:
        until(lambda: len(delivered) >= count)
        delivered[count - 1]()

    homes = Homes(delivered.append, look_up, lambda: now[0])
    assert homes.of(7) == ""
    homes.want(7)  # while it is being asked: not a second time
    assert homes.of(8) == ""  # after it
    settle(1)
    settle(2)
    assert homes.of(7) == "/home/seven"
    assert homes.of(8) == ""
    now[0] = 6.0
    assert homes.of(8) == ""  # there was no answer: asked for again soon
    settle(3)
    entries[7] = "/srv/seven"
    now[0] = 61.0
    assert homes.of(7) == "/home/seven"
    settle(4)
    assert homes.of(7) == "/srv/seven"
    assert asked == [7, 8, 8, 7]


def test_without_a_thread_a_home_is_asked_for_again_by_the_next_who_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    delivered: list[Callable[[], None]] = []
    homes = Homes(delivered.append, lambda _uid: "/home/seven")
    with monkeypatch.context() as short:
        short.setattr(threading.Thread, "start", refused)
        assert homes.of(7) == ""
    assert homes.of(7) == ""
    until(lambda: delivered)
    delivered[0]()
    assert homes.of(7) == "/home/seven"


def test_the_account_database_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/tmp/elsewhere")
    assert home_in_database(0) == "/root"
    assert home_in_database(0xFFFF_FFF0) == ""
