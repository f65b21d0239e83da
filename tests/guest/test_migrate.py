"""Running processes of a session whose persona changed: each is moved, or withdrawn, however it hides."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from persona_guest.core.reassignment import Applicable, Revocation
from persona_guest.kernel.task import living
from persona_guest.program.identity import Identifier
from persona_guest.program.process import UNKNOWN, Running, read_running
from persona_guest.reassign import migrate as sorters
from persona_guest.reassign import terminate
from persona_guest.settings import Gate

from persona.patterns import Whitelist, parse_pattern
from tests.guest.headless import headless
from tests.guest.migrate_site import COUNTED, NEW, OLD, SCOPE, Site, fails, short

SHARED = "user.slice/persona-sessions.service/shared-Old/s-1"


def test_a_process_whose_leader_has_ended_is_known_by_its_threads() -> None:
    with headless() as process:
        assert not os.path.exists(f"/proc/{process.pid}/exe")
        assert read_running(process.pid, Identifier(Gate())).image.inode == os.stat(sys.executable).st_ino
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


@pytest.mark.long
def test_a_process_on_its_way_out_is_gone_and_not_unknown() -> None:
    identifier, seen = Identifier(Gate()), 0
    for _ in range(300):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        try:
            while True:
                assert read_running(pid, identifier) != UNKNOWN
                seen += 1
        except ProcessLookupError:
            pass
        finally:
            os.waitpid(pid, 0)
    assert seen, "or nothing was looked at"


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
            whole = read_running(process.pid, identifier)
            assert len(whole.stages) == 2
            identifier.rescan()
            with short(spare):
                try:
                    found = read_running(process.pid, identifier)
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
        assert read_running(process.pid, Identifier(Gate())) == UNKNOWN
        process.kill()


def test_an_agent_without_descriptors_tries_again(tmp_path: Path) -> None:
    site = Site(tmp_path, "freeze")
    with subprocess.Popen(["/usr/bin/sleep", "60"]) as process:
        place = site.put(process.pid)

        def starved(pid: int, identifier: Identifier) -> Running:
            with short(0):
                return read_running(pid, identifier)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sorters, "read_running", starved)
            assert not site.follow()
        assert site.tree.processes(place) == [process.pid]
        assert (site.told, site.placement.holding) == ([], None)
        assert site.follow()
        assert site.tree.processes(f"{SCOPE}/-Old") == [process.pid]
        process.kill()


def test_an_agent_ends_what_the_one_before_it_had_withdrawn(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminate, "GRACE_S", 0.3)
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
        broken.setattr(site.migrator, "_target", None)  # not to be called
        assert not site.follow()
    assert site.follow()
    assert site.tree.processes(f"{SCOPE}/-Old") == [stubborn.pid]


def test_after_an_error_the_way_back_is_to_be_followed_too(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, "freeze")
    site.put(stubborn.pid)
    before = (Applicable(OLD, "p", Whitelist((parse_pattern("**"),))),)
    assert site.migrator.follow(site.placement, site.login, before, Revocation.NONE)
    assert site.placement.holding == before
    monkeypatch.setattr(site.tree, "move", fails)
    assert not site.follow()
    assert site.placement.holding is None, "or nobody would undo what was done of it"


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
        site.placement.default_persona = NEW
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
    assert site.placement.holding is None


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


def counted(site: Site, pattern: str = "**") -> bool:
    """The next version of Old applies now, which is counted for all sessions together."""
    site.placement.holding = None
    holding = (Applicable(COUNTED, "p", Whitelist((parse_pattern(pattern),))),)
    return site.migrator.follow(site.placement, site.login, holding, Revocation.NONE)


@pytest.fixture
def outside(tmp_path: Path) -> Site:
    """With what systemd makes for sessions that are not below their user's slice."""
    site = Site(tmp_path, "kill")
    site.tree.grow("user.slice/persona-sessions.service")
    return site


def test_a_version_that_is_counted_otherwise_keeps_its_place(outside: Site, stubborn: subprocess.Popen[str]) -> None:
    outside.put(stubborn.pid)
    assert counted(outside)
    assert outside.tree.processes(SHARED) == [stubborn.pid]
    assert [place.cgroup for place in outside.placement.places.values()] == [SHARED], "or nobody looks after its limits"


def test_what_comes_along_to_a_place_counted_otherwise_is_looked_at_there(
    outside: Site, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = outside.put(stubborn.pid)
    processes = outside.tree.processes
    with subprocess.Popen(["/usr/bin/sleep", "10"]) as born:

        def listed(cgroup: str) -> list[int]:
            found = processes(cgroup)
            if cgroup == place and not late:
                late.append(born.pid)
                outside.tree.move(place, born.pid)  # after it was listed
            return found

        late: list[int] = []
        monkeypatch.setattr(outside.tree, "processes", listed)
        assert counted(outside, os.path.realpath(sys.executable))
        assert processes(SHARED) == [stubborn.pid]
        assert processes(f"{SCOPE}/-Old") == [born.pid]
        assert born.wait(5) == -signal.SIGTERM
