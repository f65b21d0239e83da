"""Landlock in the fallback: the rules themselves, when they are put up, and ``persona-shell`` under them."""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from persona_guest.ipc.seqpacket import listen
from persona_guest.kernel import landlock, seccomp
from persona_guest.loop import Loop
from persona_guest.lsm.landlock_fallback import Fallback
from persona_guest.lsm.layer import KernelLayer, NoKernelLayer
from persona_guest.settings import Mode, Settings, SettingsError, parse

pytestmark = pytest.mark.skipif(not landlock.is_usable(), reason="this kernel has no Landlock")

PATHS = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
RUNS = """
import os, subprocess, sys
from persona_guest.kernel import landlock, seccomp
copy, other = sys.argv[1:3]
seccomp.set_no_new_privs()
landlock.restrict_self(landlock.starting_below(["/usr", "/nowhere"]))
def tries(what, *arguments):
    try:
        print(what(*arguments) or "done")
    except OSError as error:
        print(error.strerror)
tries(lambda: subprocess.run(["/usr/bin/true"]).returncode)
tries(lambda: subprocess.run([copy]).returncode)
tries(os.rename, copy, other)
tries(lambda: subprocess.run([other]).returncode)
open(copy, "w").write("#!/usr/bin/true")
os.chmod(copy, 0o755)
tries(lambda: subprocess.run([copy]).returncode)
tries(lambda: subprocess.run(["/lib64/ld-linux-x86-64.so.2", other]).returncode)
"""


def test_programs_start_below_the_directories_only(tmp_path: Path) -> None:
    copy, other = shutil.copy("/bin/true", tmp_path), tmp_path / "other" / "true"
    other.parent.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", RUNS, copy, str(other)],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env=PATHS,
    )
    # the last: what ld.so is told to run, Landlock does not see; the gate does, since ld.so is nobody's
    assert done.stdout.split("\n") == [
        "done", "Permission denied", "done", "Permission denied", "Permission denied", "done", "",
    ]  # fmt: skip


def test_what_cannot_be_a_rule_leaves_no_descriptor_behind(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError):
        landlock.starting_below(["/usr", "/proc/self/ns/mnt"])  # a file of no mounted file system
    with pytest.raises(OSError):
        landlock.restrict_self(0)
    assert os.listdir("/proc/self/fd") == before


def settings(mode: str = "enforce", below: tuple[str, ...] = ("/usr",)) -> Settings:
    return parse({"mode": mode, "gate": {"landlock_execute": list(below)}, "paths": {"bpf_dir": ""}}, "test")


def fallback(chosen: Settings) -> tuple[Fallback, KernelLayer]:
    kernel_layer = KernelLayer(chosen, Loop(), lambda _event: None)
    return Fallback(chosen, kernel_layer), kernel_layer


class Loaded(NoKernelLayer):
    """Stands for a kernel layer that is there."""

    active = True


def test_it_is_for_where_the_kernel_layer_is_missing_and_commands_are_stopped() -> None:
    assert settings().mode is Mode.ENFORCE
    found, kernel_layer = fallback(settings())
    assert found.active
    assert found.layers() == {"landlock": True}
    assert found.directories == ("/usr",)
    ruleset = found.ruleset()
    assert ruleset is not None
    assert os.readlink(f"/proc/self/fd/{ruleset}") == "anon_inode:[landlock-ruleset]"
    os.close(ruleset)
    kernel_layer.layer = Loaded("")
    assert found.layers() == {"landlock": False}
    assert not found.directories
    assert found.ruleset() is None
    for other in (settings("complain"), settings(below=())):
        found, _ = fallback(other)
        assert (found.active, found.layers(), found.ruleset()) == (False, {}, None)


def test_a_kernel_without_it_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(landlock, "is_usable", lambda: False)
    found, kernel_layer = fallback(settings())
    assert (found.layers(), found.ruleset(), found.missing) == ({"landlock": False}, None, True)
    assert "gate.landlock_execute" in caplog.text
    kernel_layer.layer = Loaded("")
    assert not found.missing
    assert not fallback(settings("complain"))[0].missing


@pytest.mark.parametrize("below", [("usr",), ("",), ("/usr\0",), ("/usr",) * 65])
def test_odd_directories_are_refused_by_name(below: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError, match=r"gate\.landlock_execute"):
        settings(below=below)


SHELL = """
import subprocess, sys
from persona_guest.shell.client import AgentError
from persona_guest.shell.gate import install
try:
    install(sys.argv[1], "/bin/sh")
    subprocess.run([sys.argv[2]])
    print("ran")
except (AgentError, OSError) as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("below", "said"),
    [(["/usr"], "Permission denied"), (None, "ran"), (["/proc/self/ns/mnt"], "cannot be put up"), ("x", "a list")],
)
def test_persona_shell_is_bound_too(tmp_path: Path, below: object, said: str) -> None:
    server = listen(tmp_path / "agent.sock", 0o600)
    server.setblocking(True)
    asked: list[dict[str, object]] = []
    answer = {"ok": True, "verdict": "install", "filter": base64.b64encode(seccomp.gate_filter()).decode()}

    def agent() -> None:
        connection, _ = server.accept()
        with connection, contextlib.suppress(BrokenPipeError):  # where it could not be bound
            asked.append(json.loads(connection.recv(8192)))
            connection.send(json.dumps(answer | ({"landlock": below} if below is not None else {})).encode())
            _, fds, _, _ = socket.recv_fds(connection, 8192, 1)
            connection.send(b'{"ok": true}')
            buffer = bytearray(seccomp.NOTIF_SIZE)
            for listener in fds:
                while notification := seccomp.receive(listener, buffer):
                    seccomp.respond_continue(listener, notification.id)
                os.close(listener)

    threading.Thread(target=agent, daemon=True).start()
    done = subprocess.run(
        [sys.executable, "-c", SHELL, str(tmp_path / "agent.sock"), shutil.copy("/bin/true", tmp_path)],
        capture_output=True, text=True, check=True, timeout=30, env=PATHS,
    )  # fmt: skip
    server.close()
    assert said in done.stdout
    assert asked == [{"op": "gate", "shell": "/bin/sh"}]
