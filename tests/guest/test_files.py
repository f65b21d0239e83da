"""Files that are written whole or not at all, on a disk that is full, and what goes on all the same."""

import errno
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from persona_guest import files
from persona_guest.agent import state_file
from persona_guest.broker.documents import Personas
from persona_guest.core.file_id import Image
from persona_guest.enforce.enforcer import Enforcer
from persona_guest.enforce.network.egress_routes import EgressRoutes
from persona_guest.enforce.network.orphan_sockets import OwnedCgroup, SocketOwners
from persona_guest.loop import Loop
from persona_guest.session.placement import Placement
from persona_guest.session.registry import Registry
from persona_guest.settings import Mode, Paths, Settings

from persona.decisions import PersonaRef
from persona.network import parse_via
from persona.problems import PersonaError
from tests.guest.conftest import SmallDisk
from tests.guest.fake_cgroups import FakeHierarchy
from tests.guest.migrate_site import gated
from tests.guest.test_enforcer import SCOPE, Broker
from tests.guest.test_user_rules import session

Fill = Callable[[SmallDisk], None]
WAYS_OF_BEING_FULL = pytest.mark.parametrize("fill", [SmallDisk.fill, SmallDisk.fill_files])


@WAYS_OF_BEING_FULL
def test_a_full_disk_leaves_what_was_there_and_nothing_else(small_disk: SmallDisk, fill: Fill) -> None:
    path = small_disk.path / "kept.json"
    files.write(path, "old")
    fill(small_disk)
    before = sorted(os.listdir(small_disk.path))
    with pytest.raises(OSError, match=r"kept\.json") as failed:
        files.write(path, "new" * 5000)
    assert failed.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert sorted(os.listdir(small_disk.path)) == before
    small_disk.empty()
    files.write(path, "new")
    assert path.read_text() == "new"


def test_a_write_that_ends_half_way_is_nobody_s(small_disk: SmallDisk) -> None:
    """The disk has room for a part of it."""
    path = small_disk.path / "kept.json"
    files.write(path, "old")
    with pytest.raises(OSError, match="No space left"):
        files.write(path, "x" * (1 << 20))
    assert path.read_text() == "old"
    assert os.listdir(small_disk.path) == ["kept.json"]


def test_a_quota_that_is_used_up_is_like_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kept.json"
    files.write(path, "old")

    def exceeded(_fd: int, _data: object) -> int:  # a fake: no file system with quotas is at hand
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "write", exceeded)
    with pytest.raises(OSError, match="quota"):
        files.write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.json"]


def test_modes_and_directories(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    (tmp_path / "link").write_text("not ours")
    files.write(path, "{}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    files.write(path, "{}", mode=0o644)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    (tmp_path / "a" / "c.json.new").symlink_to(tmp_path / "link")
    with pytest.raises(OSError, match=r"c\.json"):
        files.write(tmp_path / "a" / "c.json", "{}")
    assert (tmp_path / "link").read_text() == "not ours"


def test_what_a_killed_agent_left_goes(tmp_path: Path) -> None:
    (tmp_path / "s-1.json.new").write_text("{")
    (tmp_path / "s-1.json").write_text("{}")
    files.clear_unfinished(tmp_path)
    files.clear_unfinished(tmp_path / "missing")
    assert os.listdir(tmp_path) == ["s-1.json"]


# --- what is kept in such files ---------------------------------------------------------------------


@WAYS_OF_BEING_FULL
def test_ways_are_opened_only_if_they_are_kept_and_go_in_any_case(small_disk: SmallDisk, fill: Fill) -> None:
    one, two, three = (parse_via(f"table {number}") for number in (1, 2, 3))
    egress_routes = EgressRoutes(small_disk.path / "ways.json")
    for via in (one, two):
        egress_routes.number(via)
        egress_routes.making(via)
    fill(small_disk)
    egress_routes.number(three)
    with pytest.raises(OSError, match="No space left"):
        egress_routes.making(three)
    egress_routes.gone(one)
    assert one not in egress_routes.made


@WAYS_OF_BEING_FULL
def test_whose_sockets_are_whose_is_kept_before_it_counts(small_disk: SmallDisk, fill: Fill) -> None:
    owners = SocketOwners(small_disk.path / "outside.json")
    owners.add({1: OwnedCgroup(1000, "", "a")})
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        owners.add({2: OwnedCgroup(1001, "", "b")})
    assert owners.of(1001) == []
    assert owners.of(1000) == [(1, "a")]


@WAYS_OF_BEING_FULL
def test_documents_are_in_memory_then(small_disk: SmallDisk, fill: Fill, tmp_path: Path) -> None:
    fill(small_disk)
    broker = Broker()
    personas = Personas(small_disk.path / "personas", broker.fetch)
    ref, told = PersonaRef("One", 1), list[object]()
    personas.ensure(ref, told.append)
    broker.answer()
    assert told == [None]
    assert personas.get(ref).name == "One"


@WAYS_OF_BEING_FULL
def test_nothing_starts_in_a_place_that_is_not_kept(
    small_disk: SmallDisk, fill: Fill, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = FakeHierarchy(tmp_path / "tree")
    tree.grow(SCOPE)
    broker = Broker()
    personas = Personas(tmp_path / "personas", broker.fetch)
    one, two = PersonaRef("One", 1), PersonaRef("Two", 1)
    for ref in (one, two):
        personas.ensure(ref, lambda _denied: None)
        broker.answer()
    directory = small_disk.path / "sessions"
    registry = Registry(directory)
    enforcer = Enforcer(Loop(), registry, tree, [], personas, lambda _place: None)
    home = gated(registry, session("s-1")).placement = Placement("s-1", 1000, SCOPE, Image(0, 0))
    place = enforcer.enter(home, one, SCOPE)
    kept = (directory / "s-1.json").read_text()
    fill(small_disk)
    for _ in range(2):  # nor does the second one, which finds the place there
        with pytest.raises(PersonaError, match="cannot be kept"):
            enforcer.enter(home, two, SCOPE)
    with caplog.at_level(logging.ERROR):
        enforcer.leave(home, place.key)  # it is empty, whatever can be written
        registry.save_again()
    assert (directory / "s-1.json").read_text() == kept
    small_disk.empty()
    registry.save_again()
    assert '"Two"' in (directory / "s-1.json").read_text()
    assert '"One", 1, ' not in (directory / "s-1.json").read_text()


def state_on(small_disk: SmallDisk, mode: Mode) -> Settings:
    return replace(Settings(), mode=mode, paths=Paths(state_dir=str(small_disk.path)))


@WAYS_OF_BEING_FULL
def test_an_agent_starts_on_a_full_disk_and_says_its_mode_when_it_can(
    small_disk: SmallDisk, fill: Fill, caplog: pytest.LogCaptureFixture
) -> None:
    path = small_disk.path / "gate.state"
    state_file.write(state_on(small_disk, Mode.COMPLAIN))
    complain = path.read_text()
    fill(small_disk)
    state_file.write(state_on(small_disk, Mode.COMPLAIN))  # it is there already
    later: list[Callable[[], None]] = []
    state_file.keep_writing(state_on(small_disk, Mode.ENFORCE), lambda _s, call: later.append(call), lambda: True)
    assert "guest.toml said before" in caplog.text
    assert path.read_text() == complain
    later.pop()()
    assert path.read_text() == complain
    small_disk.empty()
    later.pop()()
    assert path.read_text().startswith("mode=enforce\n")
    assert later == []


def test_a_released_gate_writes_no_mode_any_more(small_disk: SmallDisk) -> None:
    small_disk.fill()
    later: list[Callable[[], None]] = []
    wanted = [True]
    settings = state_on(small_disk, Mode.ENFORCE)
    state_file.keep_writing(settings, lambda _s, call: later.append(call), lambda: wanted[0])
    small_disk.empty()
    wanted[0] = False
    later.pop()()
    assert not state_file.path_of(settings).exists()
    assert later == []
