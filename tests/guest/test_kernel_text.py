"""What the kernel and root's own files say is read as bytes: names in them may hold white space of any script."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from persona_guest.core import kernel_text, state_line
from persona_guest.core.persona_cgroups import manager_of, scope_of
from persona_guest.core.ruleset import STUBS, resolvers
from persona_guest.dependencies.dpkg import Dpkg
from persona_guest.dependencies.installer.apt import own_words
from persona_guest.enforce.cgroups.disks import disks
from persona_guest.health import rules
from persona_guest.health.report import Watch
from persona_guest.kernel import cgroup, fd_inode
from persona_guest.kernel.task import Task
from persona_guest.session import login_shells

from persona.health import decode_report, encode_report

ROOT = b"22 1 254:0 / / rw - ext4 /dev/vda1 rw\n"
# White space of str, line ends of str or bytes, and what is no UTF-8.
ODD = [b"\xc2\xa0", b"\xc2\x85", b"\xe2\x80\xa8", b"\xe3\x80\x80", b"\r", b"\x0b", b"\x0c", b"\x1c", b"\xff"]


def mount(name: bytes, rest: bytes = b"ext4 /dev/vdb rw") -> bytes:
    return b"36 22 254:16 / /srv/a" + name + b"b rw,relatime shared:1 - " + rest + b"\n"


@pytest.mark.parametrize("odd", ODD)
def test_a_mount_is_found_whatever_its_name_holds(odd: bytes) -> None:
    assert rules.real_mounts(ROOT + mount(odd)) == sorted(["/", os.fsdecode(b"/srv/a" + odd + b"b")])
    assert [found.point for found in kernel_text.mounts(mount(odd) + ROOT)] == [b"/srv/a" + odd + b"b", b"/"]


def test_what_the_kernel_escapes_is_read_back() -> None:
    (found,) = kernel_text.mounts(mount(rb"\040\011\012\134040\043", rb"ext\0404 /dev/a\012b rw"))
    assert (found.point, found.kind, found.source) == (b"/srv/a \t\n\\040#b", b"ext 4", b"/dev/a\nb")


@pytest.mark.parametrize(
    ("line", "writable"),
    [(b"ext4 /dev/vdb rw,x", True), (b"ext4 /dev/vdb ro,lower=a,rw", False), (b"overlay  rw", True)],
)
def test_whether_it_is_writable_is_the_first_word_alone(line: bytes, writable: bool) -> None:
    (found,) = kernel_text.mounts(mount(b"", line))
    assert found.writable is writable


@pytest.mark.parametrize("line", [b"", b"cut", b"1 2 3 4 5 - - x y", b"x 1 254:0 / / rw - ext4 /dev/vda rw", b"\xff"])
def test_a_line_of_another_form_is_left_out(line: bytes) -> None:
    assert [found.point for found in kernel_text.mounts(line + b"\n" + ROOT)] == [b"/"]


@pytest.mark.parametrize("odd", ODD)
def test_a_disk_is_found_behind_any_mount_point(tmp_path: Path, odd: bytes) -> None:
    for device in ("254:0", "254:16"):
        (tmp_path / device).mkdir()
        (tmp_path / device / "dev").write_text(device + "\n")
    (tmp_path / "mountinfo").write_bytes(mount(odd, b"ext4 x rw") + ROOT)
    assert disks(str(tmp_path / "mountinfo"), str(tmp_path)) == ("254:16", "254:0")


def test_a_mount_point_of_a_user_names_no_source(tmp_path: Path) -> None:
    device = os.stat("/dev/null").st_rdev
    name = f"{os.major(device)}:{os.minor(device)}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "dev").write_text(name + "\n")
    point = "/home/m/x\u00a0-\u00a0ext4\u00a0/dev/null".encode()
    (tmp_path / "mountinfo").write_bytes(b"36 22 0:46 / " + point + b" rw - fuse.x lie rw\n")
    assert disks(str(tmp_path / "mountinfo"), str(tmp_path)) == ()


@pytest.mark.parametrize("odd", [b"\r22", b"\xff", b"\xc2\x8522"])
def test_a_device_is_found_by_its_mount_whatever_another_is_called(tmp_path: Path, odd: bytes) -> None:
    (tmp_path / "mountinfo").write_bytes(b"21 1 0:9 / /home/m/x" + odd + b" rw - fuse.x x rw\n" + ROOT)
    assert fd_inode._device_of_mount(22, str(tmp_path / "mountinfo")) == 254 << 20
    assert fd_inode._device_of_mount(23, str(tmp_path / "mountinfo")) is None


@pytest.mark.parametrize("odd", [b"\xc2\xa0", b"\xff", b"\r"])
def test_a_real_full_disk_is_in_the_report(tmp_path: Path, odd: bytes) -> None:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    point = os.fsencode(tmp_path) + b"/a" + odd + b"b"
    os.mkdir(point)
    (proc / "self" / "mountinfo").write_bytes(b"36 22 254:16 / " + point + b" rw - ext4 /dev/vdb rw\n")
    report = Watch(1000, dict, proc).measure(None)
    assert [space.total > 0 for space in report.disks.values()] == [True]
    assert decode_report(encode_report(report)) == report
    next(iter(report.disks)).encode("utf-8")  # text that every store takes


@pytest.fixture
def named() -> Iterator[subprocess.Popen[bytes]]:
    """A process that calls itself what a line of status would be, if names were not escaped."""
    code = (
        "import ctypes, sys; ctypes.CDLL(None).prctl(15, b'\\rPPid:\\t1\\rUid:'); print(flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    process.stdout.readline()
    yield process
    process.stdin.close()
    process.stdout.close()
    process.wait()


def test_a_process_is_told_by_its_own_lines(named: subprocess.Popen[bytes]) -> None:
    assert Path(f"/proc/{named.pid}/comm").read_bytes() == b"\rPPid:\t1\rUid:\n"
    task = Task(named.pid)
    assert task.credentials() == ((os.geteuid(),) * 4, os.getpid(), named.pid)
    keys = [line.partition(b":")[0] for line in kernel_text.lines(task._read("status", 4096))]
    assert keys.count(b"PPid") == keys.count(b"Uid") == 1


@pytest.mark.parametrize("odd", [b"\xc2\x85", b"\xe2\x80\xa8", b"\r", b"\x0b", b"\x1c", b"\xff", b"\xc2\xa0"])
def test_a_cgroup_has_its_whole_name(odd: bytes) -> None:
    name = b"user.slice/user-1000.slice/user@1000.service/x" + odd + b"0::/system.slice"
    text = b"1:name=systemd:/v1" + odd + b"\n0::/" + name + b"\n"
    assert cgroup._cgroup_in(text) == os.fsdecode(name)
    assert manager_of(os.fsdecode(name), 1000) == "user.slice/user-1000.slice/user@1000.service"
    assert cgroup._cgroup_in(b"1:name=systemd:/v1" + odd + b"0::/lie\n") is None


def test_digits_of_another_script_are_no_number() -> None:
    other = "\u0661\u0660\u0660\u0660"
    assert int(other) == 1000
    assert kernel_text.decimal(other) is None
    assert kernel_text.decimal("1_0") is None
    assert kernel_text.decimal(b"18446744073709551615") == (1 << 64) - 1
    assert scope_of(f"user.slice/user-{other}.slice/session-1.scope", 1000) is None
    assert rules.pressure(f"some avg10={other}.0 avg60=0\n") is None
    assert rules.counts({"_UID": 0, "COREDUMP_UID": other}, 1000)
    assert rules.memory(f"MemTotal: {other} kB\nMemAvailable: 1 kB\n") is None
    with pytest.raises(ValueError, match="not a load average"):
        rules.load_average(f"{other}.0 0 0 1/9 9\n", 1)


def test_files_of_root_s_are_read_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shells = tmp_path / "shells"
    shells.write_bytes(b"\xff /bin/zsh\nanne\xc2\xa0x /bin/fish\nbob /bin/ksh\n")
    monkeypatch.setattr(login_shells, "SHELLS", str(shells))
    assert login_shells.real_shell("bob", "/bin/sh") == "/bin/ksh"
    assert login_shells.real_shell("anne\u00a0x", "/bin/sh") == "/bin/fish"
    assert login_shells.real_shell("anne", "/bin/sh") == "/bin/sh"
    text = b"# x\xc2\x85nameserver 192.0.2.9\n#\rnameserver 192.0.2.8\n\xff\nnameserver 192.0.2.1\n"
    assert set(resolvers(text)) == {"192.0.2.1", *STUBS}
    assert "" not in login_shells.login_shells()
    assert state_line.parse("mode=complain\x0cuid_min=0\n", 1000) == state_line.GateFile(True, 1000)


def test_what_apt_says_is_taken_by_its_own_lines() -> None:
    assert own_words(b"Get:1 x\xc2\x85E: not its own line\nE: its own\n") == "E: its own"


def test_a_package_whose_control_file_is_no_utf8_hides_no_other(tmp_path: Path) -> None:
    status = tmp_path / "status"
    stanza = b"Package: %s\nStatus: install ok installed\nVersion: 1\nProvides: %s\n"
    status.write_bytes(stanza % (b"old", b"x\xe9, other (= 2)") + b"\n" + stanza % (b"new", b"mail\xa0agent"))
    found = Dpkg(status).installed()
    assert found.versions == {"old": ("1",), "new": ("1",)}
    assert found.provided["other"] == ("2",)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes groups")
def test_a_filter_is_seen_beside_many_groups() -> None:
    code = (
        "import ctypes, os, struct, sys; os.setgroups(range(20000, 22000)); "
        "allow = ctypes.create_string_buffer(struct.pack('=HBBI', 6, 0, 0, 0x7FFF0000)); "  # BPF_RET, SECCOMP_RET_ALLOW
        "program = ctypes.create_string_buffer(struct.pack('@HP', 1, ctypes.addressof(allow))); "
        "print(ctypes.CDLL(None).prctl(22, 2, program), flush=True); sys.stdin.read()"  # PR_SET_SECCOMP, FILTER
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"0\n"
        assert Task(process.pid).is_filtered()
        assert not Task(os.getpid()).is_filtered()
        process.stdin.close()
