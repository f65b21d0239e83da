"""``persona-standby``: keeps every session's listener and answers in the agent's place while there is none.

Without an agent an exec would wait for ever, and systemd drops what it stores for a unit that is
stopped.  So this process has copies.  While the agent answers it does nothing.  A while after the
agent was lost it answers: in complain mode everything goes on, in enforce mode nothing does, with the
reason ``agent_stopping``.  How long that while is depends on what the next agent tells of its start.
It decides nothing and reads no caller's memory.

Exit codes: 0 ended as asked, or the gate was released and its last session is over; 1 could not start; 2 usage.
"""

import argparse
import errno
import logging
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

from persona_guest.audit import without_agent
from persona_guest.audit.without_agent import StandbyNotes
from persona_guest.core import state_line
from persona_guest.gate.inflight import InFlight
from persona_guest.gate.terminal import tell
from persona_guest.ipc.seqpacket import Acceptor, peer_credentials
from persona_guest.ipc.standby import FDS_MAX, PACKET_MAX, PacketError, batches, decode, encode
from persona_guest.kernel import seccomp
from persona_guest.kernel.task import Task
from persona_guest.loop import READABLE, Loop, Timer
from persona_guest.system import runtime_dir, systemd
from persona_guest.system.start_progress import NAME, Progress

log = logging.getLogger("persona.standby")

RUNTIME, STATE = "/run/persona", "/var/lib/persona"
_INFLIGHT = "inflight"
COMPLAIN_S = 1.0  # complain mode stops nothing, and keeps nobody waiting either
ENFORCE_S = 15.0  # until the agent is heard of again, and between two signs that its start makes progress
START_S = 90.0  # of a start that does, on a machine that is slow or loaded; systemd ends one after as long
_CHECK_S = 0.25
_LINES_PER_SECOND = 20
_TOLD_S = 0.5  # a line takes some milliseconds; its user sees it before the error
_QUIET_S = 10.0  # no lines after one that took longer
LINE = (
    "persona: not started, agent_stopping: the agent of this machine is not running; its operator must "
    "start persona-agent"
)


def enforcing(state: Path) -> bool:
    """Whether gate.state says enforce mode: missing = complain, and what cannot be understood = enforce."""
    try:
        return state_line.parse(state.read_text("ascii"), uid_min=0).enforce
    except FileNotFoundError:
        return False  # a fresh installation, or the gate was released
    except (OSError, UnicodeDecodeError):
        return True


class Standby:
    """``kept`` are the descriptors that systemd kept for a standby before this one.

    ``waits`` are its patience with an agent that is not there in complain and in enforce mode, and with one start of
    the agent in all, in seconds; ``progress`` is what that start tells (system/start_progress.py).
    """

    def __init__(
        self,
        loop: Loop,
        path: Path,
        state: Path,
        kept: dict[str, int],
        progress: Progress,
        waits: tuple[float, float, float] = (COMPLAIN_S, ENFORCE_S, START_S),
        notes: StandbyNotes | None = None,
    ) -> None:
        self._loop = loop
        self._state = state
        self._complain_s, self._enforce_s, self._start_s = waits
        self._inflight_fd = kept.pop(_INFLIGHT, None)
        self._listeners = kept
        self._agent: socket.socket | None = None
        self._had_agent = False
        self._quiet_until = 0.0
        self._answering: InFlight | None = None  # there is no agent: the notifications that are ours now
        self._progress = progress
        self._gone_at = self._moved_at = time.monotonic()  # an agent that answered, and a start's last progress
        self._timer: Timer | None = None  # while there is no agent that answers
        self._buffer = bytearray(seccomp.NOTIF_SIZE)
        self._lines = (0, 0)
        self._notes = notes
        self.answered = 0
        self._acceptor = Acceptor(loop, path, 0o600, self._accepted)
        self._progress.begin()
        self._wait()

    def close(self) -> None:
        """Closes its sockets and what it keeps."""
        self._hang_up()
        self._rest()
        for fd in self._listeners.values():
            os.close(fd)
        self._listeners.clear()
        self._acceptor.close()

    # --- the agent --------------------------------------------------------------------------------

    def _accepted(self, connection: socket.socket) -> None:
        if peer_credentials(connection)[1] != os.geteuid():
            connection.close()
            return
        connection.settimeout(1.0)  # its own agent, which reads while it is being told
        self._finish()
        self._agent = connection
        self._had_agent = True
        self._loop.add_reader(connection.fileno(), READABLE, self._hear)
        if not self._progress.is_starting:
            self._settle()
        elif self._is_patient():
            self._rest()

    def _finish(self) -> None:
        """Hears what an agent that is followed by another said last."""
        poll = select.poll()  # not select(2), which knows no descriptor over 1023
        if self._agent is not None:
            poll.register(self._agent, select.POLLIN)
        while self._agent is not None and poll.poll(0):
            self._hear(READABLE)
        self._hang_up()

    def _hear(self, _events: int) -> None:
        agent = self._agent
        if agent is None:
            return
        fds: list[int] = []
        try:
            packet, fds, flags, _ = socket.recv_fds(agent, PACKET_MAX + 1, FDS_MAX, socket.MSG_CMSG_CLOEXEC)
            if packet:
                self._obey(agent, *decode(packet), fds, short=bool(flags & socket.MSG_CTRUNC))
                return
        except (OSError, PacketError) as error:
            log.error("the agent's connection: %s", error)
        finally:
            for fd in fds:
                os.close(fd)
        self._hang_up()
        self._wait()

    def _obey(self, agent: socket.socket, word: str, names: list[str], fds: list[int], *, short: bool) -> None:
        """``fds`` loses what is kept; ``short``: the last were not taken for want of descriptors.

        Raises ``OSError``, ``PacketError``.
        """
        if word == "take":
            everything = dict(self._listeners)
            if self._inflight_fd is not None:
                everything[_INFLIGHT] = self._inflight_fd
            for part, descriptors in batches(everything.items()):
                socket.send_fds(agent, [encode("kept", part)], descriptors)
            agent.send(encode("end"))
        elif word == "keep" and (len(names) == len(fds) or (short and len(names) > len(fds))):
            if short:  # the agent alone has the others: no reason to take its work away from it
                log.error(
                    "%d of %d listeners could not be taken: no descriptor left", len(names) - len(fds), len(names)
                )
            for name in names[: len(fds)]:
                self._keep(name, fds.pop(0))
        elif word == "drop":
            for name in names:
                self._drop(name)
        elif word == "here":
            self._settle()
        else:
            raise PacketError(f"unknown: {word[:20]!r}")

    def _hang_up(self) -> None:
        if self._agent is not None:
            self._loop.remove_reader(self._agent.fileno())
            self._agent.close()
            self._agent = None

    def _keep(self, name: str, fd: int) -> None:
        if name == _INFLIGHT:
            if self._inflight_fd is not None:
                systemd.forget(name)
                os.close(self._inflight_fd)
            self._inflight_fd = fd
        elif name in self._listeners:
            os.close(fd)
            return
        else:
            self._listeners[name] = fd
        systemd.store(name, fd)

    def _drop(self, name: str) -> None:
        fd = self._listeners.pop(name, None)
        if fd is not None:
            if self._answering is not None:
                self._loop.remove_reader(fd)
            os.close(fd)
            systemd.forget(name)

    # --- in its place -----------------------------------------------------------------------------

    def _wait(self) -> None:
        """There is no agent: soon this process answers, unless one comes back before."""
        if self._had_agent and not self._listeners and not self._state.exists():
            log.info("the gate was released and its last session is over")
            self._loop.stop()
        if self._timer is None:  # of one that was answering; else its start failed, and that counts from before
            self._gone_at = self._moved_at = time.monotonic()
            self._progress.begin()
            self._check_agent()

    def _check_agent(self) -> None:
        """Again and again until there is an agent that answers: whether to do that in its place."""
        self._write_notes()
        if self._agent is not None and not self._progress.is_starting:
            self._settle()
            return
        if not self._is_patient() and self._answering is None:
            self._begin()
        self._timer = self._loop.call_later(self._tick_s(), self._check_agent)

    def _tick_s(self) -> float:
        return min(_CHECK_S, self._complain_s / 2)

    def _is_patient(self) -> bool:
        """Whether to go on waiting for an agent to connect, or to finish its start."""
        now = time.monotonic()
        if self._progress.has_moved():
            self._moved_at = now
        if not enforcing(self._state):
            return now - self._gone_at < self._complain_s
        return now - max(self._gone_at, self._moved_at) < self._enforce_s and now - self._gone_at < self._start_s

    def _settle(self) -> None:
        """Stops waiting: an agent answers from now on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._rest()

    def _write_notes(self) -> None:
        if self._notes is not None:
            self._notes.flush(time.time())

    def _rest(self) -> None:
        """Stops answering in the agent's place."""
        self._write_notes()
        if self._answering is not None:
            self._answering = None
            for fd in self._listeners.values():
                self._loop.remove_reader(fd)
            if self.answered:
                log.warning("the agent is back; %d starts were answered without one", self.answered)

    def _begin(self) -> None:
        self.answered = 0
        enforce = enforcing(self._state)
        what = "nothing starts" if enforce else "complain mode, everything goes on undecided"
        if self._listeners:
            log.warning("no agent: answering %d sessions in its place, %s", len(self._listeners), what)
        self._answering = self._table()
        for slot, name, raw, _ in self._answering.left_over():
            listener = self._listeners.get(name)
            if listener is not None:
                self._answer(name, listener, seccomp.parse_notification(raw))
            self._answering.clear(slot)
        for name, fd in self._listeners.items():
            self._watch(name, fd)

    def _table(self) -> InFlight:
        if self._inflight_fd is not None:
            try:
                return InFlight(self._inflight_fd)  # anew: the agent has written into it since
            except (OSError, ValueError) as error:
                log.error("what was in flight cannot be taken up: %s", error)
        return InFlight.of_this_process()

    def _watch(self, name: str, fd: int) -> None:
        self._loop.add_reader(fd, READABLE, lambda events: self._ready(name, fd, events))

    def _ready(self, name: str, fd: int, events: int) -> None:
        if self._answering is None:
            return
        if not events & READABLE:
            self._drop(name)
            if not self._listeners and not self._state.exists():
                self._write_notes()
                self._loop.stop()
            return
        notification = seccomp.receive(fd, self._buffer)
        if notification is not None:
            slot = self._answering.put(name.encode(), self._buffer)  # for whoever comes, if this process is killed now
            self._answer(name, fd, notification)
            self._answering.clear(slot)

    def _answer(self, name: str, listener: int, notification: seccomp.Notification) -> None:
        self.answered += 1
        enforce = enforcing(self._state)
        if self._notes is not None:
            self._notes.add(name, denied=enforce)
        if not enforce:
            seccomp.respond_continue(listener, notification.id)
            return
        now = time.monotonic()
        second = int(now)
        self._lines = (second, self._lines[1] + 1) if self._lines[0] == second else (second, 1)
        may_speak = self._lines[1] <= _LINES_PER_SECOND and now >= self._quiet_until
        if may_speak and not _tell_aside(notification.tid):
            self._quiet_until = now + _QUIET_S
        seccomp.respond_error(listener, notification.id, errno.EACCES)


def _tell_aside(tid: int) -> bool:
    """The line, by a process of its own: a standard error on a file system of the user's may never let go of it.

    False where that process is not done in time: whoever brought that about may do it again.
    """
    try:
        pid = os.fork()
    except OSError:  # then without a line
        return False
    if pid == 0:
        try:
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # a copy of a listener would keep its session
            tell(Task(tid).credentials().tgid, LINE)
        finally:
            os._exit(0)  # whatever happened (killed meanwhile: nobody is there to be told): there is one standby
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:  # done and gone: SIGCHLD is ignored
        return True
    except OSError:  # no descriptor left: the exec is answered all the same
        return False
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(_TOLD_S * 1000))
    finally:
        os.close(pidfd)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="persona-standby", description="answers the exec gate in the agent's place while there is none"
    )
    parser.add_argument("--runtime-dir", default=RUNTIME, type=Path)
    parser.add_argument("--state-dir", default=STATE, type=Path)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    runtime = arguments.runtime_dir
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for who tells a line
    loop = Loop()
    try:
        directory = runtime_dir.prepare(runtime)
        state = arguments.state_dir / "gate.state"
        notes = StandbyNotes(directory / without_agent.NAME)
        progress = Progress(directory / NAME)
        Standby(loop, directory / "standby.sock", state, systemd.inherited(), progress, notes=notes)
    except OSError as error:
        print(f"persona-standby: {error}", file=sys.stderr)
        return 1
    runtime_dir.keep_linked(loop, runtime, "standby.sock")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: loop.call_soon_threadsafe(loop.stop))
    systemd.notify("READY=1")
    loop.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
