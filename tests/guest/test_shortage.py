"""Sockets, words to systemd and the journal when there is no descriptor left; and where the state is kept."""

import errno
import logging
import os
import queue
import socket
import stat
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from persona_guest.core.pam_protocol import Caller, Op, PamVerdict, reply
from persona_guest.dependencies.installer.client import Installation
from persona_guest.dependencies.resolve import DependencyChecker
from persona_guest.ipc.pam import PamSocket
from persona_guest.ipc.users import UserSocket
from persona_guest.loop import Loop
from persona_guest.system import runtime_dir, systemd

from tests.guest.conftest import SmallDisk, no_descriptor
from tests.waiting import until


class Counting(Loop):
    """Counts how often it woke up."""

    rounds = 0

    def add_reader(self, fd, events, handler):  # type: ignore[no-untyped-def]
        def counted(found: int) -> None:
            self.rounds += 1
            handler(found)

        super().add_reader(fd, events, counted)


def passes(caller: Caller, pid: int, reply_to: object) -> None:
    reply_to(reply(PamVerdict.PASS))  # type: ignore[operator]


def caller_packet() -> bytes:
    return b"PSN1" + bytes([Op.ACCOUNT, 0, 0, 0]) + bytes(4) + b"sshd\0root\0\0/bin/sh\0"


@pytest.mark.parametrize("kind", ["pam", "users"])
def test_who_connects_while_there_is_no_descriptor_is_served_when_there_is(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Counting()
    path = tmp_path / "sock"
    served = None
    if kind == "pam":
        PamSocket(loop, path, Mock(account=passes), root=os.geteuid())
    else:
        served = UserSocket(loop, path, lambda _call, answer: answer({"ok": True}), lambda _uid: None)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        asking.settimeout(5)
        asking.connect(str(path))
        asking.send(caller_packet() if kind == "pam" else b'{"op": "x"}')
        thread = threading.Thread(target=loop.run)
        with no_descriptor():
            thread.start()
            time.sleep(0.6)
            rounds = loop.rounds
        assert asking.recv(8192)
    until(lambda: served is None or not served._count, 10)  # a thread closes our end
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    assert 1 <= rounds < 30  # not as fast as it can
    assert caplog.text.count("no connection can be taken now") == 1


def test_a_question_that_cannot_be_judged_ends_its_connection_only(tmp_path: Path) -> None:
    loop = Loop()
    admissions = Mock()
    admissions.account.side_effect = OSError(errno.EMFILE, "Too many open files")
    PamSocket(loop, tmp_path / "sock", admissions, root=os.geteuid())
    thread = threading.Thread(target=loop.run)
    thread.start()
    for _ in range(2):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
            asking.settimeout(5)
            asking.connect(str(tmp_path / "sock"))
            asking.send(caller_packet())
            assert asking.recv(8192) == b""  # no verdict: the module goes by the mode
    assert thread.is_alive()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)


def test_a_listener_that_cannot_be_kept_is_given_up(tmp_path: Path) -> None:
    loop = Loop()
    admissions = Mock()
    admissions.open.return_value = "s-1"
    PamSocket(loop, tmp_path / "sock", admissions, root=os.geteuid())
    (conversation_thread := threading.Thread(target=loop.run)).start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        asking.settimeout(5)
        asking.connect(str(tmp_path / "sock"))
        asking.send(b"PSN1" + bytes([Op.OPEN, 0, 0, 0]) + caller_packet()[8:])
        time.sleep(0.3)
        passed = os.memfd_create("listener")
        with pytest.MonkeyPatch.context() as patch:

            def none_left(_fd: int) -> int:  # a fake shortage: a real one would already keep the descriptor away
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

            patch.setattr(os, "dup", none_left)
            socket.send_fds(asking, [b"PSN1" + bytes([Op.LISTENER, 0, 0, 0])], [passed])
            assert asking.recv(8192) == b""
        os.close(passed)
    loop.call_soon_threadsafe(loop.stop)
    conversation_thread.join(5)
    assert not conversation_thread.is_alive()
    admissions.abandoned.assert_called_once_with("s-1")
    admissions.listener.assert_not_called()


def test_systemd_and_the_journal_are_told_later_or_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with no_descriptor():
            assert not systemd.notify("WATCHDOG=1")
            assert not systemd.store("s-1", 0)
            systemd.forget("s-1")
        assert systemd.notify("WATCHDOG=1")
    native = Mock()
    native.send.side_effect = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    monkeypatch.setitem(sys.modules, "systemd", Mock(journal=native))
    systemd.journal("an entry", {"PERSONA_EVENT": "exec"})
    assert "an entry" in capsys.readouterr().err


# --- where it is kept -------------------------------------------------------------------------------------


def test_the_state_s_directory(tmp_path: Path) -> None:
    state = runtime_dir.prepare(tmp_path / "run")
    assert state == tmp_path / "run" / "state"
    assert stat.S_IMODE(state.stat().st_mode) == 0o755
    assert runtime_dir.prepare(tmp_path / "run") == state
    assert not runtime_dir.is_apart(state)


def test_a_file_system_of_its_own_is_known_as_that(small_disk: SmallDisk) -> None:
    assert runtime_dir.is_apart(small_disk.path)


def test_what_an_agent_of_0_1_0_kept_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runtime = tmp_path / "run"
    state = runtime_dir.prepare(runtime)
    for name, text in (("sessions/s-1.json", "one"), ("places/s-1.json", "two"), ("bases.json", "three")):
        (runtime / name).parent.mkdir(exist_ok=True)
        (runtime / name).write_text(text)
    (runtime / "pam.sock").touch()
    (state / "bases.json").write_text("from before that agent")
    runtime_dir.take_over(runtime, state)
    assert (state / "sessions" / "s-1.json").read_text() == "one"
    assert (state / "places" / "s-1.json").read_text() == "two"
    assert (state / "bases.json").read_text() == "three"
    assert stat.S_IMODE((state / "sessions").stat().st_mode) == 0o700
    assert not list(runtime.glob("*.json")) + list((runtime / "sessions").iterdir())
    (state / "bases.json").write_text("four")
    runtime_dir.take_over(runtime, state)
    assert (state / "bases.json").read_text() == "four"
    assert caplog.text == ""


def test_what_does_not_fit_stays_where_it_was(small_disk: SmallDisk, tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir()
    (runtime / "bases.json").write_text("x" * 9000)
    small_disk.fill()
    runtime_dir.take_over(runtime, small_disk.path)
    assert (runtime / "bases.json").exists()
    small_disk.empty()
    runtime_dir.take_over(runtime, small_disk.path)
    assert (small_disk.path / "bases.json").read_text() == "x" * 9000


def test_links_are_made_in_place_of_sockets_and_stay_when_nothing_more_fits(small_disk: SmallDisk) -> None:
    runtime = small_disk.path
    runtime_dir.prepare(runtime)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as before:
        before.bind(str(runtime / "pam.sock"))
    small_disk.fill_files()
    runtime_dir.link(runtime, "pam.sock")  # in the room of the socket
    assert os.readlink(runtime / "pam.sock") == "state/pam.sock"
    inode = os.lstat(runtime / "pam.sock").st_ino
    runtime_dir.link(runtime, "pam.sock")
    assert os.lstat(runtime / "pam.sock").st_ino == inode
    with pytest.raises(OSError, match="No space left"):
        runtime_dir.link(runtime, "agent.sock")


def test_a_link_that_cannot_be_made_is_made_when_there_is_room(
    small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime_dir, "_RELINK_S", 0.05)
    small_disk.fill_files()
    loop = Loop()
    with caplog.at_level(logging.CRITICAL):
        runtime_dir.keep_linked(loop, small_disk.path, "pam.sock")
        loop.call_later(0.2, small_disk.empty)
        loop.call_later(0.5, loop.stop)
        loop.run()
    assert caplog.text.count("clients cannot connect by this link") == 1
    assert os.readlink(small_disk.path / "pam.sock") == "state/pam.sock"


# --- threads that meet what nobody thought of ---------------------------------------------------------------


def test_a_look_that_fails_in_any_manner_is_one_look_only() -> None:
    look = Mock()
    look.lacking.side_effect = [SystemError("apt: too many open files"), ()]
    told: queue.SimpleQueue[object] = queue.SimpleQueue()
    checker = DependencyChecker(look, lambda call: call())
    checker.check((), told.put)
    checker.check((), told.put)
    assert told.get(timeout=5) == "SystemError: apt: too many open files"
    assert told.get(timeout=5) == ()


def test_an_installer_that_talks_nonsense_is_one_wish_only(tmp_path: Path) -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    installation = Installation(str(tmp_path / "nobody"), lambda call: call())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(installation, "_talk", Mock(side_effect=RecursionError("too deep")))
        installation.want((), lambda _line: None, told.put)
        assert told.get(timeout=5) == "the installer gave no answer: too deep"
    installation.want((), lambda _line: None, told.put)
    assert "No such file" in told.get(timeout=5)
