"""The agent's steps one by one: what it takes over, what it restores, and the order in which it wires its parts."""

import ast
import inspect
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import pytest
from persona_guest.agent import build as building
from persona_guest.agent import lifecycle
from persona_guest.agent.build import Parts, build
from persona_guest.agent.ends import Ends
from persona_guest.broker.events import Changed, Connected, Lost
from persona_guest.gate.inflight import InFlight
from persona_guest.gate.placing import NoPlacing
from persona_guest.ipc.standby import Keeping
from persona_guest.kernel import seccomp
from persona_guest.loop import Loop
from persona_guest.session.model import State
from persona_guest.session.registry import Registry
from persona_guest.settings import Mode, Paths, Settings
from persona_guest.system import systemd

from tests.guest.migrate_site import gated
from tests.guest.test_registry import session
from tests.guest.test_supervisor import gated_child, outcome


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parts]:
    """An agent without cgroups, whose broker is away; nothing of it has begun to work."""
    paths = Paths(runtime_dir=str(tmp_path), state_dir=str(tmp_path / "lib"), cgroup_root="", bpf_dir="")
    monkeypatch.setattr(systemd, "journal", Mock())  # a fake: the real one keeps its socket
    loop = Loop()
    with Ends() as ends:
        keeping = Keeping(loop, str(tmp_path / "standby.sock"))
        settings = Settings(mode=Mode.ENFORCE, paths=paths)
        yield build(settings, loop, tmp_path / "state", ends, keeping, InFlight(), Mock(), Mock())


def test_what_was_in_flight_is_taken_up(tmp_path: Path) -> None:
    before = InFlight()
    before.put(b"s-1", bytes(seccomp.NOTIF_SIZE))
    keeping, kept = Keeping(Loop(), str(tmp_path / "none")), {"inflight": os.dup(before.fd), "s-1": 99}
    after = lifecycle.take_inflight(kept, keeping)
    assert [name for _slot, name, _raw, _readable in after.left_over()] == ["s-1"]
    assert kept == {"s-1": 99}


def test_a_table_that_is_none_is_replaced_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    keeping, kept = Keeping(Loop(), str(tmp_path / "none")), {"inflight": fd}
    table = lifecycle.take_inflight(kept, keeping)
    assert table.left_over() == []
    assert keeping._kept == {"inflight": table.fd}
    assert "cannot be taken up" in caplog.text
    os.close(fd)


def test_sessions_are_taken_up_and_answered_and_what_has_no_session_lets_nothing_start(parts: Parts) -> None:
    (known, listener), (unknown, other) = gated_child("/usr/bin/true"), gated_child("/usr/bin/true")
    before = Registry(parts.state / "sessions")
    before.save(gated(before, session("s-1")))
    kept = {"s-1": listener, "s-2": other}
    lifecycle.restore(parts, kept)
    assert kept == {}
    (login,) = parts.registry.gated()
    assert (login.session, login.state, login.listener) == (session("s-1"), State.GATED, listener)
    parts.loop.run_until(lambda: not parts.registry.ids(), 10)
    assert outcome(known) == 13  # the broker is away
    assert outcome(unknown) == 38  # ENOSYS, since nobody is left who could answer


def test_a_stream_that_comes_up_says_which_sessions_there_are_and_asks_what_applies(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Mock()
    for part, name in ((parts.broker_client, "have"), (parts.reevaluator, "changed"), (parts.pool, "reachable")):
        monkeypatch.setattr(part, name, getattr(asked, name))
    gated(parts.registry, session("s-1"))
    parts.registry.open(session("s-2"))  # one that opens is over for nobody
    lifecycle.heard(parts, Connected())
    assert [call[0] for call in asked.method_calls] == ["reachable", "have", "changed"]
    asked.have.assert_called_once_with(["s-1", "s-2"])
    asked.reset_mock()
    for event in (Changed(1, "x", None), Changed(1, "x", None), Lost("y")):  # one of them says something new
        lifecycle.heard(parts, event)
    assert [call[0] for call in asked.method_calls] == ["changed"]


def test_a_machine_without_cgroups_binds_nobody(parts: Parts) -> None:
    assert parts.net is None
    assert not parts.enforcing
    assert isinstance(parts.supervisor._placing, NoPlacing)
    assert parts.layers.active() == {**parts.layers.active(), "limits": False, "network": False}


def test_every_part_is_made_of_parts_that_are_there() -> None:
    """No callback names a part that is made further down, and none is put into another after that was made."""
    (function,) = ast.parse(inspect.getsource(building.build)).body
    assert isinstance(function, ast.FunctionDef)
    stored = [
        {node.id for node in ast.walk(step) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        for step in function.body
    ]
    late = set().union(*stored)
    for step, made in zip(function.body, stored, strict=True):
        used = {node.id for node in ast.walk(step) if isinstance(node, ast.Name)} - made
        assert not used & late, f"line {step.lineno} of build() names what is made later"
        late -= made
        changed = [
            node for node in ast.walk(step) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        ]
        assert changed == []


def test_the_session_file_is_one(parts: Parts) -> None:
    login = gated(parts.registry, session("s-1"))
    parts.registry.save(login)
    assert sorted(str(path.relative_to(parts.state)) for path in parts.state.rglob("*.json")) == ["sessions/s-1.json"]
    assert asdict(login.session)["id"] == "s-1"
