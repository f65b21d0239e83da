"""What no persona allows any more is asked to end, and ended; what fails meanwhile is tried again."""

import contextlib
import errno
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from persona_guest.core.reassignment import Applicable, Revocation
from persona_guest.enforce.network.rejects import Refusal
from persona_guest.reassign import migrate as sorters
from persona_guest.reassign import terminate
from persona_guest.session import model
from persona_guest.session.registry import Registry

from persona.patterns import Whitelist, parse_pattern
from persona.problems import Reason
from tests.guest.migrate_site import (
    MANAGER,
    OLD,
    SCOPE,
    Site,
    document,
    fails,
    short,
)


def test_what_comes_later_does_not_postpone_the_end(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminate, "GRACE_S", 0.6)
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
    monkeypatch.setattr(terminate, "GRACE_S", 0.6)
    site = Site(tmp_path, "kill")
    site.put(stubborn.pid)
    assert site.follow()
    site.run(0.4)
    again = (Applicable(OLD, "p", Whitelist((parse_pattern("**"),))),)
    assert site.migrator.follow(site.placement, site.login, again, Revocation.REVOKED)
    assert list(site.placement.places) == ["Old"]
    assert site.follow()
    cgroup = f"{SCOPE}/-Old"
    Path(site.tree.path(cgroup, "cgroup.kill")).write_text("0")
    assert site.tree.processes(cgroup) == [stubborn.pid]
    site.run(0.4)
    assert site.tree.read(cgroup, "cgroup.kill") == "0"
    site.run(0.4)
    assert site.tree.read(cgroup, "cgroup.kill") == "1\n"


SHARED = "user.slice/persona-sessions.service/shared-Old/s-1"


def test_no_descriptor_is_held_for_what_is_to_end(tmp_path: Path, stubborn: subprocess.Popen[str]) -> None:
    site = Site(tmp_path, "kill")
    site.put(stubborn.pid)
    before = os.listdir("/proc/self/fd")
    assert site.follow()
    assert os.listdir("/proc/self/fd") == before


# --- a service manager -----------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["processes", "children", "noted"])
def test_what_a_service_manager_runs_ends_after_a_try_that_failed(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(terminate, "GRACE_S", 0.2)
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
    monkeypatch.setattr(terminate, "GRACE_S", 0.2)
    site = Site(tmp_path, "kill")
    site.serve(stubborn.pid)
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "save", fails)
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
    monkeypatch.setattr(terminate, "GRACE_S", 0.2)
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
    again = (Applicable(OLD, "p", Whitelist((parse_pattern("**"),))),)
    return site.migrator.follow(site.placement, site.login, again, Revocation.NONE)


def test_what_a_service_manager_runs_stays_where_its_base_comes_back(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminate, "GRACE_S", 0.3)
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
    monkeypatch.setattr(terminate, "GRACE_S", 0.3)
    site = Site(tmp_path, "kill")
    site.serve(stubborn.pid)
    asked = site.migrator._ending
    with subprocess.Popen(["/usr/bin/sleep", "10"]) as spared:
        for name, pid in (("New", stubborn.pid), ("Old", spared.pid), ("Third", spared.pid)):
            old = document(name, ["**"], "kill")
            if whole and name == "Third":
                asked.all_of(site.placement, old, MANAGER, {})
            else:
                asked.each(site.placement, old, MANAGER, {}, dict(terminate.started([pid])))
        asked.returned(MANAGER, "Old")
        site.run(0.6)
        assert stubborn.wait(5) == -signal.SIGKILL
        assert spared.poll() is None
        spared.kill()
    assert site.tree.read(MANAGER, "cgroup.kill") == "0"


# --- errors in the loop's own time -----------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graces and second tries of a tenth of a second."""
    monkeypatch.setattr(terminate, "GRACE_S", 0.1)
    monkeypatch.setattr(terminate, "AGAIN_S", 0.1)


@pytest.mark.usefixtures("hasty")
def test_a_cgroup_that_cannot_be_ended_yet_is_tried_again(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.usefixtures("hasty")
def test_a_process_that_cannot_be_ended_yet_is_tried_again(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr(terminate, "GRACE_S", 0.1)
    site = Site(tmp_path, "kill")
    with subprocess.Popen(["/usr/bin/sleep", "60"]) as process:
        site.put(process.pid)
        assert site.follow()
        process.wait(5)
    Path(site.tree.path(f"{SCOPE}/-Old", "cgroup.procs")).write_text("")  # as the kernel would
    monkeypatch.setattr(Registry if broken == "save" else site.tree, broken, fails)
    site.run(0.8)


def test_nothing_is_kept_of_a_session_that_ended_in_its_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminate, "GRACE_S", 0.1)
    site = Site(tmp_path, "kill")
    with subprocess.Popen(["/usr/bin/sleep", "60"]) as process:
        site.put(process.pid)
        assert site.follow()
        process.wait(5)
    Path(site.tree.path(f"{SCOPE}/-Old", "cgroup.procs")).write_text("")  # as the kernel would
    kept = tmp_path / "sessions" / "s-1.json"
    assert kept.exists()
    site.registry.end(site.login)
    site.run(0.8)
    assert not kept.exists()


def test_a_line_that_cannot_be_told_is_recorded_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, "kill")
    place = site.enforcer.enter(site.placement, OLD)
    monkeypatch.setattr(site.tree, "processes", fails)
    site.notices.alarm(place, Reason.PIDS_LIMIT)
    site.notices.refused(Refusal("Old", 1000, "tcp 192.0.2.1:80"))
    assert [record.reason for record in site.records] == [Reason.PIDS_LIMIT, Reason.NETWORK_REFUSED]
    limit, network = site.denials.of(1000)
    assert (limit.event, limit.reason, limit.persona) == ("limit", Reason.PIDS_LIMIT, "Old")
    assert "allows" in limit.help
    assert (network.event, network.command, network.session) == ("network", "tcp 192.0.2.1:80", "s-1")


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
        site.notices.tell(site.placement, "persona: heard")
        reader = threading.Thread(target=read)
        reader.start()
        site.run(0.5)
        writer.kill()
    reader.join(10)
    os.close(master)
    assert b"persona: heard" in b"".join(seen)


@pytest.mark.parametrize("on_revoke", ["finish", "freeze", "kill"])
def test_a_revoked_user_is_told_at_once_and_once(
    tmp_path: Path, stubborn: subprocess.Popen[str], on_revoke: str
) -> None:
    site = Site(tmp_path, on_revoke)
    site.put(stubborn.pid)
    assert site.revoke()
    assert site.revocations == 1
    assert site.revoke()
    kept = model.from_json(json.loads((tmp_path / "sessions" / "s-1.json").read_text())).placement
    assert kept is not None
    site.placement = site.login.placement = kept  # as the next agent has it
    assert site.revoke()
    assert site.revocations == 1


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("on_revoke", ["finish", "freeze"])
def test_an_operator_ends_what_its_persona_would_spare(
    tmp_path: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, on_revoke: str, before: bool
) -> None:
    monkeypatch.setattr(terminate, "GRACE_S", 0.4)
    site = Site(tmp_path, on_revoke)
    site.put(stubborn.pid)
    if before:  # revoked, and only later ended
        assert site.revoke()
        site.run(0.6)
    cgroup = f"{SCOPE}/-Old"
    assert site.revoke(Revocation.END)
    Path(site.tree.path(cgroup, "cgroup.kill")).write_text("0")
    assert site.tree.processes(cgroup) == [stubborn.pid]
    assert not site.tree.freezes(cgroup)  # or SIGTERM would not reach it
    told = list(site.told)
    assert "is asked to end, and killed after" in told[-1]
    assert site.revoke(Revocation.END)  # the next event
    assert site.told == told
    site.run(0.6)
    assert site.tree.read(cgroup, "cgroup.kill") == "1\n"


@pytest.mark.parametrize("before", [False, True])
def test_an_operator_ends_what_a_service_manager_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    monkeypatch.setattr(terminate, "GRACE_S", 0.4)
    site = Site(tmp_path, "finish")
    with subprocess.Popen(["/usr/bin/sleep", "60"]) as process:
        site.serve(process.pid)
        if before:
            assert site.revoke()
            site.run(0.6)
            assert process.poll() is None
        for _ in range(3):  # whatever events come, once
            assert site.revoke(Revocation.END)
        assert process.wait(5) == -signal.SIGTERM
    assert [line for line in site.told if "sleep is asked to end" in line] == site.told[-1:]
    assert "_nobody" not in "".join(site.told)
