"""A persona that uses command sets, from its file to a gated shell: what runs, and what its user is shown."""

import json
import sys
from pathlib import Path

import pytest
from persona_guest.shell import cli

from tests.guest.conftest import Run, trial_of

DOCUMENTS = """\
kind: Persona
name: Trial
command_whitelist: [bash, "@tools", "!rm -r **", "@python", ls]
---
{kind: CommandSet, name: tools, commands: [echo, rm, ls]}
---
{kind: CommandSet, name: python, commands: [python3, /usr/bin/python3.*, "%s"]}
"""
LISTED = """\
Trial v1, policy trial-Trial: applies now
    bash, !rm -r **, ls
    @python: python3, /usr/bin/python3.*, %s
    @tools: echo, rm
"""


def test_what_a_set_allows_runs_and_is_listed_as_its(gated: Run, tmp_path: Path) -> None:
    python = Path(sys.executable).resolve()
    (tmp_path / "x.yaml").write_text(DOCUMENTS % python)
    with trial_of(tmp_path / "x.yaml") as socket:
        program = f"{python} -m persona_guest.shell.cli list --socket {socket}"
        done = gated(f"COLUMNS=500 {program}; touch x; >x; rm x; rm -r x; echo $?; {program} --json", by=socket)
        assert done.stdout.startswith(LISTED % python + "126\n"), done.stderr
        [entry] = json.loads(done.stdout.splitlines()[-1])["entries"]
        assert entry["sets"] == {"tools": ["echo", "rm"], "python": ["python3", "/usr/bin/python3.*", str(python)]}
        assert "@" not in json.dumps(entry["persona"])
        assert "persona: touch: denied, no_matching_policy" in done.stderr


def test_a_broker_that_knows_no_sets_is_listed_as_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Before:
        """A fake client, of an agent whose broker sends no sets."""

        def __init__(self, _socket: str) -> None:
            pass

        def __enter__(self) -> "Before":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def call(self, _op: str) -> object:
            entry = {"persona": {"name": "P", "command_whitelist": ["ls", "cat"]}, "version": 1, "policy": "p",
                     "holds": True, "commands": ["**"]}  # fmt: skip
            return {"entries": [entry, {**entry, "persona": {"name": "Q", "command_whitelist": []}}]}

    monkeypatch.setattr(cli, "Client", Before)
    assert cli.main(["list"]) == 0
    said = capsys.readouterr().out
    assert said == "P v1, policy p: applies now\n    ls, cat\nQ v1, policy p: applies now\n    (nothing)\n"
