"""The installer: what it finds there, what it may do, and how it is asked; its installations are real ones."""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from persona_guest.dependencies import rules as core
from persona_guest.dependencies.check import DependencyCheck
from persona_guest.dependencies.dpkg import Dpkg, DpkgError
from persona_guest.dependencies.installer import service
from persona_guest.dependencies.installer.client import Installation
from persona_guest.dependencies.installer.service import Installer
from persona_guest.dependencies.rules import Lacking, Outcome, Progress
from persona_guest.settings import Dependencies as Allowed
from persona_guest.settings import Settings
from persona_guest.system.units import Units

from persona.dependencies import Dependency, Service, parse_dependency
from tests.guest.apt_root import AptRoot, apt, installed, wish
from tests.waiting import until

pytestmark = [
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt"),
    pytest.mark.skipif(os.geteuid() != 0, reason="dpkg wants to be root"),
]


# --- what is there ----------------------------------------------------------------------------------

STATUS = """\
Package: client
Status: install ok installed
Version: 15+248
Architecture: all

Package: held
Status: hold ok installed
Version: 1:2.0-3
Architecture: amd64
Provides: virtual, other (= 7), multi:any (= 3)

Package: gone
Status: deinstall ok config-files
Version: 9
Architecture: all

Package: half
Status: install ok half-configured
Version: 1
Architecture: all
"""


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("client", ""),
        ("client (>= 15)", ""),
        ("client (<< 15)", "15+248 is installed"),
        ("held (= 1:2.0-3)", ""),
        ("held (>> 1:2.0-3)", "1:2.0-3 is installed"),
        ("held (>= 2)", ""),  # by its epoch
        ("virtual", ""),
        ("virtual (>= 1)", "only provided by another package"),
        ("other (>= 7)", ""),
        ("other (>= 8)", "only provided by another package"),
        ("multi (= 3)", ""),
        ("gone", "not installed"),
        ("half", "not installed"),
        ("nowhere", "not installed"),
    ],
)
def test_what_is_installed(tmp_path: Path, wanted: str, found: str) -> None:
    (tmp_path / "status").write_text(STATUS)
    dependency = wish(wanted)[0]
    assert Dpkg(tmp_path / "status").lacking([dependency]) == ([Lacking(dependency, found)] if found else [])


def test_the_status_is_read_again_when_it_changed(tmp_path: Path) -> None:
    dpkg = Dpkg(tmp_path / "status")
    with pytest.raises(DpkgError):
        dpkg.installed()
    (tmp_path / "status").write_text(STATUS)
    first = dpkg.installed()
    assert first.unfinished == {"half"}
    assert dpkg.installed() is first
    (tmp_path / "status").write_text(STATUS.replace("deinstall ok config-files", "install ok installed"))
    assert "gone" in dpkg.installed().versions


# --- the service ------------------------------------------------------------------------------------


class FakeUnits(Units):
    """systemd as a dictionary: what is started is active at the second look, or fails."""

    def __init__(self, **states: str) -> None:
        super().__init__()
        self.states = states
        self.started: list[str] = []

    def state(self, service: str) -> str:
        state = self.states.get(service, "not-found")
        if state == "activating":
            self.states[service] = "active"
        elif service == "once" and state == "active":
            self.states[service] = "failed"
        return state

    def start(self, service: str) -> None:
        self.started.append(service)
        self.states[service] = "failed" if service.startswith("bad") else "activating"


def installer(root: AptRoot, units: Units, **allowed: Any) -> Installer:
    settings = replace(Settings(), dependencies=Allowed(**allowed))
    dpkg = Dpkg(root.status)
    return Installer(settings, DependencyCheck(dpkg, units), units, lambda say: apt(root))


def parsed(*texts: str) -> tuple[Dependency, ...]:
    return tuple(parse_dependency(text) for text in texts)


def test_only_what_guest_toml_allows(root: AptRoot) -> None:
    units = FakeUnits(db="inactive")
    for allowed in ({}, {"install": ("other-*",), "start": ("*",)}, {"install": ("*",)}):
        why = installer(root, units, **allowed).meet(parsed("hello", "service:db"), print)
        assert why.startswith("guest.toml does not allow it: ")
    assert (installed(root), units.started) == (set(), [])
    assert installer(root, units, install=("hel*",), start=("d?",)).meet(parsed("hello", "service:db"), print) == ""
    assert (installed(root), units.started) == ({"hello", "helper"}, ["db"])
    assert installer(root, units).meet(parsed("hello", "service:db"), print) == ""  # nothing to do


def test_services(root: AptRoot) -> None:
    units = FakeUnits(bad="inactive", masked="masked")
    everything = installer(root, units, install=("*",), start=("*",))
    assert "service:bad does not run, it is failed" in everything.meet(parsed("service:bad"), print)
    units.states["once"] = "inactive"
    assert "service:once does not run, it is failed" in everything.meet(parsed("service:once"), print)
    assert "it is masked" in everything.meet(parsed("service:masked"), print)
    assert "it is not-found" in everything.meet(parsed("service:none"), print)
    assert units.started == ["bad", "once"]


class Served:
    """A real installer behind its socket, in a thread; ``mail`` stands for the agent's loop."""

    def __init__(self, path: Path, installer: Installer) -> None:
        self.path = str(path)
        self.mail: list[Callable[[], None]] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen()
        self._ended = False
        self._thread = threading.Thread(target=service.serve, args=(self._listener, installer, lambda: self._ended))
        self._thread.start()

    def raw(self, data: bytes) -> list[core.Message]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(20)
            connection.connect(self.path)
            connection.send(data)
            found = []
            while answer := connection.recv(core.MESSAGE_MAX):
                found.append(core.decode_message(answer))
            return found

    def close(self) -> None:
        self._ended = True
        self._thread.join(10)
        self._listener.close()


@pytest.fixture
def served(root: AptRoot, tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path / "s", installer(root, FakeUnits(), install=("*",)))
    yield served
    served.close()


def test_wishes_come_one_after_the_other_with_progress_and_an_end(served: Served, root: AptRoot) -> None:
    installation = Installation(served.path, served.mail.append)
    said: list[str] = []
    ended: list[str] = []
    for _ in range(3):
        installation.want(parsed("hello"), said.append, ended.append)
    installation.want(parsed("nowhere"), said.append, ended.append)
    deadline = time.monotonic() + 30
    while len(ended) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
        while served.mail:
            served.mail.pop(0)()
    assert ended[:3] == ["", "", ""]
    assert "not installable" in ended[3]
    assert installed(root) == {"hello", "helper"}


@pytest.mark.parametrize(
    "data",
    [b"x", b"[]", b"{}", b'{"dependencies": []}', b'{"dependencies": ["a b"]}', b'{"dependencies": ["--force"]}',
     b'{"dependencies": ["ok"], "more": 1}', b'{"dependencies": [7]}', b"[" * 60000,
     json.dumps({"dependencies": ["a1"] * 300}).encode()],
)  # fmt: skip
def test_wishes_that_are_refused(served: Served, root: AptRoot, data: bytes) -> None:
    answers = served.raw(data)
    assert len(answers) == 1
    assert isinstance(answers[0], Outcome) and answers[0].why.startswith("a wish that cannot be read")
    assert installed(root) == set()


def test_an_agent_that_leaves_and_one_that_says_nothing(
    served: Served, root: AptRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_WISH_S", 0.2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(served.path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as leaving:
            leaving.connect(served.path)
            leaving.send(core.encode_wish(parsed("hello")))
        until(lambda: installed(root) == {"hello", "helper"})
    assert served.raw(core.encode_wish(parsed("helper")))[-1] == Outcome("")


def test_without_an_installer_there_is_a_reason(tmp_path: Path) -> None:
    mail: list[Callable[[], None]] = []
    ended: list[str] = []
    Installation(str(tmp_path / "none"), mail.append).want(parsed("hello"), print, ended.append)
    until(lambda: mail)
    mail.pop()()
    assert ended[0].startswith("the installer gave no answer: ")


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"outcome": 1}', b'{"outcome": "", "progress": ""}', b"[" * 9999]
)
def test_messages_that_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        core.decode_message(data)


def test_messages_survive() -> None:
    for message in (Progress("x, 5 %"), Outcome(""), Outcome("why")):
        assert core.decode_message(core.encode_message(message)) == message
    assert core.decode_wish(core.encode_wish(parsed("a1 (>= 1)", "service:x"))) == parsed("a1 (>= 1)", "service:x")


def test_what_an_operator_is_told() -> None:
    lacking = [Lacking(item, "not installed") for item in parsed("a1 (>= 2)", "b1", "service:x")]
    assert core.remedy(lacking) == "'apt-get install a1 b1' and 'systemctl start x'"
    assert core.named(lacking[:1]) == "a1 (>= 2) (not installed)"
    assert isinstance(lacking[2].dependency, Service)
