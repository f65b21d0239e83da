"""The agent's socket for pam_persona.so: whatever becomes of the module, no session of it is left behind."""

import os
import socket
import struct
import threading
from pathlib import Path

import pytest
from persona_guest.core.pam_protocol import MAGIC, Caller, Op, PamVerdict, reply
from persona_guest.ipc import pam
from persona_guest.ipc.pam import PamSocket, Reply
from persona_guest.loop import Loop


class FakeDoor:
    """Gates everybody ``at_once``, or a moment later, as after a question to the broker."""

    def __init__(self, loop: Loop, *, at_once: bool) -> None:
        self.events: list[str] = []
        self.groups: tuple[str, ...] = ()
        self._loop = loop
        self._at_once = at_once

    def account(self, caller: Caller, pid: int, reply: Reply) -> None:
        raise NotImplementedError

    def open(self, caller: Caller, pid: int, reply_to: Reply) -> str | None:
        self.events.append("open")
        self.groups = caller.groups
        if self._at_once:
            reply_to(reply(PamVerdict.GATE))
        else:
            self._loop.call_later(0.05, lambda: reply_to(reply(PamVerdict.GATE)))
        return "s-1"

    def listener(self, session: str, fd: int, reply: Reply) -> None:
        raise NotImplementedError

    def present(self, pid: int, session: str, reply: Reply) -> None:
        raise NotImplementedError

    def abandoned(self, session: str) -> None:
        self.events.append(f"abandoned {session}")


def asking(path: Path, *before: bytes) -> socket.socket:
    """A module that has asked for a session, and sent these packets before."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(str(path))
    for packet in before:
        connection.send(packet)
    connection.send(struct.pack("=IHHI", MAGIC, Op.OPEN, 1, 1000) + b"sshd\0alice\0far\0/bin/bash\0users\0")
    return connection


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("goes_after_s", [0.0, 0.03, 0.1])
def test_a_module_that_goes_away_leaves_no_session(tmp_path: Path, at_once: bool, goes_after_s: float) -> None:
    loop = Loop()
    admissions = FakeDoor(loop, at_once=at_once)
    served = PamSocket(loop, tmp_path / "sock", admissions, root=os.geteuid())
    module = asking(tmp_path / "sock")
    if goes_after_s:
        loop.call_later(goes_after_s, module.close)
    else:
        module.close()
    loop.run_until(lambda: len(admissions.events) == 2, 10)
    assert admissions.events == ["open", "abandoned s-1"]
    served.close()
    assert admissions.events == ["open", "abandoned s-1"]


def of_groups(*names: str) -> bytes:
    return struct.pack("=IHH", MAGIC, Op.GROUPS, len(names)) + b"".join(name.encode() + b"\0" for name in names)


def test_where_too_many_are_open_the_next_one_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hung up on, the module would refuse the login."""
    monkeypatch.setattr(pam, "_CONNECTIONS_MAX", 2)
    loop = Loop()
    served = PamSocket(loop, tmp_path / "sock", FakeDoor(loop, at_once=True), root=os.geteuid())
    answers: list[bytes] = []

    def ask() -> None:
        modules = [asking(tmp_path / "sock") for _ in range(3)]
        answers.extend(module.recv(8192) for module in modules[:2])
        modules[0].close()
        answers.append(modules[2].recv(8192))
        for module in modules[1:]:
            module.close()

    module = threading.Thread(target=ask)
    module.start()
    loop.run_until(lambda: len(answers) == 3, 5)
    module.join(5)
    assert [answer[4:5] for answer in answers] == [bytes([PamVerdict.GATE])] * 3
    served.close()


@pytest.mark.parametrize(
    ("packets", "names", "opened"),
    [
        ([], 1, True),
        ([of_groups("a", "b"), of_groups("c")], 4, True),
        ([of_groups()], 1, True),
        ([of_groups(*["g"] * 128)] * 511, 65_409, True),
        ([of_groups(*["g"] * 128)] * 512, 0, False),  # more than the kernel lets anybody be in
    ],
)
def test_groups_that_do_not_fit_into_one_packet_come_before_it(
    tmp_path: Path, packets: list[bytes], names: int, opened: bool
) -> None:
    loop = Loop()
    admissions = FakeDoor(loop, at_once=True)
    served = PamSocket(loop, tmp_path / "sock", admissions, root=os.geteuid())
    answers: list[bytes] = []

    def ask() -> None:
        with asking(tmp_path / "sock", *packets) as module:
            answers.append(module.recv(8192))

    module = threading.Thread(target=ask)
    module.start()
    loop.call_later(1.5, loop.stop)
    loop.run()
    module.join(5)
    assert len(admissions.groups) == names
    assert (admissions.groups[-1:] == ("users",)) == opened
    # a module whose question is not understood is hung up on, and goes by the mode
    assert answers[0][4:5] == (bytes([PamVerdict.GATE]) if opened else b"")
    served.close()
