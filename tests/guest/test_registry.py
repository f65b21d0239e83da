"""Which sessions there are, whose a process is, and what of them outlives the agent."""

import json
import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from persona_guest.core.file_id import Image
from persona_guest.core.persona_cgroups import place_of
from persona_guest.kernel.task import Task, with_ancestors
from persona_guest.session.model import Admitted, Login, Session, State
from persona_guest.session.placement import Placement
from persona_guest.session.registry import Registry

from persona.decisions import PersonaRef, Subject
from tests.guest.conftest import SmallDisk
from tests.guest.migrate_site import SCOPE, gated

ONE = PersonaRef("One", 3)


def session(name: str = "s-1", uid: int = 1000, monitor: int = 1) -> Session:
    started = Task(monitor).started()
    return Session(name, Subject("u", ("staff",), "vm"), uid, "su", "far", "/bin/sh", monitor, 7, 5.0, started)


def placement(name: str = "s-1") -> Placement:
    found = Placement(name, 1000, SCOPE, Image(1, 2), ONE)
    found.add(place_of(name, 1000, ONE, SCOPE))
    return found


def told(login: Login) -> tuple[Session, Admitted | None, Placement | None]:
    return login.session, login.admitted, login.placement


def test_of_several_sessions_in_one_login_descent_tells_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Task, "audit_session", lambda _task: 7)
    registry = Registry(tmp_path)
    first, second = (
        gated(registry, session(name, monitor=monitor)) for name, monitor in (("s-1", 1), ("s-2", os.getppid()))
    )
    assert registry.find(os.getpid()) is second
    registry.end(second)
    assert registry.find(os.getpid()) is first
    gated(registry, replace(first.session, id="s-3", monitor=999_999))
    assert registry.find(os.getpid()) is None


def test_everybody_is_told_once_of_an_end_in_their_order_with_the_state_it_ended_in(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    heard: list[tuple[str, State]] = []
    registry.at_end(
        lambda login: heard.append(("first", login.state)), lambda login: heard.append(("then", login.state))
    )
    opening = registry.open(session())
    registry.end(opening)
    registry.end(opening)
    assert heard == [("first", State.OPENING), ("then", State.OPENING)]
    assert opening.state is State.ENDED
    assert registry.get("s-1") is None
    login = gated(registry, session())
    registry.end(opening)  # another of that name
    assert registry.get("s-1") is login


def test_who_fails_at_an_end_keeps_nobody_from_hearing_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_login: Login) -> None:
        raise KeyError("unforeseen")

    registry = Registry(tmp_path)
    heard: list[str] = []
    registry.at_end(broken, lambda login: heard.append(login.session.id))
    login = gated(registry, session())
    registry.end(login)
    assert (heard, login.state) == (["s-1"], State.ENDED)
    assert "not every part could be told" in caplog.text


def test_only_gated_sessions_count(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.open(session("s-1"))
    gated(registry, session("s-2")).placement = placement("s-2")
    gated(registry, session("s-3", uid=1001))
    assert registry.ids() == ["s-1", "s-2", "s-3"]
    assert [login.session.id for login in registry.gated()] == ["s-2", "s-3"]
    assert [login.session.id for login in registry.of_user(1000)] == ["s-2"]
    assert [found.session_id for found in registry.placements()] == ["s-2"]
    assert registry.subject_of("s-1") == Subject("u", ("staff",), "vm")
    assert registry.subject_of("s-4") is None


@pytest.mark.parametrize("admitted", [None, Admitted(None, None), Admitted(ONE, "p")])
@pytest.mark.parametrize("place", [None, placement()])
def test_a_session_outlives_the_agent(tmp_path: Path, admitted: Admitted | None, place: Placement | None) -> None:
    before = Registry(tmp_path)
    login = gated(before, session())
    login.admitted, login.placement = admitted, place
    before.save(login)
    after, listeners = Registry(tmp_path), {"s-1": 77, "s-2": 78}
    after.restore(listeners)
    (found,) = after.gated()
    assert told(found) == told(login)
    assert found.listener == 77
    assert listeners == {"s-2": 78}  # of which nothing is known


def test_a_file_without_a_listener_goes_and_one_that_cannot_be_read_keeps_nobody_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = Registry(tmp_path)
    for name in ("s-1", "s-2"):
        before.save(gated(before, session(name)))
    listeners = {"s-2": 70}
    for number, text in enumerate(("", "{", "[]", "{}", '{"session": 1, "admitted": 2, "placement": 3}'), 3):
        (tmp_path / f"s-{number}.json").write_text(text)
        listeners[f"s-{number}"] = 70 + number
    after = Registry(tmp_path)
    after.restore(listeners)
    assert after.ids() == ["s-2"]
    assert listeners == {f"s-{number}": 70 + number for number in range(3, 8)}
    assert caplog.text.count("refused everything") == 5
    assert not (tmp_path / "s-1.json").exists()


@pytest.mark.parametrize("full", [False, True])
def test_what_0_1_0_kept_in_three_files_is_taken_up_and_kept_in_one(small_disk: SmallDisk, full: bool) -> None:
    state = small_disk.path
    for folder in ("sessions", "places"):
        (state / folder).mkdir()
    for name in ("s-1", "s-2"):
        (state / "sessions" / f"{name}.json").write_text(json.dumps(asdict(session(name))))
    (state / "places" / "s-1.json").write_text(json.dumps(placement().to_json()))
    (state / "bases.json").write_text(json.dumps({"s-1": [1000, "One", 3]}))
    if full:
        small_disk.fill()
    registry = Registry(state / "sessions")
    registry.restore({"s-1": 77, "s-2": 78})
    first, second = registry.gated()
    assert told(first) == (session(), Admitted(ONE, None), placement())
    assert told(second) == (session("s-2"), None, None)
    assert (state / "bases.json").exists() is full  # the next agent needs it
    assert (state / "places").exists() is full
    small_disk.empty()
    again = Registry(state / "sessions")
    again.restore({"s-1": 77, "s-2": 78})
    assert [told(login) for login in again.gated()] == [told(first), told(second)]


def test_what_could_not_be_written_is_written_later(small_disk: SmallDisk) -> None:
    registry = Registry(small_disk.path / "sessions")
    login = gated(registry, session())
    small_disk.fill()
    with pytest.raises(OSError, match="No space left"):
        registry.save(login)
    registry.try_to_save(login)
    assert registry._unsaved == {"s-1"}
    registry.save_again()
    small_disk.empty()
    registry.save_again()
    assert registry._unsaved == set()
    assert json.loads((small_disk.path / "sessions" / "s-1.json").read_text())["session"]["id"] == "s-1"
    registry.end(login)
    assert not list((small_disk.path / "sessions").iterdir())


def test_a_process_s_ancestors_end_below_init_at_the_limit_and_where_one_is_gone() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        assert [pid for pid, _ in with_ancestors(child.pid, 2)] == [child.pid, os.getpid()]
        assert [credentials.ppid for _, credentials in with_ancestors(child.pid, 1)] == [os.getpid()]
        assert 1 not in [pid for pid, _ in with_ancestors(child.pid, 1000)]
        child.kill()
    assert list(with_ancestors(child.pid, 2)) == []
