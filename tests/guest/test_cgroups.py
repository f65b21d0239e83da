"""Limits as plans over a fake hierarchy; what the kernel makes of them is tests/guest_vm/test_limits.py's."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from persona_guest.core.persona_cgroups import (
    FALLBACK_ROOT,
    PersonaCgroup,
    directory_name,
    manager_of,
    place_of,
    scope_of,
)
from persona_guest.enforce.cgroups.disks import disks
from persona_guest.enforce.cgroups.facility import Cgroups
from persona_guest.enforce.cgroups.limits import Setting, settings_of, weight_of
from persona_guest.enforce.plan import PlanError, apply, describe, undo
from persona_guest.kernel.cgroup import Hierarchy

from persona.decisions import PersonaRef
from persona.documents import DiskIo, Persona, ResourceLimits
from persona.patterns import Whitelist
from persona.problems import PersonaError, Reason
from tests.guest.fake_cgroups import FakeHierarchy

SCOPE = "user.slice/user-1000.slice/session-5.scope"
MANAGER = "user.slice/user-1000.slice/user@1000.service"
LIMITS = ResourceLimits(cpu_percent=150.0, memory_bytes=1 << 30, pids=64, disk_io=DiskIo(read_bps=1000))


def persona(limits: ResourceLimits = LIMITS, name: str = "P", priority: int = 50) -> Persona:
    return Persona(name, Whitelist(()), limits, priority=priority)


def place(
    found: str = SCOPE, name: str = "P", version: int = 1, *, shared: bool = False, session: str = "s-1"
) -> PersonaCgroup:
    return place_of(session, 1000, PersonaRef(name, version), found, shared=shared)


@pytest.fixture
def tree(tmp_path: Path) -> FakeHierarchy:
    tree = FakeHierarchy(tmp_path / "cgroup")
    tree.grow(SCOPE, 10, 11)
    tree.grow("system.slice/cron.service", 20)
    tree.grow("user.slice/user-1000.slice/user@1000.service/init.scope", 30)
    return tree


@pytest.fixture
def cgroups(tree: FakeHierarchy, tmp_path: Path) -> Cgroups:
    (tmp_path / "mountinfo").write_text("1 1 254:1 / / rw - ext4 /dev/vda1 rw\n2 1 0:5 / /proc rw - proc proc rw\n")
    disk = tmp_path / "block" / "vda"
    (disk / "vda1").mkdir(parents=True)
    (disk / "dev").write_text("254:0\n")
    (disk / "vda1" / "dev").write_text("254:1\n")
    (disk / "vda1" / "partition").write_text("1\n")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "254:1").symlink_to(disk / "vda1")
    (tmp_path / "dev" / "254:0").symlink_to(disk)
    return Cgroups(tree, str(tmp_path / "mountinfo"), str(tmp_path / "dev"))


def snapshot(tree: Hierarchy) -> dict[str, str]:
    root = Path(tree.root)
    return {str(file.relative_to(root)): file.read_text().strip() for file in root.rglob("*") if file.is_file()}


def test_places_and_their_names() -> None:
    assert place().cgroup == f"{SCOPE}/P"
    assert place().level == 4
    assert place(f"{SCOPE}/login").cgroup == f"{SCOPE}/P"
    assert place("system.slice/cron.service").cgroup == f"{FALLBACK_ROOT}/user-1000/s-1:P"
    assert place("system.slice/cron.service").origin == "system.slice/cron.service"
    assert place(shared=True).cgroup == f"{FALLBACK_ROOT}/shared-P/s-1"
    assert place(f"{MANAGER}/app.slice/x.service").cgroup == MANAGER
    assert place(f"{MANAGER}/app.slice/x.service").managed
    assert (directory_name("cpu.max"), directory_name("login"), directory_name("A-b")) == ("_cpu.max", "_login", "A-b")
    assert scope_of("user.slice/user-0.slice/session-3.scope", 1000) is None  # somebody else's login
    assert manager_of("user.slice/user-1000.slice/user@0.service", 1000) is None
    assert scope_of("user.slice/user-1000.slice/session-5.scope.d/x", 1000) is None


def test_numbers_become_the_kernels_words() -> None:
    limits = ResourceLimits(cpu_percent=20, memory_bytes=512_000_001, pids=7, disk_io=DiskIo(None, 5, 6, None))
    assert {setting.text for setting in settings_of(limits, ("8:0",))} == {
        "20000 100000", "512000000", "0", "7", "8:0 rbps=max wbps=5 riops=6 wiops=max"
    }  # fmt: skip
    assert all(setting.default for setting in settings_of(ResourceLimits(), ("8:0",)))
    assert [weight_of(priority) for priority in (0, 1, 50, 1000)] == [1, 2, 100, 2000]
    assert Setting("io.max", "", "8:0").current("8:16 rbps=1\n8:0 rbps=2 wbps=max\n") == "rbps=2 wbps=max"


def test_entering_makes_and_limits_and_is_done_once(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    before = snapshot(tree)
    plan = cgroups.enter(place(), persona())
    assert snapshot(tree) == before  # a plan changes nothing
    apply(plan)
    assert tree.processes(SCOPE) == []
    assert tree.processes(f"{SCOPE}/login") == [10, 11]
    assert tree.read(f"{SCOPE}/P", "cpu.max") == "150000 100000\n"
    assert tree.read(f"{SCOPE}/P", "memory.max") == f"{1 << 30}\n"
    assert tree.read(f"{SCOPE}/P", "io.max").strip() == "254:0 rbps=1000 wbps=max riops=max wiops=max"
    assert cgroups.enter(place(), persona()) == ()
    undo(plan)
    assert snapshot(tree) == before


def test_another_version_changes_only_what_differs(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    apply(cgroups.enter(place(), persona()))
    plan = cgroups.enter(place(version=2), persona(ResourceLimits(cpu_percent=150.0, pids=64)))
    here = [step for step in describe(plan) if step["cgroup"] == place().cgroup]
    assert [(step["file"], step["value"], step["before"]) for step in here] == [
        ("memory.max", "max", f"{1 << 30}"),
        ("memory.swap.max", "max", "0"),
        ("io.max", "254:0 rbps=max wbps=max riops=max wiops=max", "rbps=1000 wbps=max riops=max wiops=max"),
    ]


def test_what_fails_leaves_nothing_behind(
    tree: FakeHierarchy, cgroups: Cgroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(tree)
    write: Callable[[str, str, str], None] = tree.write

    def full(cgroup: str, file: str, text: str) -> None:
        if file == "pids.max":
            raise OSError(errno.ENOMEM, "no memory")
        write(cgroup, file, text)

    monkeypatch.setattr(tree, "write", full)
    with pytest.raises(PlanError, match="no memory") as caught:
        apply(cgroups.enter(place(), persona()))
    assert caught.value.code is Reason.ENFORCEMENT_FAILED
    assert snapshot(tree) == before


def test_a_scope_that_is_gone_or_not_delegated_is_refused(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    with pytest.raises(PersonaError, match="there is no cgroup"):
        cgroups.enter(place("user.slice/user-1000.slice/session-77.scope"), persona())
    Path(tree.path(MANAGER, "memory.max")).unlink()
    with pytest.raises(PersonaError, match=r"no memory\.max"):
        cgroups.enter(place(MANAGER), persona())


def test_sessions_without_a_scope_come_and_go(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    here = place("system.slice/cron.service")
    apply(cgroups.enter(here, persona()))
    tree.move(here.cgroup, 20)
    with pytest.raises(PlanError):
        apply(cgroups.leave(here))  # something lives there
    apply(cgroups.release())
    assert tree.processes("system.slice/cron.service") == [20]
    assert not tree.exists(FALLBACK_ROOT)


def test_who_has_nowhere_to_go_back_to_stays_in_the_house(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    here = place("system.slice/cron.service")
    apply(cgroups.enter(here, persona()))
    tree.move(here.cgroup, 20)
    tree.remove("system.slice/cron.service")
    apply(cgroups.release())
    assert tree.processes(f"{FALLBACK_ROOT}/login") == [20]
    assert tree.children(FALLBACK_ROOT) == ["login"]
    assert cgroups.release() == ()


def test_limits_of_all_sessions_are_the_parents(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    one, other = place(shared=True), place(shared=True, session="s-2")
    apply(cgroups.enter(one, persona()))
    apply(cgroups.enter(other, persona()))
    assert tree.read(f"{FALLBACK_ROOT}/shared-P", "pids.max") == "64\n"
    assert tree.read(one.cgroup, "pids.max") == "max\n"
    apply(cgroups.leave(one))
    assert tree.exists(f"{FALLBACK_ROOT}/shared-P")
    apply(cgroups.leave(other))
    assert tree.children(f"{FALLBACK_ROOT}/shared-P") == []
    apply(cgroups.release())
    assert not tree.exists(FALLBACK_ROOT)


def test_a_service_manager_is_limited_as_it_is_and_put_back(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    here = place(MANAGER)
    apply(cgroups.enter(here, persona()))
    assert tree.read(MANAGER, "pids.max") == "64\n"
    assert cgroups.reconcile({here: persona()}) == ()
    apply(cgroups.reconcile({}))
    assert tree.read(MANAGER, "pids.max") == "max\n"
    assert cgroups.reconcile({}) == ()


def test_reconciling_puts_right_and_clears_away(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    here, wanted = place(), {place(): persona()}
    apply(cgroups.enter(here, persona()))
    assert cgroups.reconcile(wanted) == ()
    tree.write(here.cgroup, "pids.max", "max")
    tree.make(f"{SCOPE}/Stray")
    tree.grow(f"{SCOPE}/Lived", 12)
    tree.grow(f"{FALLBACK_ROOT}/s-9/P")
    apply(cgroups.reconcile(wanted))
    assert tree.read(here.cgroup, "pids.max") == "64\n"
    assert tree.children(SCOPE) == ["Lived", "P", "login"]  # what lives under a persona that is not known stays bound
    assert tree.children(FALLBACK_ROOT) == []
    apply(cgroups.reconcile({}))
    assert tree.children(SCOPE) == []
    assert sorted(tree.processes(SCOPE)) == [10, 11, 12]
    assert tree.read(SCOPE, "cgroup.subtree_control").split() == []


def test_what_has_gone_keeps_nothing_else_from_being_looked_after(
    tree: FakeHierarchy, cgroups: Cgroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, here = place(MANAGER, session="s-2"), place()
    wanted = {manager: persona(), here: persona()}
    shutil.rmtree(tree.path(MANAGER))
    apply(cgroups.reconcile(wanted))
    assert tree.read(here.cgroup, "pids.max") == "64\n"
    tree.write(here.cgroup, "pids.max", "max")
    exists = tree.exists
    monkeypatch.setattr(tree, "exists", lambda cgroup: cgroup == MANAGER or exists(cgroup))  # at first
    apply(cgroups.reconcile(wanted))
    assert tree.read(here.cgroup, "pids.max") == "64\n"


def test_weights_are_those_of_the_heaviest(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    heavy, light = place(name="Heavy"), place(name="Light")
    apply(cgroups.enter(light, persona(priority=10)))
    assert tree.read("user.slice/user-1000.slice", "cpu.weight") == "20\n"
    apply(cgroups.enter(heavy, persona(name="Heavy", priority=100)))
    assert tree.read(SCOPE, "cpu.weight") == "200\n"
    apply(cgroups.leave(heavy))
    assert tree.read("user.slice/user-1000.slice", "cpu.weight") == "20\n"
    apply(cgroups.reconcile({}))
    assert tree.read("user.slice/user-1000.slice", "cpu.weight") == "100\n"


def test_a_scope_that_has_ended_weighs_nothing(tree: FakeHierarchy, cgroups: Cgroups) -> None:
    slice_, other = "user.slice/user-1000.slice", SCOPE.replace("5", "6")
    tree.grow(other, 40)
    apply(cgroups.enter(place(), persona(priority=100)))
    apply(cgroups.enter(place(other), persona(priority=10)))
    shutil.rmtree(tree.path(SCOPE))  # systemd has removed it before the agent hears of its end
    apply(cgroups.leave(place()))
    assert (tree.read(slice_, "cpu.weight"), tree.noted(slice_)) == ("20\n", slice_)
    shutil.rmtree(tree.path(other))
    apply(cgroups.leave(place(other)))
    assert (tree.read(slice_, "cpu.weight"), tree.noted(slice_)) == ("100\n", "")
    assert cgroups.reconcile({}) == ()
    shutil.rmtree(tree.path(slice_))
    assert cgroups.leave(place()) == ()


def test_disks_are_whole_and_each_once(tmp_path: Path, cgroups: Cgroups) -> None:
    assert disks(str(tmp_path / "mountinfo"), str(tmp_path / "dev")) == ("254:0",)
    (tmp_path / "mountinfo").write_text("cut\n1 1 7:9 / /gone rw - ext4 /nowhere rw\n3 1 254:0 / /x rw - xfs x rw\n")
    assert disks(str(tmp_path / "mountinfo"), str(tmp_path / "dev")) == ("254:0",)
    with pytest.raises(OSError, match="No such file"):
        disks(str(tmp_path / "missing"), str(tmp_path / "dev"))


def test_a_user_s_own_word_on_his_own_cgroup_is_no_error(tmp_path: Path) -> None:
    # what systemd hands to a user's service manager is a directory of his
    tree = Hierarchy(str(tmp_path))
    os.mkdir(tree.path("his"))
    os.setxattr(tree.path("his"), "user.persona", b"\xff\0")
    assert tree.noted("his")
    tree.note("his", "")
    assert tree.noted("his") == ""


def test_a_source_that_a_user_may_have_named_is_not_looked_at(
    tmp_path: Path, cgroups: Cgroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mountinfo").write_text(
        "1 1 0:46 / /home/m/a rw - fuse.x /dev/zero rw\n2 1 0:47 / /home/m/b rw - fuse /dev/../home/m/mnt rw\n"
        "3 1 0:48 / /c rw - btrfs /dev/../dev/zero rw\n4 1 0:49 / /d rw - btrfs /dev/full rw\n"
    )
    looked: list[str] = []
    stat = os.stat

    def noting(path: Any, *args: Any, **more: Any) -> os.stat_result:
        looked.append(str(path))
        return stat(path, *args, **more)

    monkeypatch.setattr(os, "stat", noting)
    disks(str(tmp_path / "mountinfo"), str(tmp_path / "dev"))
    assert [path for path in looked if path.startswith("/dev/")] == ["/dev/full"]


@pytest.mark.parametrize(
    ("call", "asked", "answer"),
    [
        ("read", Hierarchy.processes, []),
        ("read", Hierarchy.populated, False),
        ("scandir", Hierarchy.children, []),
        ("rmdir", Hierarchy.remove, None),
    ],
)
def test_a_cgroup_that_goes_while_it_is_looked_at_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, asked: Callable[..., Any], answer: Any
) -> None:
    tree = going(tmp_path, monkeypatch, call)
    assert asked(tree, "going") == answer


def test_what_is_written_to_a_cgroup_that_goes_finds_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = going(tmp_path, monkeypatch, "write")
    with pytest.raises(FileNotFoundError):
        tree.write("going", "cgroup.procs", "1")


def going(directory: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> Hierarchy:
    """A cgroup that systemd removes within a system call."""
    tree = Hierarchy(str(directory))
    os.mkdir(tree.path("going"))
    for file in ("cgroup.procs", "cgroup.events"):
        Path(tree.path("going", file)).write_text("populated 1\n" if file == "cgroup.events" else "10\n")

    def goes(*_: Any, **__: Any) -> Any:
        os.rename(tree.path("going"), tree.path("gone"))
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(os, call, goes)
    return tree


def test_a_disk_that_is_not_there_is_no_cgroup_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = FakeHierarchy(tmp_path / "cgroup")
    tree.grow("here")
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENODEV, "no such device")))
    with pytest.raises(OSError, match="no such device") as caught:
        Hierarchy.write(tree, "here", "io.max", "8:0 rbps=1")
    assert caught.value.errno == errno.ENODEV


def test_a_threaded_cgroup_lists_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = FakeHierarchy(tmp_path / "cgroup")
    tree.grow("threaded", 10)
    number = errno.EOPNOTSUPP
    monkeypatch.setattr(os, "read", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    assert tree.processes("threaded") == []
