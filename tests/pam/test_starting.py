"""How long pam_persona.so waits for an agent that is starting, or that goes in the middle of an answer."""

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from persona_guest.core.pam_protocol import Op, PamVerdict, reply

from tests.pam.stack import AUTHINFO_UNAVAIL, SUCCESS, USER, FakeAgent, Stack, says

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="seccomp without no_new_privs needs root"),
]


@pytest.mark.parametrize("found", ["no socket", "a socket of nobody", "an agent that is about to end"])
@pytest.mark.parametrize("step", ["account", "session"])
def test_an_agent_that_is_restarted_refuses_nobody(stack: Stack, step: str, found: str) -> None:
    stack.options = "timeout=6000"
    stack.state.write_text("mode=enforce\nuid_min=1\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as before:
        if found != "no socket":
            before.bind(str(stack.socket))
        if found == "an agent that is about to end":
            before.listen(8)

        def restart() -> None:
            before.close()  # with what waits there unread
            time.sleep(0.5)
            stack.serve(says(reply(PamVerdict.PASS)))

        later = threading.Timer(0.7, restart)
        later.start()
        try:
            assert stack.run(step) == {"start": 0, step: SUCCESS, "messages": []}
        finally:
            later.join()


def test_an_agent_that_ends_before_its_answer_is_asked_again(stack: Stack) -> None:
    def script(agent: FakeAgent, connection: socket.socket) -> None:
        agent.take(connection)
        if len(agent.calls) > 1:
            connection.send(reply(PamVerdict.PASS))

    stack.state.write_text("mode=enforce\nuid_min=1\n")
    agent = stack.serve(script)
    assert stack.run("account")["account"] == SUCCESS
    assert [op for op, _ in agent.calls] == [Op.ACCOUNT, Op.ACCOUNT]


@pytest.mark.long
def test_an_agent_that_does_not_come_back_is_not_waited_for_till_the_deadline(stack: Stack) -> None:
    stack.options = "timeout=20000"
    stack.state.write_text("mode=enforce\nuid_min=1\n")
    started = time.monotonic()
    assert stack.run("account")["account"] == AUTHINFO_UNAVAIL
    assert 4.5 < time.monotonic() - started < 10


class Starting:
    """A start of the agent that makes progress for some seconds; ``process`` tells its number at each moment."""

    def __init__(self, path: Path, seconds: float, process: Callable[[float], int | str] = lambda _at: 7) -> None:
        self._path = path
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._go_on, args=(time.monotonic() + seconds, process))
        self._thread.start()

    def _go_on(self, until: float, process: Callable[[float], int | str]) -> None:
        count = 0
        while time.monotonic() < until and not self._end.wait(0.2):
            count += 1
            self._path.write_text(f"{process(time.monotonic())} {count}".ljust(31) + "\n")

    def close(self) -> None:
        self._end.set()
        self._thread.join()


@pytest.mark.long
def test_a_start_that_makes_progress_is_waited_for_and_has_its_time_then(stack: Stack) -> None:
    stack.options = "timeout=1000"
    stack.state.write_text("mode=enforce\nuid_min=1\n")
    began = time.monotonic()  # the kernel layer is loaded before the agent starts
    starting = Starting(stack.starting, 12, lambda at: "kernel" if at < began + 5 else 7)
    later = threading.Timer(12, lambda: stack.serve(says(reply(PamVerdict.PASS))))
    later.start()
    try:
        assert stack.run("account") == {"start": 0, "account": SUCCESS, "messages": []}
    finally:
        later.join()
        starting.close()


@pytest.mark.long
@pytest.mark.parametrize(
    ("seconds", "process"),
    [(1, lambda _at: 7), (20, lambda at: int(at / 0.6))],
    ids=["one that hangs", "one that fails again and again"],
)
def test_a_start_that_comes_to_nothing_is_not_waited_for(
    stack: Stack, seconds: float, process: Callable[[float], int]
) -> None:
    stack.options = "timeout=60000"
    stack.state.write_text("mode=enforce\nuid_min=1\n")
    starting = Starting(stack.starting, seconds, process)
    started = time.monotonic()
    try:
        assert stack.run("account")["account"] == AUTHINFO_UNAVAIL
        assert time.monotonic() - started < 12
    finally:
        starting.close()


def test_nobody_who_is_let_in_anyway_waits_for_a_start(stack: Stack) -> None:
    stack.state.write_text(f"mode=enforce\nuid_min=1\nbreak_glass={USER}\n")
    starting = Starting(stack.starting, 10)
    started = time.monotonic()
    try:
        for user in ("root", USER):
            assert stack.run("session", user=user)["session"] == SUCCESS
        assert time.monotonic() - started < 3
    finally:
        starting.close()
