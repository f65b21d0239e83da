"""What a denial says, on the terminal and in the record: which file was refused, and only then its caller's text."""

import dataclasses
import itertools
import json
import os
import pty
import select
import subprocess
import sys
import time
import tty
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from persona_guest.audit.journal import Journal
from persona_guest.gate.terminal import tell
from persona_guest.kernel.task import Task
from persona_guest.program import exec_request as exec_requests
from persona_guest.program.identity import Identifier
from persona_guest.settings import Gate
from persona_guest.system import systemd

from persona.decisions import Program
from persona.problems import Reason
from persona.record_codec import Record, decode_record, encode_record
from tests.guest.conftest import GATED, ROOT, Run

PATH = os.pathsep.join(str(ROOT / part) for part in ("", "broker", "guest"))


def records(agent: Path, seen: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The broker's records, once there is one that ``seen`` is true of."""
    home = agent.parent.parent
    told = [sys.executable, "-m", "persona_broker", "--db", str(home / "db"), "records", "tail", "-n", "500", "--json"]
    deadline = time.monotonic() + 20
    while True:
        done = subprocess.run(
            told, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PATH}, timeout=30, check=True
        )
        found = [json.loads(line) for line in done.stdout.splitlines()]
        if any(map(seen, found)) or time.monotonic() > deadline:
            return [record for record in found if seen(record)]
        time.sleep(0.2)


# what is run, what the terminal says of it, what the record has as the file, and how its command line begins
DISGUISES = {
    "argv[0]": ("exec -a 'git status' strace -sS 10.0.0.0/8", "strace", "/usr/bin/strace", ["git status", "-sS"]),
    "a link": ("ln -s /usr/bin/strace ls; ./ls link", "strace", "/usr/bin/strace", ["./ls", "link"]),
    "a link to one of several names": ("ln -s /usr/bin/awk x; ./x of-it", "mawk", "/usr/bin/mawk", ["./x", "of-it"]),
    "one of several names": ("awk this", "awk", "/usr/bin/mawk", ["awk", "this"]),
    "another directory of PATH": ("/bin/strace bin", "strace", "/usr/bin/strace", ["/bin/strace", "bin"]),
    "a name with two words": ("cp /usr/bin/true 'a b'; './a b' two", "'{home}/a b'", "{home}/a b", ["./a b", "two"]),
    "a script": (
        "printf '#!/usr/bin/strace -V\\n' >x; chmod 755 x; ./x script",
        "{home}/x (script, run by strace)",
        "{home}/x",
        ["/usr/bin/strace", "-V", "./x", "script"],
    ),
    "a script that names its interpreter by a link": (
        "ln -s /usr/bin/strace ls; printf '#!%s/ls\\n' $PWD >y; chmod 755 y; ./y by-link",
        "{home}/y (script, run by strace)",
        "{home}/y",
        ["/usr/bin/strace", "./y", "by-link"],
    ),
    "a mount of one's own": (
        "cp /usr/bin/true x; unshare -rm bash -c 'mount --bind x /usr/bin/ls; ls mounted'",
        "'not a file of this machine: /usr/bin/ls'",
        "not a file of this machine: /usr/bin/ls",
        ["ls", "mounted"],
    ),
    "control characters": (
        r"cp /usr/bin/true $'\e]0;x\a'; ./$'\e]0;x\a' control",
        r"$'{home}/\x1b]0;x\x07'",
        "{home}/\x1b]0;x\x07",
        ["./\x1b]0;x\x07", "control"],
    ),
    "bytes that are no text": (
        r"cp /usr/bin/true $'\xff'; ./$'\xff' bytes 2>&1 | grep -a ^persona: >&2",
        r"$'{home}/\xff'",
        "{home}/\udcff",
        ["./\udcff", "bytes"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_denial_names_the_file_and_not_what_its_caller_called_it(
    gated: Run, agent: Path, tmp_path: Path, disguise: str
) -> None:
    script, said, program, argv = DISGUISES[disguise]
    home = str(tmp_path / "home")
    done = gated(script)
    assert f"persona: {said.format(home=home)}: denied" in done.stderr
    found = records(agent, lambda record: record["argv"][: len(argv)] == argv and record["decision"] == "denied")
    assert {record["program"] for record in found} == {program.format(home=home)}


def test_a_grant_is_recorded_under_the_file_too(gated: Run, agent: Path) -> None:
    assert gated("exec -a ls python3 -c 'print(42)'").stdout == "42\n"
    found = records(agent, lambda record: record["argv"][1:] == ["-c", "print(42)"])
    assert [(record["program"], record["decision"]) for record in found] == [("/usr/bin/python3.11", "granted")]


@pytest.mark.long
def test_a_record_takes_every_name_of_a_file() -> None:
    """A broker refuses a batch with one that is too long."""
    found = exec_requests.request_for(
        Task(os.getpid()), os.open("/usr/bin/true", os.O_PATH), b"x", (b"x",), Identifier(Gate())
    )
    identified = found.stages[0].found
    for visible, path in itertools.product((True, False), ("/" + "x" * 4095, "/x")):
        named = dataclasses.replace(identified, visible=visible, program=Program(path), trusted=False).path
        record = Record(1, "s", "u", named, (), "denied", None, None, None, None, "exec", False, False)
        assert decode_record(encode_record(record)) == record
        assert (named == path) is visible


# --- one line, well formed -------------------------------------------------------------------------


def on_a_terminal(agent: Path, home: Path, *command: str, raw: bool = False) -> bytes:
    """What a gated command writes to its terminal."""
    master, slave = pty.openpty()
    if raw:
        tty.setraw(slave)
    process = subprocess.Popen(
        [sys.executable, "-c", GATED, str(agent), *command],
        stdin=slave, stdout=slave, stderr=slave, cwd=home, start_new_session=True,
        env={**os.environ, "PYTHONPATH": PATH, "SHELL": "/bin/bash", "PATH": "/usr/local/bin:/usr/bin:/bin"},
    )  # fmt: skip
    os.close(slave)
    text = b""
    try:
        while select.select([master], [], [], 30)[0]:
            text += os.read(master, 65536)
    except OSError:  # EIO: the last process that had it is gone
        pass
    finally:
        os.close(master)
        process.wait(30)
    return text


# Each is one command that is tried several times, as PATH has /usr/bin and /bin.
SEARCHES = {
    "execvp": ("python3", "-c", "import os; os.execvp('strace', ['strace', '-V'])"),
    "one path after another, as zsh does": (
        "python3", "-c",
        "import os\nfor path in ('/usr/bin/strace', '/usr/bin/strace', '/bin/strace'):\n"
        "    try: os.execv(path, ['strace', '-V'])\n    except PermissionError: pass",
    ),
    "subprocess": ("python3", "-c", "import subprocess\ntry: subprocess.run(['strace', '-V'])\nexcept OSError: pass"),
    "env": ("env", "strace", "-V"),
    "find": ("find", "/", "-maxdepth", "0", "-exec", "strace", "-V", ";"),
}  # fmt: skip


@pytest.mark.parametrize("search", SEARCHES)
def test_one_command_is_one_line(agent: Path, tmp_path: Path, search: str) -> None:
    assert on_a_terminal(agent, tmp_path, *SEARCHES[search]).count(b"persona: strace: denied") == 1


def test_two_commands_are_two_lines(agent: Path, tmp_path: Path) -> None:
    again = (
        "import os\nfor word in ('one', 'two'):\n"
        "    try: os.execv('/usr/bin/strace', ['strace', word])\n    except OSError: pass"
    )
    assert on_a_terminal(agent, tmp_path, "python3", "-c", again).count(b"persona: strace: denied") == 2
    assert on_a_terminal(agent, tmp_path, "bash", "-c", "strace; strace").count(b"persona: strace: denied") == 2


@pytest.mark.parametrize("raw", [False, True])
def test_a_line_ends_once_whatever_mode_the_terminal_is_in(raw: bool) -> None:
    master, slave = pty.openpty()
    if raw:
        tty.setraw(slave)
    process = subprocess.Popen(["/usr/bin/sleep", "60"], stderr=slave)
    try:
        assert tell(process.pid, "persona: one line")
        assert os.read(master, 100) == b"persona: one line\r\n"
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)


# --- the journal -----------------------------------------------------------------------------------


def entry(program: str, *argv: str, user: str = "alice") -> tuple[str, dict[str, str]]:
    written: list[tuple[str, dict[str, str]]] = []
    reason = Reason.NO_MATCHING_POLICY
    record = Record(1.0, "s-1", user, program, argv, "denied", reason, None, None, None, "exec", False, False)
    Journal(lambda text, fields: written.append((text, fields))).add(record)
    return written[0]


def test_the_journal_names_the_file_and_quotes_the_rest() -> None:
    text, fields = entry("/usr/bin/nmap", "git status", "-sS", "10.0.0.0/8")
    assert text == "exec: alice: denied, no_matching_policy: /usr/bin/nmap: 'git status' -sS 10.0.0.0/8"
    assert (fields["PERSONA_PROGRAM"], fields["PERSONA_COMMAND"]) == ("/usr/bin/nmap", "'git status' -sS 10.0.0.0/8")
    assert entry("/a", "x: /usr/bin/nmap: y")[0].endswith(": /a: 'x: /usr/bin/nmap: y'")
    assert entry("", user="a\nb")[0] == r"exec: $'a\nb': denied, no_matching_policy"


class FakeNative:
    """journald's client, as it encodes what it is given."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, message: str, **fields: str) -> None:
        self.sent += [value.encode().decode() for value in (message, *fields.values())]


def test_the_journal_takes_any_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    native = FakeNative()
    monkeypatch.setitem(sys.modules, "systemd", type("systemd", (), {"journal": native}))
    systemd.journal(*entry("/tmp/\udcff", "\udcff\n", user="\udcfe"))
    systemd.journal("\udcff", {"PERSONA_X": "\udcff"})
    assert r"$'/tmp/\xff'" in native.sent
    assert all(text.isprintable() for text in native.sent)
