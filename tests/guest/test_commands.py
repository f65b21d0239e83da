"""What is typed: a second ``persona-agent``, settings that lack something, a reader that goes."""

import fcntl
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from persona_guest import __main__ as agent
from persona_guest.agent import admin, lifecycle
from persona_guest.settings import Broker, Mode, Paths, Settings

from tests.guest.conftest import ROOT, Run
from tests.test_cli import ALL, RUN_SOMETHING, answer


def test_a_second_agent_starts_nothing_and_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state").mkdir()
    holder = os.open(tmp_path / "state", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    assert lifecycle.run(Settings(paths=Paths(runtime_dir=str(tmp_path)))) == 1
    assert f"an agent runs already with {tmp_path}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["state"]
    os.close(holder)


def test_who_may_not_write_there_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert lifecycle.run(Settings(paths=Paths(runtime_dir=str(tmp_path / "file" / "run")))) == 1
    assert "Not a directory" in capsys.readouterr().err


def test_settings_that_were_named_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert agent.main(["check-config", "--config", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == f"persona-agent: {tmp_path}/none: No such file or directory\n"


def test_what_settings_lack_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = tmp_path / "token"
    settings = Settings(mode=Mode.ENFORCE, broker=Broker(token_file=str(token)))
    assert admin.check_config("guest.toml", settings) == 0
    said = capsys.readouterr().out
    assert "note: broker.url and broker.events_url: without both every command is denied" in said
    assert f"note: {token}: No such file or directory" in said
    token.touch(0o644)
    admin.check_config("guest.toml", settings)
    assert f"note: {token}: others can read it" in capsys.readouterr().out
    token.chmod(0o600)
    told = replace(settings.broker, url="https://b:1", events_url="https://b:2")
    admin.check_config("guest.toml", replace(settings, broker=told))
    assert "note: broker" not in (said := capsys.readouterr().out)
    assert str(token) not in said


# prints more than a pipe holds, as ``persona list`` may
LONG = """
import sys
sys.path[:0] = {path!r}
from persona_guest.shell import cli
cli._status = lambda _arguments: print("x" * (1 << 20)) or 0
sys.exit(cli.main(["status"]))
"""


def test_a_reader_that_goes_is_no_error() -> None:
    code = LONG.format(path=[str(ROOT), str(ROOT / "guest")])
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    if process.stdout is None or process.stderr is None:
        raise RuntimeError("no pipes")
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(10) == 141
    process.stderr.close()


def test_every_answer_of_persona_in_a_session(gated: Run, agent: Path) -> None:
    words = {"status": "", "list": "", "denials": "", "greeting": "", "explain": " ls"}
    said = [f"python3 -m persona_guest.shell.cli {name} --json --socket {agent}{rest}" for name, rest in words.items()]
    lines = gated("; ".join(said)).stdout.splitlines(keepends=True)
    status, listed, denials, greeting, explained = map(answer, lines)
    assert [value["ok"] for value in (status, listed, denials, greeting, explained)] == [True] * 5
    assert "session" in status
    assert set(status["records"]) == {"waiting", "bound", "oldest_at", "lost", "not_on_disk", "aside"}  # to root
    assert (status["records"]["lost"], status["records"]["not_on_disk"]) == ({}, "")
    assert set(listed) == {"ok", "entries"}
    assert set(greeting) == {"ok", "greeting"}
    assert set(denials) == {"ok", "items"}
    assert set(explained) == {"ok", "program", "decision", "always"}
    assert {f"persona {name}" for name in words} == {
        name for name in ALL if name.startswith("persona ")
    } - RUN_SOMETHING
