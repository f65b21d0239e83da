"""``persona-agent release`` where no agent can be told, or guest.toml cannot be read: what was bound goes as well."""

import errno
from pathlib import Path

import pytest
from persona_guest import __main__ as agent
from persona_guest.agent import admin
from persona_guest.core.persona_cgroups import FALLBACK_ROOT, PersonaCgroup, place_of
from persona_guest.enforce.cgroups.facility import Cgroups
from persona_guest.enforce.plan import apply
from persona_guest.settings import Paths, Settings
from persona_guest.shell.client import AgentError

from persona.decisions import PersonaRef
from persona.documents import Persona, ResourceLimits
from persona.patterns import Whitelist
from persona.problems import Fault
from tests.guest.fake_cgroups import FakeHierarchy

SLICE = "user.slice/user-1000.slice"
SCOPE, MANAGER, CRON = f"{SLICE}/session-5.scope", f"{SLICE}/user@1000.service", "system.slice/cron.service"
PERSONA = Persona("P", Whitelist(()), ResourceLimits(pids=64), priority=50)


class FakeNet:
    """Counts how often it was cleared; ``lacking``: as on a machine without nftables."""

    cleared = 0
    lacking = False

    def __init__(self, *_: object) -> None:
        if self.lacking:
            raise OSError(errno.EPROTONOSUPPORT, "no nftables")

    def clear(self) -> None:
        FakeNet.cleared += 1


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHierarchy:
    """Bound by an agent that died: a frozen place in a login's scope, a service manager, a job of cron's."""
    tree = FakeHierarchy(tmp_path / "cgroup")
    monkeypatch.setattr(admin, "Hierarchy", lambda root: tree if root == tree.root else None)
    monkeypatch.setattr(admin, "Net", FakeNet)
    monkeypatch.setattr(FakeNet, "cleared", 0)
    for found, pid in ((SCOPE, 10), (MANAGER, 30), (CRON, 20)):
        tree.grow(found, pid)
        here = place(found)
        apply(Cgroups(tree).enter(here, PERSONA))
        if not here.managed:
            tree.move(here.cgroup, pid)
    tree.freeze(place(SCOPE).cgroup)
    return tree


def place(found: str) -> PersonaCgroup:
    return place_of("s-1", 1000, PersonaRef("P", 1), found, shared=False)


def release(tree: FakeHierarchy, tmp_path: Path) -> int:
    return admin.release(Settings(paths=Paths(runtime_dir=str(tmp_path), cgroup_root=tree.root)))


@pytest.mark.parametrize("lacking", [False, True])
def test_a_dead_agents_cgroups_go(
    tree: FakeHierarchy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: bool
) -> None:
    monkeypatch.setattr(FakeNet, "lacking", lacking)
    assert release(tree, tmp_path) == 1
    assert FakeNet.cleared == (not lacking)
    assert (tree.processes(SCOPE), tree.children(SCOPE)) == ([10], [])
    assert (tree.processes(CRON), tree.exists(FALLBACK_ROOT)) == ([20], False)
    assert tree.read(MANAGER, "pids.max") == "max\n"
    assert Cgroups(tree).reconcile({}) == ()


def test_what_cannot_go_keeps_nothing_else(
    tree: FakeHierarchy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remove = tree.remove

    def busy(cgroup: str) -> None:
        if cgroup == place(CRON).cgroup:
            raise OSError(errno.EBUSY, "busy", cgroup)
        remove(cgroup)

    monkeypatch.setattr(tree, "remove", busy)
    assert release(tree, tmp_path) == 1
    assert (tree.processes(SCOPE), tree.children(SCOPE)) == ([10], [])
    assert place(CRON).cgroup in caplog.text


@pytest.mark.parametrize("text", ["mode = ", "mode = 'strict'", "nosuch = 1"])
def test_release_needs_no_settings_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    config, other, asked = tmp_path / "guest.toml", tmp_path / "trial.toml", list[Settings]()
    for path in (config, other):
        path.write_text(text)

    def told(settings: Settings, *, as_json: bool) -> int:
        asked.append(settings)
        return 0

    monkeypatch.setattr(admin, "release", told)
    monkeypatch.setattr(agent, "CONFIG", str(config))
    assert agent.main(["release"]) == 0
    assert [settings.paths for settings in asked] == [Paths()]
    said = capsys.readouterr().err
    assert said.startswith(f"persona-agent: {config}: ")
    assert said.count("\n") == 1
    assert agent.main(["plan"]) == 1
    assert agent.main(["--config", str(other), "release"]) == 1  # a trial's: not this machine's agent is meant
    assert len(asked) == 1


def test_who_may_not_release_takes_nothing_away(
    tree: FakeHierarchy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(_path: str) -> None:
        raise AgentError(Fault.UNAUTHENTICATED, "only root")

    monkeypatch.setattr(admin, "Client", refused)
    assert release(tree, tmp_path) == 1
    assert capsys.readouterr().err == "persona-agent: only root\n"
    assert FakeNet.cleared == 0
    assert tree.children(SCOPE) != []
