"""pam_persona.so against a fake agent that says whatever a test wants it to say."""

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from persona_guest.core.pam_protocol import Caller, Op, PamVerdict, WireError, reply
from persona_guest.kernel import landlock, seccomp

from tests.pam.stack import (
    AUTHINFO_UNAVAIL,
    MODULE,
    PERM_DENIED,
    ROOT,
    SESSION_ERR,
    SUCCESS,
    UID,
    USER,
    FakeAgent,
    Script,
    Stack,
    gate,
    says,
)

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="seccomp without no_new_privs needs root"),
]


def test_exports_are_the_modules_entry_points_and_nothing_else() -> None:
    symbols = subprocess.run(["nm", "-D", "--defined-only", str(MODULE)], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in symbols.stdout.splitlines()}
    assert names == {
        f"pam_sm_{name}" for name in ("acct_mgmt", "open_session", "close_session", "authenticate", "setcred")
    }


def test_pass(stack: Stack) -> None:
    agent = stack.serve(says(reply(PamVerdict.PASS)))
    assert stack.run("account", "session") == {"start": 0, "account": 0, "session": 0, "messages": []}
    op, caller = agent.calls[0]
    assert op is Op.ACCOUNT
    assert isinstance(caller, Caller)
    assert (caller.uid, caller.user, caller.service) == (UID, USER, "test")
    assert USER in caller.groups


def test_deny_shows_the_message_without_control_characters(stack: Stack) -> None:
    stack.serve(says(reply(PamVerdict.DENY, "persona: no\x1b[2J way")))
    found = stack.run("account")
    assert found["account"] == PERM_DENIED
    assert found["messages"] == ["persona: no?[2J way"]
    assert stack.run("session")["session"] == SESSION_ERR


def test_gate_is_put_up_and_no_copy_of_the_listener_stays(stack: Stack) -> None:
    agent = stack.serve(gate)
    found = stack.run("session", "fds", "exec")
    assert found["session"] == SUCCESS
    assert found["fds"] == []
    assert found["exec"] == "ran"
    assert agent.notified >= 1
    assert [op for op, _ in agent.calls] == [Op.OPEN, Op.LISTENER]


def bound(below: str) -> Script:
    """As ``gate``, with Landlock's rules."""

    def script(agent: FakeAgent, connection: socket.socket) -> None:
        ruleset = landlock.starting_below(["/usr", below])
        agent.take(connection)
        socket.send_fds(connection, [reply(PamVerdict.GATE, instructions=seccomp.gate_filter())], [ruleset])
        os.close(ruleset)
        fds = agent.take(connection)
        if fds:
            agent.serve_execs(fds[0])
        connection.send(reply(PamVerdict.DONE))

    return script


def test_landlock_s_rules_bind_the_session(stack: Stack) -> None:
    stack.serve(bound("/nowhere"))
    found = stack.run("session", "exec", "copy", "again", "copy", "fds")
    assert (found["session"], found["again"], found["exec"]) == (SUCCESS, SUCCESS, "ran")
    assert found["copy"] == "Permission denied"
    assert found["fds"] == []


def test_what_landlock_s_rules_name_runs(stack: Stack) -> None:
    stack.serve(bound(str(stack.directory)))
    assert stack.run("session", "copy")["copy"] == "ran"


def test_what_came_instead_of_landlock_s_rules_refuses(stack: Stack) -> None:
    def script(agent: FakeAgent, connection: socket.socket) -> None:
        agent.take(connection)
        socket.send_fds(connection, [reply(PamVerdict.GATE, instructions=seccomp.gate_filter())], [0])

    stack.serve(script)
    found = stack.run("session", "fds")
    assert found["session"] == SESSION_ERR
    assert found["fds"] == []
    assert found["messages"] == ["persona: the gate could not be put up: landlock"]


def test_a_descriptor_that_nobody_expects_is_closed(stack: Stack) -> None:
    def script(agent: FakeAgent, connection: socket.socket) -> None:
        agent.take(connection)
        ruleset = landlock.starting_below(["/usr"])
        socket.send_fds(connection, [reply(PamVerdict.PASS)], [ruleset])
        os.close(ruleset)

    stack.serve(script)
    assert stack.run("account", "session", "fds")["fds"] == []


def test_a_session_inside_a_session_asks_whether_the_gate_is_ours(stack: Stack) -> None:
    agent = stack.serve(gate)
    found = stack.run("session", "again")
    assert found["again"] == SUCCESS
    assert [op for op, _ in agent.calls] == [Op.OPEN, Op.LISTENER, Op.OPEN, Op.PRESENT]


HEAD = struct.pack("=IHH", 0x314E5350, 0, 0)


@pytest.mark.parametrize(
    "packet",
    [b"", b"x", HEAD, HEAD + b"no end", HEAD + b"a\0b\0", struct.pack("=IHH", 7, 0, 0) + b"\0",
     struct.pack("=IHH", 0x314E5350, 9, 0) + b"\0", struct.pack("=IHH", 0x314E5350, 1, 65) + bytes(65 * 8) + b"\0",
     struct.pack("=IHH", 0x314E5350, 1, 60) + b"\0", HEAD + b"x" * 2000 + b"\0", b"x" * 9000,
     reply(PamVerdict.DONE), reply(PamVerdict.GATE)],
)  # fmt: skip
def test_garbage_is_a_refusal(stack: Stack, packet: bytes) -> None:
    stack.state.write_text("mode=enforce\nuid_min=1\n")
    stack.serve(says(packet))
    found = stack.run("session", "exec")
    assert found["session"] != SUCCESS
    assert found["exec"] == "ran"  # and no filter was left without a listener


@pytest.mark.parametrize("cut", [0, 1])
def test_an_agent_that_hangs_up_is_a_refusal(stack: Stack, cut: int) -> None:
    def script(agent: FakeAgent, connection: socket.socket) -> None:
        agent.take(connection)
        if cut:
            connection.send(reply(PamVerdict.GATE, instructions=seccomp.gate_filter()))
            agent.take(connection)
            agent.let_go()

    stack.state.write_text("mode=enforce\nuid_min=1\n")
    agent = stack.serve(script)
    assert stack.run("session")["session"] != SUCCESS
    asked = [op for op, _ in agent.calls]
    assert asked == ([Op.OPEN, Op.LISTENER] if cut else [Op.OPEN, Op.OPEN])


def test_the_deadline_holds(stack: Stack) -> None:
    stack.state.write_text("mode=enforce\nuid_min=1\n")
    stack.serve(lambda agent, connection: time.sleep(5))
    started = time.monotonic()
    assert stack.run("account")["account"] == AUTHINFO_UNAVAIL
    assert 1.2 < time.monotonic() - started < 4


@pytest.mark.parametrize(
    ("state", "user", "result"),
    [("mode=enforce\nuid_min=1\n", USER, False), ("mode=enforce\nuid_min=1\n", "root", True),
     ("mode=complain\nuid_min=1\n", USER, True)],
)  # fmt: skip
def test_no_descriptor_is_left_for_what_the_agent_sends(stack: Stack, state: str, user: str, result: bool) -> None:
    """As in a su that its user starts with few: never a session without what should bind it."""

    def script(agent: FakeAgent, connection: socket.socket) -> None:
        with contextlib.suppress(WireError):  # the module hangs up
            bound("/nowhere")(agent, connection)

    stack.state.write_text(state)
    stack.serve(script)
    found = stack.run("short", "session", user=user)
    assert (found["session"] == SUCCESS) is result


@pytest.mark.parametrize(
    ("state", "user", "seconds"),
    [
        ("mode=enforce\nuid_min=1\n", "root", 0),
        ("mode=enforce\nuid_min=1000\n", USER, 0),
        (f"mode=enforce\nuid_min=1\nbreak_glass={USER}\n", USER, 0),
        ("mode=complain\nuid_min=1\n", USER, 1),
    ],
)
def test_whoever_is_let_in_anyway_waits_for_no_agent(stack: Stack, state: str, user: str, seconds: int) -> None:
    stack.options = "timeout=6000"
    stack.state.write_text(state)
    started = time.monotonic()
    assert stack.run("session", user=user)["session"] == SUCCESS
    assert time.monotonic() - started < seconds + 1.5


@pytest.mark.parametrize(
    ("state", "user", "result"),
    [
        (None, USER, SUCCESS),  # a fresh install
        ("mode=complain\nuid_min=1\n", USER, SUCCESS),
        ("mode=enforce\nuid_min=1\n", USER, AUTHINFO_UNAVAIL),
        ("mode=enforce\nuid_min=1\n", "root", SUCCESS),
        ("mode=enforce\nuid_min=1000\n", USER, SUCCESS),
        (f"mode=enforce\nuid_min=1\nbreak_glass={USER}\n", USER, SUCCESS),
        ("mode=enforce\nuid_min=1\nbreak_glass=\n", USER, AUTHINFO_UNAVAIL),
        ("mode=off\nuid_min=1\n", "root", SUCCESS),
        ("rubbish", "root", SUCCESS),
        ("mode=enforce\nuid_min=-1\n", "root", SUCCESS),
    ],
)
def test_without_an_agent(stack: Stack, state: str | None, user: str, result: int) -> None:
    stack.options = "timeout=300"  # so long is it waited for, if the user may be gated
    stack.state.unlink()
    if state is not None:
        stack.state.write_text(state)
    found = stack.run("account", "session", user=user)
    assert found["account"] == result
    if result != SUCCESS:
        assert "the agent of this machine does not answer" in found["messages"][0]


def test_a_state_that_cannot_be_understood_refuses_those_who_would_be_gated(stack: Stack) -> None:
    stack.state.write_text("mode=perhaps\n")
    subprocess.run(["userdel", "personatest"], check=False, capture_output=True)
    subprocess.run(["useradd", "-M", "-u", "60234", "personatest"], check=True, capture_output=True)
    try:
        found = stack.run("account", user="personatest")
        assert found["account"] == AUTHINFO_UNAVAIL
        assert "gate state" in found["messages"][0]
    finally:
        subprocess.run(["userdel", "personatest"], check=False, capture_output=True)


def test_an_option_that_is_misspelt_locks_nobody_out(stack: Stack) -> None:
    stack.options = "tiemout=5 timeout=abc"
    stack.serve(says(reply(PamVerdict.PASS)))
    assert stack.run("account")["account"] == SUCCESS


def test_a_missing_module_locks_nobody_out(stack: Stack) -> None:
    control = "[success=ok new_authtok_reqd=ok ignore=ignore module_unknown=ignore default=bad]"
    (stack.directory / "test").write_text(f"account {control} /nowhere.so\naccount required pam_permit.so\n")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "drive.py"), str(stack.directory), "test", USER, "account"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["account"] == SUCCESS


def test_the_shipped_profile_has_the_same_control_values() -> None:
    profile = (ROOT / "packaging" / "pam-configs" / "persona").read_text()
    assert "[success=ok new_authtok_reqd=ok ignore=ignore module_unknown=ignore default=bad]\tpam_persona.so" in profile
    # the mere presence of this field keeps the profile out of common-session-noninteractive, whatever it says
    assert "Session-Interactive-Only" not in profile
