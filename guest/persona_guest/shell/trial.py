"""``persona try``: an embedded broker and agent, and the reader's own shell gated by a persona.

No root, no VM, nothing left behind.  A trial of the gate, not a boundary: the agent runs as the same
user as what it gates.
"""

import getpass
import importlib.util
import json
import os
import pwd
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import persona
import persona_guest
from persona.shown import word
from persona_guest.settings import Gate
from persona_guest.shell.client import AgentError
from persona_guest.shell.gate import install
from persona_guest.shell.login import become

VM = "trial"
READY_S = 15.0
_SHEBANG_MAX = 200  # characters of an interpreter's path; the kernel reads 256 bytes of the line
_NEEDS = ("persona_broker", "cryptography", "flask", "gunicorn", "yaml", "psutil")


def run(files: list[str], command: list[str], *, quiet: bool) -> int:
    """The gated shell's or command's exit code; 4 where the trial could not be set up."""
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"persona: 'persona try' runs a broker too, and {sys.executable} has no {', '.join(missing)}: apt install "
            "persona-broker (or, from a checkout, python3-cryptography python3-flask gunicorn python3-yaml "
            "python3-psutil)",
            file=sys.stderr,
        )
        return 4
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="persona-try-")))
        try:
            start(stack, home, files)
        except (TrialError, OSError) as error:
            print(f"persona: {error}", file=sys.stderr)
            return 4
        if not quiet:
            _explain(files)
        return _gated(str(home / "run" / "agent.sock"), command)


class TrialError(Exception):
    """The trial could not be set up; says why."""


def start(stack: ExitStack, home: Path, files: list[str]) -> None:
    """An embedded broker and agent below ``home``, ended with ``stack``; returns when both are ready.

    The agent's socket is ``run/agent.sock``.  Raises ``TrialError``, ``OSError``.
    """
    token = home / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_urlsafe(32))
    names = _personas(files)
    if names is not None:
        policies = [
            {"kind": "Policy", "name": f"trial-{name}"[:64], "subjects": {"users": ["*"]}, "persona": name}
            for name in names
        ]
        for index, value in enumerate(policies):
            (home / f"policy-{index}.json").write_text(json.dumps(value))
        files = [*files, *(str(home / f"policy-{index}.json") for index in range(len(policies)))]
    reading, writing = os.pipe()
    broker = _spawn(
        stack,
        "persona_broker", "--config", str(home / "none"), "--db", str(home / "db"), "serve",
        "--bind", f"unix:{home}/api.sock", "--events-bind", f"unix:{home}/events.sock", "--workers", "1",
        "--load-source", "psutil" if names is None else "set", "--apply", *files,
        "--guest", VM, "--guest-token-file", str(token), "--ready-fd", str(writing),
        keep=writing,
    )  # fmt: skip
    os.close(writing)
    command, trusted = _command(home)
    config = home / "guest.toml"
    config.write_text(
        f'mode = "enforce"\n[vm]\nname = "{VM}"\n[broker]\nurl = "unix:{home}/api.sock"\n'
        f'events_url = "unix:{home}/events.sock"\ntoken_file = "{token}"\ntimeout_s = 10.0\n'
        "[gate]\nuid_min = 0\nnever_gate_root = false\n"
        f"user_command = {json.dumps(command)}\ntrusted_writable = {json.dumps(trusted)}\n"
        f'[paths]\nruntime_dir = "{home}/run"\nstate_dir = "{home}/state"\nbpf_dir = ""\ncgroup_root = ""\n'
    )
    # one after the other: an agent that has just found no broker refuses at once for a moment
    with os.fdopen(reading, "rb") as ready:
        _await(ready.fileno(), broker, "the embedded broker")
        if ready.read(6) != b"ready\n":
            raise TrialError(_why(broker, "the embedded broker"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(home / "notify"))
        agent = _spawn(stack, "persona_guest", "--config", str(config), NOTIFY_SOCKET=str(home / "notify"))
        message = b""
        while b"READY=1" not in message:  # its first word is of a descriptor to keep
            _await(notified.fileno(), agent, "the embedded agent")
            message = notified.recv(4096)


def _command(home: Path) -> tuple[str, list[str]]:
    """Makes ``bin/persona``, which asks this trial's agent; its path, and what the gate must trust for it."""
    path = home.resolve() / "bin" / "persona"
    path.parent.mkdir()
    python = os.path.realpath(sys.executable)
    if len(python) > _SHEBANG_MAX or not python.isprintable() or " " in python:
        python = "/usr/bin/python3"
    found = [str(Path(package.__file__ or "").resolve().parents[1]) for package in (persona, persona_guest)]
    path.write_text(
        f"#!{python} -I\nimport sys\n\nsys.path[:0] = {found!r}\nfrom persona_guest.shell.cli import main\n\n"
        f"sys.exit(main(socket={str(home / 'run' / 'agent.sock')!r}))\n"
    )
    path.chmod(0o755)
    return str(path), [*Gate().trusted_writable, str(path), python]


def _personas(files: list[str]) -> list[str] | None:
    """The names of the personas where the files hold no policy; ``None`` where they bring their own."""
    from persona_broker.policy_files.reader import load  # type: ignore[import-not-found,unused-ignore]  # another package

    from persona.documents import Persona, Policy

    documents = load([Path(file) for file in files]).documents
    if any(isinstance(document, Policy) for document in documents):
        return None
    return [document.name for document in documents if isinstance(document, Persona)]


def _spawn(
    stack: ExitStack, module: str, *arguments: str, keep: int | None = None, **extra: str
) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(entry or "." for entry in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=() if keep is None else (keep,),
        start_new_session=True,  # ^C is for the shell, not for its gate
        env={**os.environ, "PYTHONPATH": path, **extra},
    )
    stack.callback(_stop, process)
    return process


def _await(fd: int, process: subprocess.Popen[bytes], what: str) -> None:
    deadline = time.monotonic() + READY_S
    while not select.select([fd], [], [], 0.02)[0]:
        if process.poll() is not None:
            raise TrialError(_why(process, what))
        if time.monotonic() > deadline:
            raise TrialError(f"{what} was not ready after {READY_S:.0f} s")


def _why(process: subprocess.Popen[bytes], what: str) -> str:
    process.terminate()
    stderr = process.stderr.read().decode(errors="replace") if process.stderr else ""
    return f"{what} did not start: {stderr.strip()}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(6)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its workers, too
        process.wait()
    if process.stderr:
        process.stderr.close()


def _explain(files: list[str]) -> None:
    print(
        f"persona: trial of {', '.join(map(word, files))}: every program that this shell starts is decided\n"
        "persona: gated: program starts.  Not gated here: files, network, CPU, memory, and what runs outside\n"
        "persona: sudo and setuid programs gain no rights (no_new_privs).  Its agent runs as you: no boundary",
        file=sys.stderr,
    )


def _gated(path: str, command: list[str]) -> int:
    """Forks a child that puts the gate on itself and becomes shell or command; waits as a shell would."""
    shell = _own_shell()
    own = Path(path).parent.resolve().parent / "bin"  # beside run/agent.sock, which is a link
    os.environ["PATH"] = f"{own}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    pid = os.fork()
    if pid == 0:
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os._exit(_become(path, shell, command))
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def _become(path: str, shell: str, command: list[str]) -> int:
    try:
        install(path, shell)
    except AgentError as error:
        print(f"persona: {error.message}", file=sys.stderr)
        return 126
    if not command:
        return become(shell, [], login=False)
    found = shutil.which(command[0])
    if found is None:
        print(f"persona: {word(command[0])}: not found", file=sys.stderr)
        return 127
    try:
        os.execv(found, command)
    except OSError as error:
        print(f"persona: {word(command[0])}: {error.strerror}", file=sys.stderr)
        return 126


def _own_shell() -> str:
    shell = os.environ.get("SHELL", "")
    if os.path.isabs(shell) and os.access(shell, os.X_OK):
        return shell
    return pwd.getpwnam(getpass.getuser()).pw_shell or "/bin/sh"
