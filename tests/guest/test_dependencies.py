"""A grant whose persona needs something: looked at once, installed once for all who wait, and asked for anew."""

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from persona_guest.dependencies.check import DependencyCheck
from persona_guest.dependencies.dpkg import Dpkg, DpkgError, stamp
from persona_guest.dependencies.installer.client import Done, Installation, Say
from persona_guest.dependencies.resolve import Dependencies, DependencyChecker, Installed
from persona_guest.dependencies.rules import Lacking, not_allowed
from persona_guest.loop import Loop
from persona_guest.settings import Dependencies as Allowed
from persona_guest.system.units import Units

from persona.decisions import Decision, Denied, Granted, Lease, PersonaRef, Program, Request, Subject, Width
from persona.dependencies import Dependency, parse_dependency
from persona.problems import Reason

A, PLAIN, SERVED = PersonaRef("A", 1), PersonaRef("Plain", 1), PersonaRef("Served", 1)
NEEDS = {A: (parse_dependency("client (>= 15)"),), SERVED: (parse_dependency("service:db"),), PLAIN: ()}


def granted(ref: PersonaRef = A) -> Granted:
    return Granted(ref, "p", Lease(30, Width.PROGRAM), 7)


def request(session: str = "s-1") -> Request:
    return Request(Subject("u", (), "vm"), session, Program("/usr/bin/x"), ("x",), "/")


class FakeLook(DependencyCheck):
    """A machine that has what ``there`` says."""

    def __init__(self) -> None:
        self.there: set[str] = set()
        self.looks = 0
        self.error = ""
        self.free = threading.Event()
        self.free.set()

    def lacking(self, dependencies: Iterable[Dependency]) -> tuple[Lacking, ...]:
        self.looks += 1
        self.free.wait(10)
        if self.error:
            raise DpkgError(self.error)
        return tuple(Lacking(item, "not installed") for item in dependencies if item.name not in self.there)


class FakeInstallation(Installation):
    """An installer whose end the test decides."""

    def __init__(self) -> None:
        self.wishes: list[tuple[list[str], Say, Done]] = []

    def want(self, dependencies: Iterable[Dependency], say: Say, done: Done) -> None:
        self.wishes.append((list(map(str, dependencies)), say, done))


class Site:
    """The part under test, its loop run by hand."""

    def __init__(self, tmp_path: Path, *, install: bool = True, allowed: Allowed | None = None) -> None:
        self.loop = Loop()
        self.look = FakeLook()
        self.installation = FakeInstallation()
        self.status = tmp_path / "status"
        self.status.write_text("")
        self.said: list[tuple[str, str]] = []
        self.changes = 0
        self.dependencies = Dependencies(
            self.loop,
            allowed or Allowed(install=("*",), start=("*",), deadline_s=1),
            NEEDS.__getitem__,
            DependencyChecker(self.look, self.loop.call_soon_threadsafe),
            self.installation,
            lambda: stamp(self.status),
            lambda request, line: self.said.append((request.session, line)),
            self._changed,
            install=install,
        )

    def _changed(self) -> None:
        self.changes += 1

    def run(self, until: Callable[[], object], seconds: float = 5) -> None:
        self.loop.run_until(until, seconds)

    def ask(self, decision: Decision, session: str = "s-1") -> list[Decision | Installed]:
        """What came of it: a decision, or that it was installed."""
        found: list[Decision | Installed] = []
        self.dependencies.installed(decision, request(session), found.append)
        return found

    def outcome(self, decision: Decision) -> Decision | Installed:
        found = self.ask(decision)
        self.run(lambda: found)
        return found[0]


def test_what_is_there_is_looked_at_once(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.look.there = {"client"}
    first, second = site.ask(granted()), site.ask(granted())
    site.run(lambda: first and second)
    assert site.outcome(granted()) == first[0] == second[0] == granted()
    assert site.look.looks == 1
    assert site.outcome(granted(PLAIN)) == granted(PLAIN)
    denied = Denied(Reason.NO_MATCHING_POLICY)
    assert site.outcome(denied) is denied
    assert site.look.looks == 1


def test_a_change_of_dpkg_s_state_ends_what_was_known_and_leased(tmp_path: Path) -> None:
    site = Site(tmp_path, allowed=Allowed())
    site.dependencies.refresh()
    assert site.changes == 0
    site.look.there = {"client"}
    assert site.outcome(granted()) == granted()
    site.look.there = set()
    site.status.write_text("changed")
    site.dependencies.refresh()
    assert site.changes == 1
    assert isinstance(site.outcome(granted()), Denied)
    assert site.look.looks == 2


def test_services_are_looked_at_again_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path)
    monkeypatch.setattr("persona_guest.dependencies.resolve._SERVICES_S", 0.05)
    site.look.there = {"db"}
    assert site.outcome(granted(SERVED)) == granted(SERVED)
    time.sleep(0.1)
    assert site.outcome(granted(SERVED)) == granted(SERVED)
    assert site.look.looks == 2


def test_by_default_missing_is_denied_with_what_an_operator_can_do(tmp_path: Path) -> None:
    for site in (Site(tmp_path, allowed=Allowed()), Site(tmp_path, install=False)):
        found = site.outcome(granted())
        assert isinstance(found, Denied)
        assert (found.reason, found.policy, found.persona) == (Reason.DEPENDENCY_MISSING, "p", "A")
        assert "client (>= 15) (not installed)" in found.help and "'apt-get install client'" in found.help
        assert found.generation == 7 and 0 < found.lease.seconds < 5
        assert site.installation.wishes == []


def test_one_installation_for_all_who_wait_and_then_ask_again(tmp_path: Path) -> None:
    site = Site(tmp_path)
    waiting = [site.ask(granted(), f"s-{number}") for number in range(5)]
    site.run(lambda: site.installation.wishes and len(site.said) == 5)
    (wish,) = site.installation.wishes
    assert wish[0] == ["client (>= 15)"]
    wish[1]("downloading, 50 %")
    assert {session for session, line in site.said if line == "persona: downloading, 50 %"} == {
        f"s-{n}" for n in range(5)
    }
    assert not any(waiting)
    site.look.there = {"client"}
    wish[2]("")
    assert waiting == [[Installed()]] * 5
    assert site.outcome(granted()) == granted()


def test_a_failure_is_told_in_apt_s_words_and_not_tried_again_at_once(tmp_path: Path) -> None:
    site = Site(tmp_path)
    found = site.ask(granted())
    site.run(lambda: site.installation.wishes)
    site.installation.wishes[0][2]("E: Unable to locate package client")
    assert isinstance(found[0], Denied)
    assert "E: Unable to locate package client" in found[0].help
    again = site.outcome(granted())
    assert isinstance(again, Denied) and "Unable to locate" in again.help
    assert len(site.installation.wishes) == 1
    site.status.write_text("an operator installed something")
    site.look.there = {"client"}
    assert site.outcome(granted()) == granted()


def test_who_waits_too_long_is_denied_and_the_installation_goes_on(tmp_path: Path) -> None:
    site = Site(tmp_path, allowed=Allowed(install=("*",), deadline_s=1))
    first = site.ask(granted())
    site.run(lambda: first)
    assert isinstance(first[0], Denied) and "still being installed" in first[0].help
    second = site.ask(granted())
    site.loop.call_later(0.2, site.loop.stop)
    site.loop.run()
    assert len(site.installation.wishes) == 1
    site.installation.wishes[0][2]("")
    assert (len(first), second) == (1, [Installed()])


def test_who_waits_too_long_for_a_look_is_denied_and_a_hanging_one_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path)
    monkeypatch.setattr("persona_guest.dependencies.resolve._CHECK_MAX_S", 0.2)
    site.look.there = {"client", "db"}
    site.look.free.clear()  # the system bus hangs
    for _ in range(2):
        found = site.outcome(granted())
        assert isinstance(found, Denied) and "took longer" in found.help
    assert site.look.looks == 1
    waits = site.ask(granted())
    site.look.free.set()
    site.run(lambda: waits)
    assert waits == [granted()]


def test_a_question_installs_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path)
    found: list[Decision] = []
    site.dependencies.backed(granted(), found.append, "would first have installed:")
    site.run(lambda: found)
    assert isinstance(found[0], Denied) and "would first have installed: client" in found[0].help
    assert site.installation.wishes == []


def test_what_cannot_be_told_is_not_there(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.look.error = "status: cannot be read"
    found = site.outcome(granted())
    assert isinstance(found, Denied) and "cannot be told: status: cannot be read" in found.help


def test_without_a_bus_a_service_does_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")
    (lacking,) = DependencyCheck(Dpkg(tmp_path / "status"), Units()).lacking([parse_dependency("service:cron")])
    assert lacking.found.startswith("systemd cannot be asked")


@pytest.mark.parametrize("pattern", ["cron", "cron.service", "cr*", "*.service", "*"])
def test_a_service_may_be_named_with_its_ending_in_the_settings(pattern: str) -> None:
    lacking = [Lacking(parse_dependency("service:cron"), "inactive")]
    assert not_allowed(lacking, (), (pattern,)) == []
    assert not_allowed(lacking, (pattern,), ()) == lacking
    assert not_allowed(lacking, (), ("cron.socket", "cro")) == lacking
