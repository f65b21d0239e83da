"""A private PAM stack with pam_persona.so, and a fake agent that says whatever a test wants it to say."""

import contextlib
import json
import os
import pwd
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from persona_guest.core.pam_protocol import Caller, Groups, Op, PamVerdict, parse, reply
from persona_guest.kernel import seccomp

ROOT = Path(__file__).parents[2]
MODULE = ROOT / "guest" / "pam" / "pam_persona.so"
SUCCESS, PERM_DENIED, AUTHINFO_UNAVAIL, SESSION_ERR = 0, 6, 9, 14
USER = "games"  # a system account of every Debian; uid_min decides whether it would be gated
ENFORCE = "mode=enforce\nuid_min=1\n"
UID = pwd.getpwnam(USER).pw_uid

Script = Callable[["FakeAgent", socket.socket], None]


class FakeAgent:
    """One conversation at a time on a real socket; ``calls`` is what the module asked."""

    def __init__(self, path: Path, script: Script) -> None:
        self.calls: list[tuple[Op, Caller | Groups | None]] = []
        self.notified = 0
        path.unlink(missing_ok=True)
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.bind(str(path))
        self._server.listen(8)
        self._script = script
        self._taken: list[int] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):  # the module hung up, as some tests want it to
                self._script(self, connection)

    def take(self, connection: socket.socket) -> list[int]:
        packet, fds, _, _ = socket.recv_fds(connection, 8192, 4)
        self.calls.append(parse(packet))
        self._taken += fds
        return fds

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(5)
        self.let_go()

    def let_go(self) -> None:
        while self._taken:
            os.close(self._taken.pop())

    def serve_execs(self, listener: int) -> None:
        def loop() -> None:
            buffer = bytearray(seccomp.NOTIF_SIZE)
            while True:
                ((_, events),) = poll_one(listener)
                if not events & select.POLLIN:
                    return
                notification = seccomp.receive(listener, buffer)
                if notification:
                    self.notified += 1
                    seccomp.respond_continue(listener, notification.id)

        threading.Thread(target=loop, daemon=True).start()


def poll_one(fd: int) -> list[tuple[int, int]]:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return poller.poll()


class Stack:
    """A private PAM configuration with the module in it as the package's profile puts it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "pam.sock"
        self.state = directory / "gate.state"
        self.state.write_text(ENFORCE)
        self.starting = directory / "starting"
        self.agent: FakeAgent | None = None
        self.options = "timeout=1500"

    def serve(self, script: Script) -> FakeAgent:
        self.agent = FakeAgent(self.socket, script)
        return self.agent

    def run(self, *steps: str, user: str = USER) -> dict[str, Any]:
        control = "[success=ok new_authtok_reqd=ok ignore=ignore module_unknown=ignore default=bad]"
        line = f"{control} {MODULE} socket={self.socket} state={self.state} starting={self.starting} {self.options}\n"
        (self.directory / "test").write_text(f"account {line}session {line}")
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "drive.py"), str(self.directory), "test", user, *steps],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def says(*packets: bytes) -> Script:
    def script(agent: FakeAgent, connection: socket.socket) -> None:
        for packet in packets:
            agent.take(connection)
            connection.send(packet)
        time.sleep(0.05)

    return script


def gate(agent: FakeAgent, connection: socket.socket) -> None:
    agent.take(connection)
    connection.send(reply(PamVerdict.GATE, instructions=seccomp.gate_filter()))
    fds = agent.take(connection)
    if fds:
        agent.serve_execs(fds[0])
    connection.send(reply(PamVerdict.DONE))
