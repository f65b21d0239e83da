"""The standby: it holds what the agent gave it, answers only without an agent, and gives everything back."""

import contextlib
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from persona_guest.audit.without_agent import StandbyNotes, take
from persona_guest.gate.inflight import InFlight
from persona_guest.ipc.standby import FDS_MAX, Keeping, PacketError, batches, decode, encode
from persona_guest.kernel import seccomp
from persona_guest.loop import Loop
from persona_guest.standby import service
from persona_guest.standby.service import Standby, enforcing
from persona_guest.system import systemd
from persona_guest.system.start_progress import Progress

from persona.problems import Reason
from persona.record_codec import decode_record, encode_record
from tests.guest.conftest import no_descriptor
from tests.guest.test_supervisor import gated_child, outcome
from tests.waiting import until

NAME = "s-0123456789abcdef"
SOON = (0.1, 0.1, 5.0)  # after how long it answers


class Running:
    """A standby in a thread of its own, and the agent's end of it."""

    def __init__(
        self, directory: Path, kept: dict[str, int] | None = None, waits: tuple[float, float, float] = SOON
    ) -> None:
        self.path = directory / "standby.sock"
        self.state = directory / "gate.state"
        self.loop = Loop()
        self.starting = directory / "starting"
        self.noted = directory / "noted"
        notes = StandbyNotes(self.noted)
        self.standby = Standby(self.loop, self.path, self.state, kept or {}, Progress(self.starting), waits, notes)
        self._thread = threading.Thread(target=self.loop.run)
        self._thread.start()

    def agent(self) -> Keeping:
        return Keeping(Loop(), str(self.path))

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        with contextlib.suppress(ChildProcessError):  # who tells terminals: systemd's to wait for, once it has ended
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    found = Running(tmp_path)
    yield found
    found.stop()


def ended(pid: int, within: float) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        time.sleep(0.02)
    return False


def handed_over(running: Running) -> tuple[int, Keeping]:
    """A child that waits for its exec, its listener with the standby alone; its agent is still there."""
    pid, listener = gated_child("/usr/bin/true")
    agent = running.agent()
    assert agent.take() == {}
    agent.keep(NAME, listener)
    os.close(listener)
    return pid, agent


def test_complain_mode_goes_on_without_an_agent(running: Running) -> None:
    pid, agent = handed_over(running)
    assert not ended(pid, 0.4)  # while there is an agent, that is who answers
    agent.close()
    assert outcome(pid) == 0


@pytest.mark.parametrize("state", ["mode=enforce\nuid_min=1000\n", "garbage", ""])
def test_enforce_mode_starts_nothing_and_nothing_hangs(running: Running, state: str) -> None:
    running.state.write_text(state)
    pid, agent = handed_over(running)
    agent.close()
    assert outcome(pid) == 13


@pytest.mark.parametrize("enforce", [True, False])
def test_what_it_answers_is_recorded_by_the_next_agent(running: Running, enforce: bool) -> None:
    running.state.write_text(f"mode={'enforce' if enforce else 'complain'}\nuid_min=1000\n")
    pid, agent = handed_over(running)
    agent.close()
    assert outcome(pid) == (13 if enforce else 0)
    back = running.agent()
    taken = back.take()
    until(running.noted.exists)
    before = time.time()
    (record,) = take(running.noted, {NAME: "alice"}.__getitem__)
    assert (record.session, record.user, record.program, record.event) == (NAME, "alice", "unknown", "exec")
    assert (record.decision, record.reason, record.complain) == ("denied", Reason.AGENT_STOPPING, not enforce)
    assert encode_record(record)["count"] == 1
    assert decode_record(encode_record(record)) == record
    assert before - 10 < record.at <= before
    assert list(take(running.noted, lambda _session: "")) == [], "once"
    for fd in taken.values():
        os.close(fd)
    back.close()


def test_notes_are_bounded_and_what_is_none_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notes = StandbyNotes(tmp_path / "noted")
    for turn in range(30_000):
        notes.add(NAME, denied=True)
        notes.flush(float(turn))
    assert (tmp_path / "noted").stat().st_size < 1_100_000
    assert "it is full" in caplog.text
    found = list(take(tmp_path / "noted", lambda _session: ""))
    assert len(found) > 5000
    notes.flush(5.0)
    (rest,) = take(tmp_path / "noted", lambda _session: "")
    assert encode_record(rest)["count"] == 30_000 - len(found)
    (tmp_path / "noted").write_bytes(b'{"at": 1, "session": "s", "denied": true, "count": 2}\n[]\n\xff\n{"at": ')
    assert [record.session for record in take(tmp_path / "noted", lambda _session: "")] == ["s"]


def test_the_next_agent_gets_everything_back(running: Running) -> None:
    pid, agent = handed_over(running)
    agent.close()
    back = running.agent()
    taken = back.take()
    assert list(taken) == [NAME]
    assert not ended(pid, 0.4)  # it is the agent's to answer again
    notification = seccomp.receive(taken[NAME], bytearray(seccomp.NOTIF_SIZE))
    assert notification is not None
    seccomp.respond_continue(taken[NAME], notification.id)
    assert outcome(pid) == 0
    os.close(taken[NAME])
    back.close()


def test_after_a_release_it_ends_with_the_last_session(running: Running) -> None:
    agent = running.agent()
    agent.take()
    agent.close()  # no session, no gate.state
    running._thread.join(5)
    assert not running._thread.is_alive()


def test_what_a_dead_agent_had_received_is_answered(running: Running) -> None:
    pid, listener = gated_child("/usr/bin/true")
    table, buffer = InFlight(), bytearray(seccomp.NOTIF_SIZE)
    deadline = time.monotonic() + 5
    while seccomp.receive(listener, buffer) is None:  # the kernel will not deliver it a second time
        assert time.monotonic() < deadline
    table.put(NAME.encode(), buffer)
    agent = running.agent()
    agent.take()
    agent.keep("inflight", table.fd)
    agent.keep(NAME, listener)
    os.close(listener)
    agent.close()
    assert outcome(pid) == 0
    deadline = time.monotonic() + 5
    while table.left_over() and time.monotonic() < deadline:  # it is answered a moment before it is cleared
        time.sleep(0.01)
    assert table.left_over() == []


def test_more_sessions_than_fit_into_a_packet(running: Running) -> None:
    agent = running.agent()
    agent.take()
    names = [f"s-{number:016x}" for number in range(FDS_MAX + 50)]
    with open(os.devnull) as null:
        for part, fds in batches((name, null.fileno()) for name in names):
            agent._send(encode("keep", part), fds)
    again = running.agent()
    taken = again.take()
    assert sorted(taken) == names
    for fd in taken.values():
        os.close(fd)
    for name in names:
        again.forget(name)
    deadline = time.monotonic() + 5
    while running.standby._listeners and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running.standby._listeners == {}
    again.close()


def test_a_standby_that_comes_back_is_told_everything(tmp_path: Path) -> None:
    pid, listener = gated_child("/usr/bin/true")
    first = Running(tmp_path)
    loop = Loop()
    agent = Keeping(loop, str(first.path))
    agent.take()
    agent.keep(NAME, listener)
    first.stop()
    first.standby._hang_up()  # what its end as a process would do
    second = Running(tmp_path)
    loop.call_later(2.5, loop.stop)
    loop.run()
    agent.close()
    os.close(listener)
    assert outcome(pid) == 0
    second.stop()


def test_packets() -> None:
    assert decode(encode("keep", [NAME, "inflight"])) == ("keep", [NAME, "inflight"])
    for bad in (b"keep\n../../etc", b"keep\n", b"keep\n" + b"x" * 9000, b"\xff", b"keep\ns-0123456789ABCDEF"):
        with pytest.raises(PacketError):
            decode(bad)


def test_garbage_ends_a_connection_and_nothing_else(running: Running) -> None:
    running.state.write_text("mode=complain\n")
    for bad in (b"\xff\xfe", b"keep\n" + NAME.encode(), b"nothing", b"x" * 9000):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as talker:
            talker.settimeout(5)
            talker.connect(str(running.path))
            talker.send(bad)
            assert talker.recv(100) == b""
    pid, agent = handed_over(running)
    agent.close()
    assert outcome(pid) == 0


@pytest.mark.parametrize(
    ("text", "closed"),
    [(None, False), ("mode=complain\nuid_min=1000\n", False), ("mode=enforce\n", True), ("mode=complainx\n", True)],
)
def test_which_mode_it_is(tmp_path: Path, text: str | None, closed: bool) -> None:
    state = tmp_path / "gate.state"
    if text is not None:
        state.write_text(text)
    assert enforcing(state) is closed


def test_a_line_that_cannot_be_told_is_the_end_of_its_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_pid: int, _line: str) -> bool:
        raise KeyError("unforeseen")

    monkeypatch.setattr(service, "tell", broken)
    before = os.getpid()
    assert service._tell_aside(before)
    assert os.getpid() == before
    assert os.waitpid(-1, 0)[1] == 0


# --- when there is no descriptor left -------------------------------------------------------------------


def test_without_a_descriptor_the_standby_answers_all_the_same(running: Running) -> None:
    running.state.write_text("mode=enforce\n")
    pid, agent = handed_over(running)
    deadline = time.monotonic() + 5
    while not running.standby._listeners and time.monotonic() < deadline:
        time.sleep(0.02)
    with no_descriptor():
        agent.close()
        time.sleep(0.7)
    assert outcome(pid) == 13
    assert running._thread.is_alive()


def test_listeners_that_cannot_be_taken_end_no_connection(running: Running) -> None:
    agent = running.agent()
    agent.take()
    first, second = (os.memfd_create(name) for name in ("a", "b"))
    with no_descriptor():
        agent.keep("s-00000000000000aa", first)
        time.sleep(0.3)
    agent.keep("s-00000000000000bb", second)
    deadline = time.monotonic() + 5
    while not running.standby._listeners and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(running.standby._listeners) == ["s-00000000000000bb"]
    assert running.standby._agent is not None
    agent.close()
    os.close(first)
    os.close(second)


def test_a_listener_that_the_agent_cannot_take_is_nobodys(running: Running) -> None:
    """If the standby alone had it, which does not answer while there is an agent, its session would hang."""
    pid, agent = handed_over(running)
    agent.close()
    until(lambda: running.standby._agent is None, 10)
    back = running.agent()
    connection = back._connect(10.0)
    assert connection is not None
    until(lambda: running.standby._agent is not None, 10)  # it shares our table: without descriptors it takes none
    with pytest.MonkeyPatch.context() as patch, no_descriptor():
        patch.setattr(back, "_connect", lambda _timeout: connection)
        assert back.take() == {}
    assert outcome(pid) == errno.ENOSYS
    back.close()


def test_what_the_standby_cannot_hand_over_and_systemd_has_is_answered(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid, listener = gated_child("/usr/bin/true")
    agent = running.agent()
    assert agent.take() == {}
    agent.keep(NAME, listener)
    agent.close()
    until(lambda: running.standby._agent is None, 10)
    back = running.agent()
    connection = back._connect(10.0)
    until(lambda: running.standby._agent is not None, 10)
    monkeypatch.setattr(systemd, "inherited", lambda: {NAME: listener})
    monkeypatch.setattr(back, "_connect", lambda _timeout: connection)
    with no_descriptor():
        taken = back.take()
    assert taken == {NAME: listener}
    back.close()
    os.close(listener)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
