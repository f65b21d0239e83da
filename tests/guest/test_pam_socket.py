"""The agent's socket for pam_persona.so: whatever becomes of the module, no session of it is left behind."""

import os
import socket
import struct
from pathlib import Path

import pytest
from persona_guest.core.pam_wire import MAGIC, Caller, Op, Verdict, reply
from persona_guest.ipc.pam_socket import PamSocket, Reply
from persona_guest.loop import Loop


class FakeDoor:
    """Gates everybody ``at_once``, or a moment later, as after a question to the broker."""

    def __init__(self, loop: Loop, *, at_once: bool) -> None:
        self.events: list[str] = []
        self._loop = loop
        self._at_once = at_once

    def account(self, caller: Caller, pid: int, reply: Reply) -> None:
        raise NotImplementedError

    def open(self, caller: Caller, pid: int, reply_to: Reply) -> str | None:
        self.events.append("open")
        if self._at_once:
            reply_to(reply(Verdict.GATE))
        else:
            self._loop.call_later(0.05, lambda: reply_to(reply(Verdict.GATE)))
        return "s-1"

    def listener(self, session: str, fd: int, reply: Reply) -> None:
        raise NotImplementedError

    def present(self, pid: int, session: str, reply: Reply) -> None:
        raise NotImplementedError

    def abandoned(self, session: str) -> None:
        self.events.append(f"abandoned {session}")


def asking(path: Path) -> socket.socket:
    """A module that has asked for a session."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(str(path))
    connection.send(struct.pack("=IHHI", MAGIC, Op.OPEN, 1, 1000) + b"sshd\0alice\0far\0/bin/bash\0users\0")
    return connection


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("goes_after_s", [0.0, 0.03, 0.1])
def test_a_module_that_goes_away_leaves_no_session(tmp_path: Path, at_once: bool, goes_after_s: float) -> None:
    loop = Loop()
    door = FakeDoor(loop, at_once=at_once)
    served = PamSocket(loop, tmp_path / "sock", door, root=os.geteuid())
    module = asking(tmp_path / "sock")
    if goes_after_s:
        loop.call_later(goes_after_s, module.close)
    else:
        module.close()
    loop.call_later(0.2, loop.stop)
    loop.run()
    assert door.events == ["open", "abandoned s-1"]
    served.close()
    assert door.events == ["open", "abandoned s-1"]
