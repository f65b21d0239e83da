"""Installations for real, below a directory: apt-get and dpkg with a root of their own and tiny packages."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from persona_guest.dependencies.dpkg import Dpkg
from persona_guest.dependencies.installer.apt import AptError

from tests.guest.apt_root import AptRoot, apt, installed, wish
from tests.waiting import until

pytestmark = [
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt"),
    pytest.mark.skipif(os.geteuid() != 0, reason="dpkg wants to be root"),
]


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


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize("dead", ["http://127.0.0.1:9/third-party", "file:/nowhere"])
def test_one_source_out_of_reach_stops_nothing_that_another_has(root: AptRoot, dead: str) -> None:
    sources = root.path / "etc/apt/sources.list"
    sources.write_text(f"deb [trusted=yes] {dead} ./\n" + sources.read_text())
    apt(root).install(wish("hello"))
    root.package("later")
    apt(root).install(wish("later"))
    assert installed(root) == {"hello", "helper", "later"}
    with pytest.raises(AptError, match=f"Depends: nowhere but.*; the package lists cannot be renewed either: .*{dead}"):
        apt(root).install(wish("nowhere"))
    with pytest.raises(AptError, match="installation script subprocess returned error") as failed:
        apt(root).install(wish("broken"))
    assert dead not in str(failed.value)
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
