"""Running processes of a session whose persona changed: each is moved, or withdrawn, however it hides."""

import contextlib
import errno
import os
import pty
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn, cast

import pytest
from persona_guest import ending
from persona_guest import sorter as sorters
from persona_guest.core.following import Held
from persona_guest.core.sessions import Session
from persona_guest.enforce.cgroups import Cgroups
from persona_guest.enforce.home import Home
from persona_guest.enforce.refusals import Refusal
from persona_guest.enforcer import Enforcer
from persona_guest.gate.guard import Guard
from persona_guest.gate.identity import Identifier, Image
from persona_guest.gate.pending import Gated
from persona_guest.gate.running import UNKNOWN, Running, look
from persona_guest.gate.supervisor import Supervisor
from persona_guest.kernel.task import living
from persona_guest.loop import Loop
from persona_guest.notices import Notices
from persona_guest.personas import Personas
from persona_guest.settings import Gate, Settings
from persona_guest.sorter import Sorter

from persona.codec import Record
from persona.decisions import PersonaRef, Subject
from persona.documents import Persona, parse_document
from persona.patterns import Whitelist, parse_pattern
from persona.problems import Reason
from tests.guest.fake_cgroups import FakeHierarchy
from tests.guest.headless import headless

OLD, NEW = PersonaRef("Old", 1), PersonaRef("New", 1)
COUNTED = PersonaRef("Old", 2)  # for all sessions together
SCOPE = "user.slice/user-1000.slice/session-1.scope"
MANAGER = "user.slice/user-1000.slice/user@1000.service"
SESSION = Session("s-1", Subject("alice", (), "vm"), 1000, "sshd", "", "/bin/bash", 1, None, 0.0)
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


def document(name: str, whitelist: list[str], on_revoke: str, per: str = "session") -> Persona:
    found = parse_document(
        {
            "kind": "Persona",
            "name": name,
            "command_whitelist": whitelist,
            "on_revoke": on_revoke,
            "resource_limits": {"per": per},
        }
    )
    assert isinstance(found, Persona)
    return found


class Documents:
    """A fake store of personas."""

    def __init__(self, on_revoke: str) -> None:
        self.known = {
            OLD: document("Old", ["**"], on_revoke),
            COUNTED: document("Old", ["**"], on_revoke, "persona"),
            NEW: document("New", ["/usr/bin/true"], on_revoke),
        }

    def get(self, ref: PersonaRef) -> Persona:
        return self.known[ref]


class Site:
    """A sorter over a fake hierarchy, and a session under Old in it."""

    def __init__(self, directory: Path, on_revoke: str) -> None:
        self.loop = Loop()
        self.tree = FakeHierarchy(directory / "tree")
        self.tree.grow(SCOPE)
        self.told: list[str] = []
        enforcer = Enforcer(
            self.loop, self.tree, [Cgroups(self.tree, "/dev/null")], cast(Personas, Documents(on_revoke)),
            directory / "places", lambda _session: OLD, lambda _place: None,
        )  # fmt: skip
        self.enforcer = enforcer
        self.home = enforcer.homes["s-1"] = Home("s-1", 1000, SCOPE, Image(0, 0), OLD)
        self.gated = Gated(SESSION, -1, 0, (), b"s-1")
        self.records: list[Record] = []
        supervisor = cast(Supervisor, SimpleNamespace(sessions={"s-1": self.gated}))  # all that is asked of it
        self.notices = notices = Notices(self.loop, enforcer, supervisor, Guard(lambda: None), self.records.append)
        self.sorter = Sorter(
            Settings(), self.loop, enforcer, Identifier(Gate()), Guard(lambda: None),
            lambda _home, line: self.told.append(line), notices.note,
        )  # fmt: skip

    def put(self, pid: int, *, withdrawn: bool = False) -> str:
        """The cgroup of Old, with a process in it."""
        place = self.enforcer.enter(self.home, OLD, withdrawn=withdrawn)
        Path(self.tree.path(place.cgroup, "cgroup.kill")).write_text("0")
        self.tree.move(place.cgroup, pid)
        return place.cgroup

    def serve(self, pid: int) -> None:
        """A session that is a service manager under Old, with a process in it."""
        self.tree.grow(f"{MANAGER}/app.slice/a.service", pid)
        self.enforcer.enter(self.home, OLD, MANAGER)
        Path(self.tree.path(MANAGER, "cgroup.kill")).write_text("0")

    def follow(self) -> bool:
        """New applies now, which allows nothing that these tests run."""
        holding = (Held(NEW, "p", Whitelist((parse_pattern("/usr/bin/true"),))),)
        return self.sorter.follow(self.home, self.gated, holding, revoked=True)

    def run(self, seconds: float) -> None:
        self.loop._running = True  # it may have run and stopped before
        self.loop.call_later(seconds, self.loop.stop)
        self.loop.run()


@pytest.fixture
def stubborn() -> Iterator[subprocess.Popen[str]]:
    """Ends by SIGKILL only."""
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_process_whose_leader_has_ended_is_known_by_its_threads() -> None:
    with headless() as process:
        assert not os.path.exists(f"/proc/{process.pid}/exe")
        assert look(process.pid, Identifier(Gate())).image.inode == os.stat(sys.executable).st_ino
        process.kill()
        process.wait()
        with pytest.raises(ProcessLookupError):
            living(process.pid)


def test_it_follows_as_any_other(tmp_path: Path) -> None:
    site = Site(tmp_path, "kill")
    with headless() as process:
        site.put(process.pid)
        assert site.follow()
        assert site.tree.processes(f"{SCOPE}/-Old") == [process.pid]
        assert process.wait(5) == -signal.SIGTERM


def test_what_cannot_be_told_is_allowed_by_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, "freeze")
    monkeypatch.setattr("persona_guest.kernel.task.Task.command_line", lambda *_: (_ for _ in ()).throw(OSError(5, "")))
    with subprocess.Popen(["/usr/bin/sleep", "60"]) as process:
        site.put(process.pid)
        assert site.follow()
        assert site.tree.processes(f"{SCOPE}/-Old") == [process.pid]
        assert site.tree.read(f"{SCOPE}/-Old", "cgroup.freeze") == "1\n"
        assert site.told == ["persona: Old no longer applies: unknown frozen until it does again"]
        assert [(record.event, record.program) for record in site.records] == [("frozen", "unknown")]
        process.kill()


def test_a_process_on_its_way_out_is_gone_and_not_unknown() -> None:
    identifier, seen = Identifier(Gate()), 0
    for _ in range(300):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        try:
            while True:
                assert look(pid, identifier) != UNKNOWN
                seen += 1
        except ProcessLookupError:
            pass
        finally:
            os.waitpid(pid, 0)
    assert seen, "or nothing was looked at"


@contextlib.contextmanager
def short(spare: int) -> Iterator[None]:
    """A time in which this process has so many descriptors and no more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/", os.O_PATH)  # all below are in use
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("spare", range(4))
def test_an_agent_without_descriptors_tells_nothing_of_a_process(spare: int) -> None:
    script = "#!/bin/sh\necho ready; read line\n"
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        with subprocess.Popen(["/bin/sh", file.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            identifier = Identifier(Gate())
            whole = look(process.pid, identifier)
            assert len(whole.stages) == 2
            identifier.rescan()
            with short(spare):
                try:
                    found = look(process.pid, identifier)
                except OSError as error:
                    assert error.errno == errno.EMFILE
                else:
                    assert found == whole
            process.communicate()


def test_a_process_is_not_gone_because_nothing_can_be_opened() -> None:
    with short(0), pytest.raises(OSError, match="Too many open files"):
        living(os.getpid())


def test_a_file_system_that_says_so_does_not_hide_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["/usr/bin/sleep", "60"]) as process:
        monkeypatch.setattr(
            "persona_guest.kernel.task.Task.open_program", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOMEM, ""))
        )
        assert look(process.pid, Identifier(Gate())) == UNKNOWN
        process.kill()


def test_an_agent_without_descriptors_tries_again(tmp_path: Path) -> None:
    site = Site(tmp_path, "freeze")
    with subprocess.Popen(["/usr/bin/sleep", "60"]) as process:
        place = site.put(process.pid)

        def starved(pid: int, identifier: Identifier) -> Running:
            with short(0):
                return look(pid, identifier)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sorters, "look", starved)
            assert not site.follow()
        assert site.tree.processes(place) == [process.pid]
        assert (site.told, site.home.holding) == ([], None)
        assert site.follow()
        assert site.tree.processes(f"{SCOPE}/-Old") == [process.pid]
        process.kill()


def test_an_agent_ends_what_the_one_before_it_had_withdrawn(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "GRACE_S", 0.3)
    site = Site(tmp_path, "kill")
    cgroup = site.put(stubborn.pid, withdrawn=True)
    assert site.follow()
    assert len(site.told) == 1
    assert site.follow()
    assert len(site.told) == 1, "it is under way"
    time.sleep(0.1)
    assert stubborn.poll() is None
    site.run(0.5)
    assert site.tree.read(cgroup, "cgroup.kill") == "1\n"


def test_what_is_withdrawn_and_runs_is_frozen(tmp_path: Path, stubborn: subprocess.Popen[str]) -> None:
    site = Site(tmp_path, "freeze")
    cgroup = site.put(stubborn.pid, withdrawn=True)
    assert site.follow()
    assert site.follow()
    assert site.tree.read(cgroup, "cgroup.freeze") == "1\n"
    assert len(site.told) == 1


def test_an_error_of_the_agent_s_own_is_tried_again(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, "freeze")
    site.put(stubborn.pid)
    with monkeypatch.context() as broken:
        broken.setattr(site.sorter, "_target", None)  # not to be called
        assert not site.follow()
    assert site.follow()
    assert site.tree.processes(f"{SCOPE}/-Old") == [stubborn.pid]


def test_after_an_error_the_way_back_is_to_be_followed_too(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, "freeze")
    site.put(stubborn.pid)
    before = (Held(OLD, "p", Whitelist((parse_pattern("**"),))),)
    assert site.sorter.follow(site.home, site.gated, before, revoked=False)
    assert site.home.holding == before
    monkeypatch.setattr(site.tree, "move", fails)
    assert not site.follow()
    assert site.home.holding is None, "or nobody would undo what was done of it"


def test_what_was_moved_before_an_error_is_frozen_all_the_same(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, "freeze")
    site.put(stubborn.pid)
    move = site.tree.move

    def moves_once(cgroup: str, pid: int) -> None:
        move(cgroup, pid)
        raise OSError(28, "no space left")

    monkeypatch.setattr(site.tree, "move", moves_once)
    assert not site.follow()
    assert site.tree.read(f"{SCOPE}/-Old", "cgroup.freeze") == "1\n"


NO_PID = 1 << 23  # above what the kernel ever gives


class Chain:
    """A process that forks and ends, and its child so, in the cgroup of Old: listed, and gone when it is looked at.

    Once its cgroup is frozen, what is found there is ``pid``.
    """

    def __init__(self, site: Site, pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cgroup = site.put(pid)
        self.lists = 0
        self.frozen: list[str] = []  # what was written to cgroup.freeze
        processes, write = site.tree.processes, site.tree.write

        def listed(cgroup: str) -> list[int]:
            if cgroup != self.cgroup or site.tree.freezes(cgroup) or pid not in processes(cgroup):
                return processes(cgroup)
            self.lists += 1
            return [NO_PID + self.lists]

        def written(cgroup: str, file: str, text: str) -> None:
            write(cgroup, file, text)
            if (cgroup, file) == (self.cgroup, "cgroup.freeze"):
                self.frozen.append(text)

        monkeypatch.setattr(site.tree, "processes", listed)
        monkeypatch.setattr(site.tree, "write", written)


@pytest.mark.parametrize("on_revoke", ["kill", "freeze"])
def test_what_forks_faster_than_it_is_looked_at_is_stopped_for_it(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, on_revoke: str
) -> None:
    site = Site(tmp_path, on_revoke)
    chain = Chain(site, stubborn.pid, monkeypatch)
    assert site.follow()
    assert site.tree.processes(f"{SCOPE}/-Old") == [stubborn.pid]
    assert chain.frozen == ["1", "0"]
    assert site.tree.freezes(f"{SCOPE}/-Old") == (on_revoke == "freeze")


def test_what_is_stopped_goes_on_whatever_fails(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, "kill")
    chain = Chain(site, stubborn.pid, monkeypatch)
    monkeypatch.setattr(site.tree, "move", lambda *_: (_ for _ in ()).throw(OSError(28, "no space left")))
    assert not site.follow()
    assert chain.frozen == ["1", "0"]


def test_an_agent_thaws_what_the_one_before_it_stopped(tmp_path: Path) -> None:
    site = Site(tmp_path, "finish")
    with subprocess.Popen(["/usr/bin/true"]) as process:
        cgroup = site.put(process.pid)
        site.home.base = NEW
        site.tree.freeze(cgroup)
        process.wait()
        assert site.follow()
    assert not site.tree.freezes(cgroup)


def test_what_cannot_be_stopped_is_tried_again(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, "kill")
    Chain(site, stubborn.pid, monkeypatch)
    monkeypatch.setattr(site.tree, "freezes", lambda _cgroup: False)
    assert not site.follow()
    assert site.home.holding is None


def test_what_cannot_be_stopped_is_waited_for_once(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, "kill")
    for withdrawn in (False, True):
        site.put(stubborn.pid, withdrawn=withdrawn)
    waits: list[float] = []
    freeze, read = site.tree.freeze, site.tree.read

    def frozen(cgroup: str, within_s: float = 0.0) -> None:
        waits.append(within_s)
        freeze(cgroup, within_s)

    monkeypatch.setattr(site.tree, "freeze", frozen)
    monkeypatch.setattr(site.tree, "processes", lambda _cgroup: [NO_PID + time.monotonic_ns() % 10**6])
    monkeypatch.setattr(
        site.tree, "read", lambda cgroup, file: "frozen 0" if file == "cgroup.events" else read(cgroup, file)
    )
    for _ in range(2):
        assert not site.follow()
    assert waits == [0.25, 0.0] * 2


def test_what_few_looks_find_is_not_stopped(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, "kill")
    site.put(stubborn.pid)
    monkeypatch.setattr(site.tree, "freeze", None)  # not to be called
    assert site.follow()


def test_a_frozen_place_stays_so_while_it_is_sorted(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, "freeze")
    site.put(stubborn.pid)
    assert site.follow()
    for name in ("thaw", "freeze"):
        monkeypatch.setattr(site.tree, name, None)  # not to be called
    assert site.follow()
    assert site.tree.freezes(f"{SCOPE}/-Old")


def test_what_comes_later_does_not_postpone_the_end(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "GRACE_S", 0.6)
    site = Site(tmp_path, "kill")
    site.put(stubborn.pid)
    assert site.follow()
    cgroup = f"{SCOPE}/-Old"
    Path(site.tree.path(cgroup, "cgroup.kill")).write_text("0")
    site.run(0.4)
    with subprocess.Popen(["/usr/bin/sleep", "60"]) as later:
        site.put(later.pid)
        assert site.follow()
        assert later.wait(5) == -signal.SIGTERM
    assert len(site.told) == 2
    assert [record.event for record in site.records] == ["killed", "killed"]
    site.run(0.4)
    assert site.tree.read(cgroup, "cgroup.kill") == "1\n"


def test_what_comes_back_has_its_whole_grace_the_next_time(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "GRACE_S", 0.6)
    site = Site(tmp_path, "kill")
    site.put(stubborn.pid)
    assert site.follow()
    site.run(0.4)
    again = (Held(OLD, "p", Whitelist((parse_pattern("**"),))),)
    assert site.sorter.follow(site.home, site.gated, again, revoked=True)
    assert list(site.home.places) == ["Old"]
    assert site.follow()
    cgroup = f"{SCOPE}/-Old"
    Path(site.tree.path(cgroup, "cgroup.kill")).write_text("0")
    assert site.tree.processes(cgroup) == [stubborn.pid]
    site.run(0.4)
    assert site.tree.read(cgroup, "cgroup.kill") == "0"
    site.run(0.4)
    assert site.tree.read(cgroup, "cgroup.kill") == "1\n"


SHARED = "user.slice/persona-sessions.service/shared-Old/s-1"


def counted(site: Site, pattern: str = "**") -> bool:
    """The next version of Old applies now, which is counted for all sessions together."""
    site.home.holding = None
    holding = (Held(COUNTED, "p", Whitelist((parse_pattern(pattern),))),)
    return site.sorter.follow(site.home, site.gated, holding, revoked=False)


@pytest.fixture
def house(tmp_path: Path) -> Site:
    """With what systemd makes for sessions that are not below their user's slice."""
    site = Site(tmp_path, "kill")
    site.tree.grow("user.slice/persona-sessions.service")
    return site


def test_a_version_that_is_counted_otherwise_keeps_its_place(house: Site, stubborn: subprocess.Popen[str]) -> None:
    house.put(stubborn.pid)
    assert counted(house)
    assert house.tree.processes(SHARED) == [stubborn.pid]
    assert [place.cgroup for place in house.home.places.values()] == [SHARED], "or nobody looks after its limits"


def test_what_comes_along_to_a_place_counted_otherwise_is_looked_at_there(
    house: Site, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = house.put(stubborn.pid)
    processes = house.tree.processes
    with subprocess.Popen(["/usr/bin/sleep", "10"]) as born:

        def listed(cgroup: str) -> list[int]:
            found = processes(cgroup)
            if cgroup == place and not late:
                late.append(born.pid)
                house.tree.move(place, born.pid)  # after it was listed
            return found

        late: list[int] = []
        monkeypatch.setattr(house.tree, "processes", listed)
        assert counted(house, os.path.realpath(sys.executable))
        assert processes(SHARED) == [stubborn.pid]
        assert processes(f"{SCOPE}/-Old") == [born.pid]
        assert born.wait(5) == -signal.SIGTERM


def test_no_descriptor_is_held_for_what_is_to_end(tmp_path: Path, stubborn: subprocess.Popen[str]) -> None:
    site = Site(tmp_path, "kill")
    site.put(stubborn.pid)
    before = os.listdir("/proc/self/fd")
    assert site.follow()
    assert os.listdir("/proc/self/fd") == before


# --- a service manager -----------------------------------------------------------------------------


def fails(*_: object) -> NoReturn:
    raise OSError(errno.EIO, "input/output error")


@pytest.mark.parametrize("broken", ["processes", "children", "noted"])
def test_what_a_service_manager_runs_ends_after_a_try_that_failed(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(ending, "GRACE_S", 0.2)
    site = Site(tmp_path, "kill")
    site.serve(stubborn.pid)
    with monkeypatch.context() as patch:
        patch.setattr(site.tree, broken, fails)
        assert not site.follow()
    assert site.told == []
    assert site.follow()
    site.run(0.4)
    assert stubborn.wait(5) == -signal.SIGKILL
    assert site.follow()
    assert len(site.told) == 1


def test_what_a_service_manager_runs_ends_where_its_new_base_cannot_be_kept(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "GRACE_S", 0.2)
    site = Site(tmp_path, "kill")
    site.serve(stubborn.pid)
    with monkeypatch.context() as patch:
        patch.setattr(Home, "save", fails)
        assert not site.follow()
    assert site.follow()
    site.run(0.4)
    assert stubborn.wait(5) == -signal.SIGKILL
    assert len(site.told) == 1


def nested(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's cgroup so deep that no path leads to it."""
    children = site.tree.children

    def listed(cgroup: str) -> list[str]:
        if cgroup.endswith("app.slice"):
            raise OSError(errno.ENAMETOOLONG, "name too long")
        return children(cgroup)

    monkeypatch.setattr(site.tree, "children", listed)


def many(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """More cgroups than are looked at."""
    monkeypatch.setattr(sorters, "_CGROUPS_MAX", 8)
    for number in range(8):
        site.tree.make(f"{MANAGER}/app.slice/b{number}.service")


@pytest.mark.parametrize("hides", [nested, many])
@pytest.mark.parametrize(("on_revoke", "killed"), [("kill", "1\n"), ("finish", "0"), ("freeze", "0")])
def test_a_service_manager_that_cannot_be_looked_through_ends(
    tmp_path: Path,
    stubborn: subprocess.Popen[str],
    monkeypatch: pytest.MonkeyPatch,
    hides: Callable[[Site, pytest.MonkeyPatch], None],
    on_revoke: str,
    killed: str,
) -> None:
    monkeypatch.setattr(ending, "GRACE_S", 0.2)
    site = Site(tmp_path, on_revoke)
    site.serve(stubborn.pid)
    hides(site, monkeypatch)
    assert site.follow()
    assert site.tree.read(MANAGER, "cgroup.kill") == "0"
    site.run(0.4)
    assert site.tree.read(MANAGER, "cgroup.kill") == killed
    assert len(site.told) == (on_revoke == "kill")
    assert len(site.records) == len(site.told)


def comes_back(site: Site) -> bool:
    again = (Held(OLD, "p", Whitelist((parse_pattern("**"),))),)
    return site.sorter.follow(site.home, site.gated, again, revoked=False)


def test_what_a_service_manager_runs_stays_where_its_base_comes_back(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "GRACE_S", 0.3)
    site = Site(tmp_path, "kill")
    site.serve(stubborn.pid)
    assert site.follow()
    assert comes_back(site)
    assert len(site.told) == 1
    site.run(0.6)
    assert stubborn.poll() is None


@pytest.mark.parametrize("whole", [False, True])
def test_only_what_was_asked_to_end_since_a_base_was_there_stays(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.setattr(ending, "GRACE_S", 0.3)
    site = Site(tmp_path, "kill")
    site.serve(stubborn.pid)
    asked = site.sorter._ending
    with subprocess.Popen(["/usr/bin/sleep", "10"]) as spared:
        for name, pid in (("New", stubborn.pid), ("Old", spared.pid), ("Third", spared.pid)):
            old = document(name, ["**"], "kill")
            if whole and name == "Third":
                asked.all_of(site.home, old, MANAGER, {})
            else:
                asked.each(site.home, old, MANAGER, {}, dict(ending.started([pid])))
        asked.returned(MANAGER, "Old")
        site.run(0.6)
        assert stubborn.wait(5) == -signal.SIGKILL
        assert spared.poll() is None
        spared.kill()
    assert site.tree.read(MANAGER, "cgroup.kill") == "0"


# --- errors in the loop's own time -----------------------------------------------------------------


def test_a_cgroup_that_cannot_be_ended_yet_is_tried_again(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "GRACE_S", 0.1)
    monkeypatch.setattr(ending, "AGAIN_S", 0.1)
    site = Site(tmp_path, "kill")
    cgroup = site.put(stubborn.pid, withdrawn=True)
    assert site.follow()
    with monkeypatch.context() as patch:
        patch.setattr(site.tree, "write", fails)
        site.run(0.35)
    assert site.tree.read(cgroup, "cgroup.kill") == "0"
    assert site.follow()
    assert len(site.told) == 1, "it is under way"
    site.run(0.2)
    assert site.tree.read(cgroup, "cgroup.kill") == "1\n"


def test_a_process_that_cannot_be_ended_yet_is_tried_again(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "GRACE_S", 0.1)
    monkeypatch.setattr(ending, "AGAIN_S", 0.1)
    site = Site(tmp_path, "kill")
    site.serve(stubborn.pid)
    assert site.follow()
    for spare in (0, 1):  # not even a pidfd, or not what tells whether it is still this process
        with short(spare):
            site.run(0.2)
        assert stubborn.poll() is None
    site.run(0.2)
    assert stubborn.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize("broken", ["populated", "save"])
def test_a_place_that_cannot_be_left_ends_no_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    monkeypatch.setattr(ending, "GRACE_S", 0.1)
    site = Site(tmp_path, "kill")
    with subprocess.Popen(["/usr/bin/sleep", "60"]) as process:
        site.put(process.pid)
        assert site.follow()
        process.wait(5)
    Path(site.tree.path(f"{SCOPE}/-Old", "cgroup.procs")).write_text("")  # as the kernel would
    monkeypatch.setattr(Home if broken == "save" else site.tree, broken, fails)
    site.run(0.8)


def test_nothing_is_kept_of_a_session_that_ended_in_its_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "GRACE_S", 0.1)
    site = Site(tmp_path, "kill")
    with subprocess.Popen(["/usr/bin/sleep", "60"]) as process:
        site.put(process.pid)
        assert site.follow()
        process.wait(5)
    Path(site.tree.path(f"{SCOPE}/-Old", "cgroup.procs")).write_text("")  # as the kernel would
    kept = tmp_path / "places" / "s-1.json"
    assert kept.exists()
    site.enforcer.ended(SESSION)
    site.run(0.8)
    assert not kept.exists()


def test_a_line_that_cannot_be_told_is_recorded_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, "kill")
    place = site.enforcer.enter(site.home, OLD)
    monkeypatch.setattr(site.tree, "processes", fails)
    site.notices.alarm(place, Reason.PIDS_LIMIT)
    site.notices.refused(Refusal("Old", 1000, "tcp 192.0.2.1:80"))
    assert [record.reason for record in site.records] == [Reason.PIDS_LIMIT, Reason.NETWORK_REFUSED]


def test_a_terminal_that_is_just_written_to_is_told_once_more(tmp_path: Path) -> None:
    site = Site(tmp_path, "finish")
    master, slave = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # until nobody has the other end any more
            while True:
                seen.append(os.read(master, 65536))

    busy = [sys.executable, "-c", "import os, time; os.write(2, bytes(100_000)); time.sleep(10)"]
    with subprocess.Popen(busy, stderr=slave) as writer:
        os.close(slave)
        site.put(writer.pid)
        time.sleep(0.3)  # it waits in its write, since nobody reads
        site.notices.tell(site.home, "persona: heard")
        reader = threading.Thread(target=read)
        reader.start()
        site.run(0.5)
        writer.kill()
    reader.join(10)
    os.close(master)
    assert b"persona: heard" in b"".join(seen)
