"""Installations for real, below a directory: apt-get and dpkg with a root of their own and tiny packages."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from persona_guest.core import dependencies as core
from persona_guest.core.dependencies import Lacking, Outcome, Progress
from persona_guest.installer import service
from persona_guest.installer.apt import Apt, AptError
from persona_guest.installer.client import Installation
from persona_guest.installer.service import Installer
from persona_guest.kernel.dpkg import Dpkg, DpkgError
from persona_guest.kernel.units import Units
from persona_guest.lacking import Look
from persona_guest.settings import Dependencies as Allowed
from persona_guest.settings import Settings

from persona.dependencies import Dependency, Package, Service, parse_dependency
from tests.guest.apt_root import AptRoot

pytestmark = [
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt"),
    pytest.mark.skipif(os.geteuid() != 0, reason="dpkg wants to be root"),
]


@pytest.fixture
def root(tmp_path: Path) -> AptRoot:
    root = AptRoot(tmp_path / "root")
    root.package("hello", "2:2.0", depends="helper (>= 1)")
    root.package("helper", "1.5")
    root.package("broken", depends="helper", postinst="echo sorry; exit 3")
    return root


def apt(root: AptRoot, said: list[str] | None = None, **options: str) -> Apt:
    say = said.append if said is not None else lambda _line: None
    return Apt(say, Dpkg(root.status), root.path / "home", [*root.options, *options.items()], root.dpkg, 1)


def wish(*texts: str) -> list[Package]:
    return [item for text in texts if isinstance(item := parse_dependency(text), Package)]


def installed(root: AptRoot) -> set[str]:
    return set(Dpkg(root.status).installed().versions)


def test_a_package_and_what_it_needs_with_progress(root: AptRoot) -> None:
    said: list[str] = []
    apt(root, said).install(wish("hello (>= 2:1.9)"))
    assert installed(root) == {"hello", "helper"}
    assert any("%" in line for line in said)
    assert root.audit() == ""
    assert list((root.path / "home").iterdir()) == []
    look = Dpkg(root.status)
    assert look.lacking(wish("hello", "hello (= 2:2.0)", "helper (<< 2)")) == []


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ("hello (>= 3:0)", r"Depends: hello \(>= 3:0\)"),
        ("nowhere", "Depends: nowhere but it is not installable"),
        ("broken", "broken package post-installation script subprocess returned error exit status 3"),
    ],
)
def test_what_cannot_be_is_said_in_apt_s_words_and_leaves_nothing(root: AptRoot, wanted: str, why: str) -> None:
    with pytest.raises(AptError, match=why):
        apt(root).install(wish(wanted))
    assert installed(root) == set()
    assert root.audit() == ""


def test_what_was_there_stays_when_another_breaks(root: AptRoot) -> None:
    apt(root).install(wish("helper"))
    with pytest.raises(AptError):
        apt(root).install(wish("hello", "broken"))
    assert installed(root) == {"helper"}
    assert root.audit() == ""


def test_nothing_is_removed_for_something_else(root: AptRoot) -> None:
    apt(root).install(wish("hello"))
    root.package("rival", depends="helper (>= 9)")
    root.package("helper", "9", breaks="hello")
    with pytest.raises(AptError, match="remove"):
        apt(root).install(wish("rival"))
    assert installed(root) == {"hello", "helper"}


def test_a_package_that_is_new_at_the_source_is_found(root: AptRoot) -> None:
    apt(root).install(wish("helper"))
    root.package("later")
    apt(root).install(wish("later"))
    assert "later" in installed(root)


def test_a_lock_that_somebody_holds(root: AptRoot) -> None:
    apt(root).install(wish("helper"))
    code = (
        "import fcntl,sys; f=open(sys.argv[1],'w'); fcntl.lockf(f,fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    )
    argv = ["python3", "-c", code, str(root.path / "var/lib/dpkg/lock-frontend")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        said: list[str] = []
        with pytest.raises(AptError, match=rf"Could not get lock .*It is held by process {holder.pid} \(python3\)"):
            apt(root, said).install(wish("hello"))
        assert said[0].startswith(f"waiting for process {holder.pid} (python3)")
        threading.Timer(0.5, holder.kill).start()
        apt(root).install(wish("hello"))  # within the second that it is given


def test_a_source_that_is_out_of_reach(root: AptRoot) -> None:
    (root.path / "etc/apt/sources.list").write_text("deb [trusted=yes] http://127.0.0.1:9/nothing ./\n")
    with pytest.raises(AptError, match=r"not installable.*cannot be renewed either.*Failed to fetch"):
        apt(root).install(wish("hello"))
    assert root.audit() == ""


@pytest.fixture
def small(root: AptRoot) -> Iterator[AptRoot]:
    """``/opt`` below the root is a file system of 2 MiB."""
    target = root.path / "opt"
    target.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(target)], check=False).returncode:
        pytest.skip("mount is not allowed here")
    yield root
    subprocess.run(["umount", str(target)], check=True)


def test_a_full_disk_leaves_dpkg_consistent(small: AptRoot) -> None:
    small.package("huge", size=8 << 20, depends="helper")
    with pytest.raises(AptError, match="No space left on device"):
        apt(small).install(wish("huge"))
    assert installed(small) == set()
    assert small.audit() == ""
    apt(small).install(wish("hello"))


CUT = """
import sys; from pathlib import Path; from tests.guest.test_installer import *
root = AptRoot.__new__(AptRoot); root.path = Path(sys.argv[1])
apt(root, **dict(word.split("=", 1) for word in sys.argv[2:])).install(wish("slow", "hello"))
"""


def cut_off(root: AptRoot, *options: str) -> None:
    """Kills a run, and all that it started, once there is ``begun``."""
    argv = [sys.executable, "-c", CUT, str(root.path), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(argv, env=environment, start_new_session=True) as run:
        until((root.path / "begun").exists, 30)
        os.killpg(run.pid, signal.SIGKILL)
    for name in ("lock-frontend", "lock"):  # until apt-get and dpkg are really gone
        with open(root.path / "var/lib/dpkg" / name, "w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)


@pytest.fixture
def slow(root: AptRoot) -> AptRoot:
    root.package("slow", depends="helper", postinst=f"touch {root.path}/begun; sleep 60")
    root.package("theirs", conffile=True)
    return root


def test_a_run_that_was_cut_off_is_put_back_by_the_next(slow: AptRoot) -> None:
    cut_off(slow)
    assert "slow" in Dpkg(slow.status).installed().unfinished or slow.audit() != ""
    slow.operator("-i", "theirs_1")
    slow.operator("-i", "hello_2%3a2.0")  # of the same transaction
    apt(slow).recover()
    assert installed(slow) == {"helper", "theirs", "hello"}
    assert slow.audit() == ""
    assert not (slow.path / "home/installing").exists()
    apt(slow).install(wish("hello"))


def test_a_run_that_was_cut_off_before_dpkg_began(slow: AptRoot) -> None:
    cut_off(slow, f"DPkg::Pre-Invoke::=touch {slow.path}/begun; sleep 60")
    slow.operator("-i", "helper_1.5", "hello_2%3a2.0", "theirs_1")
    said: list[str] = []
    apt(slow, said).recover()
    assert installed(slow) == {"helper", "hello", "theirs"}
    assert said == []


def test_dpkg_does_not_begin_without_a_note(root: AptRoot) -> None:
    (root.path / "home").mkdir()
    (root.path / "home/installing").symlink_to("/dev/full")
    with pytest.raises(AptError, match="Failure running script"):
        apt(root).install(wish("hello"))
    assert installed(root) == set()


class Meanwhile(list[str]):
    """What a person is told; when it has ``words``, somebody else does something."""

    def __init__(self, words: str, do: Callable[[], object]) -> None:
        super().__init__()
        self._words, self._do = words, do

    def append(self, line: str) -> None:
        if self._words in line:
            self._do()
        super().append(line)


def test_what_somebody_installs_before_dpkg_begins_stays(root: AptRoot) -> None:
    apt(root).install(wish("helper"))
    root.package("late", depends="hello", postinst="exit 3")  # not in the lists yet
    root.package("theirs", conffile=True)
    said = Meanwhile("asking the package sources", lambda: root.operator("-i", "theirs_1"))
    with pytest.raises(AptError, match="late package post-installation"):
        apt(root, said).install(wish("late"))
    assert installed(root) == {"helper", "theirs"}
    assert root.audit() == ""


def test_what_somebody_else_has_finished_meanwhile_stays(root: AptRoot) -> None:
    apt(root).install(wish("helper"))
    root.package("hello", "2:3")  # not in the lists yet
    code = (
        "import fcntl,os,subprocess,sys,time; f=open(sys.argv[1],'w'); fcntl.lockf(f,fcntl.LOCK_EX);"
        "subprocess.run(sys.argv[2:],env={**os.environ,'DPKG_FRONTEND_LOCKED':'1'},stdout=2); print(flush=True);"
        "time.sleep(1)"
    )
    lock, deb = root.path / "var/lib/dpkg/lock-frontend", root.source / "hello_2%3a3_all.deb"

    def upgrade() -> None:
        argv = [sys.executable, "-c", code, str(lock), *root.dpkg, "-i", str(deb)]
        other = subprocess.Popen(argv, stdout=subprocess.PIPE)
        assert other.stdout is not None
        other.stdout.readline()
        others.append(other)

    others: list[subprocess.Popen[bytes]] = []
    with pytest.raises(AptError, match="broken package post-installation"):
        apt(root, Meanwhile("putting things back", upgrade)).install(wish("hello", "broken"))
    others[0].communicate()
    assert installed(root) == {"hello", "helper"}
    assert root.audit() == ""


def test_what_was_removed_before_keeps_its_configuration(root: AptRoot) -> None:
    root.package("kept", conffile=True, depends="helper")
    root.package("fresh", conffile=True)
    apt(root).install(wish("kept"))
    (root.path / "opt/kept").write_text("mine")
    root.operator("--remove", "kept", "helper")
    with pytest.raises(AptError, match="broken package post-installation"):
        apt(root).install(wish("kept", "fresh", "broken"))
    assert (root.path / "opt/kept").read_text() == "mine"
    assert not (root.path / "opt/fresh").exists()
    assert "fresh" not in installed(root)
    assert root.audit() == ""


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
    return Installer(settings, Look(dpkg, units), units, lambda say: apt(root))


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


def until(holds: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
