"""``persona``, the user's own command: never denied and nobody's way in; what it shows is fit to be shown."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from persona_guest.broker.client import BrokerClient
from persona_guest.broker.pool import Answer, Outcome
from persona_guest.core.leases import LeaseBook
from persona_guest.session.model import Session
from persona_guest.shell import cli

from persona.codec import encode_decision
from persona.decisions import Denied, Subject
from persona.problems import Reason
from tests.guest.conftest import ROOT, Run, trial_of

NARROW = "kind: Persona\nname: Narrow\ncommand_whitelist: [bash, ls, ln, cp, mkdir, cat, unshare, mount]\n"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "broker", "guest")),
    "SHELL": "/bin/bash",
}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("narrow") / "persona.yaml"
    path.write_text(NARROW)
    return path


@pytest.fixture(scope="module")
def narrow_agent(narrow: Path) -> Iterator[Path]:
    with trial_of(narrow) as socket:
        yield socket


def test_it_runs_whatever_the_persona_says(gated: Run, narrow_agent: Path) -> None:
    done = gated("persona status && persona list && persona explain ls && (exec -a x persona denials)", by=narrow_agent)
    assert (done.returncode, done.stderr) == (0, "")
    assert "persona:   Narrow v1 (policy trial-Narrow)" in done.stdout


# $P is the command's path, $I its interpreter's
NOT_ITSELF = {
    "its interpreter": "$I -c 'print(1)'",
    "its interpreter on the command's file": "$I -I $P status",
    "a copy": "cp $P own; ./own status",
    "a link from elsewhere": "ln -s $P own; ./own status",
    "a script of the same name": "mkdir b; cp -p $P b/persona; printf '#!%s\\nprint(1)\\n' $I >b/persona; b/persona",
    "another file at its path": "cp -p $P x; printf '#!%s\\nprint(1)\\n' $I >x; "
    "unshare -rm bash -c 'mount --bind x $P; $P status'",
    "another interpreter": "cp /usr/bin/echo x; unshare -rm bash -c 'mount --bind x $I; $P $P'",
}


@pytest.mark.parametrize("way", NOT_ITSELF)
def test_nothing_else_runs_for_it(gated: Run, narrow_agent: Path, tmp_path: Path, way: str) -> None:
    line = f"export P=$(type -P persona) I={os.path.realpath(sys.executable)}; {NOT_ITSELF[way]}"
    done = gated(line, by=narrow_agent)
    assert done.stdout == "", done
    assert "denied, " in done.stderr
    without = subprocess.run(
        ["bash", "-c", line.replace("$(type -P persona)", str(narrow_agent.parent.parent / "bin" / "persona"))],
        capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert without.stdout or "in no gated session" in without.stderr, without  # or this shows nothing


# --- try -------------------------------------------------------------------------------------------


@pytest.mark.long
def test_try_takes_a_command_without_dashes(narrow: Path, tmp_path: Path) -> None:
    for words in ((str(narrow), "ls", "-d", "/"), ("-q", str(narrow), "--", "ls", "-d", "/")):
        told = [sys.executable, "-m", "persona_guest.shell.cli", "try", *words]
        done = subprocess.run(
            told, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=60, check=False
        )
        assert (done.returncode, done.stdout) == (0, "/\n"), done


@pytest.mark.parametrize(
    ("words", "files", "command"),
    [
        (["a.yaml"], ["a.yaml"], []),
        (["a.yaml", "ls", "-l"], ["a.yaml"], ["ls", "-l"]),
        (["-q", "a.yaml", "b.yml", "c.json", "ls", "d.yaml"], ["-q", "a.yaml", "b.yml", "c.json"], ["ls", "d.yaml"]),
        (["a.yaml", "-q", "ls"], ["a.yaml", "-q"], ["ls"]),
        (["ls"], ["ls"], []),
        (["documents", "more", "run"], ["documents", "more"], ["run"]),
        (["documents", "./run", "more"], ["documents"], ["./run", "more"]),
        (["documents", "note", "ls"], ["documents", "note"], ["ls"]),
        (["a.yaml", "--", "b.yaml"], ["a.yaml"], ["b.yaml"]),
        (["a.yaml", "bash", "--", "x"], ["a.yaml"], ["bash", "--", "x"]),
        (["a.yaml", "mispelt.yaml"], ["a.yaml", "mispelt.yaml"], []),
    ],
)  # fmt: skip
def test_where_the_command_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], files: list[str], command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("documents", "more"):
        Path(name).mkdir()
    for name in ("run", "note"):
        Path(name).touch(0o755 if name == "run" else 0o644)
    assert cli._parted(["try", *words]) == (["try", *files], command)


# --- list ------------------------------------------------------------------------------------------


class Link:
    """A fake link: answers by path."""

    def __init__(self, **answers: Outcome) -> None:
        self.answers = answers

    def post(self, _who: str, _method: str, path: str, _body: Any, done: Any, **_: Any) -> None:
        done(self.answers["admissions" if path.endswith("admissions") else "personas"])


NO_POLICY = Answer(200, {"admitted": False, "denied": encode_decision(Denied(Reason.NO_MATCHING_POLICY))})
YES = Answer(200, {"admitted": True, "persona": None, "policy": None})
UNKNOWN = Answer(404, {"code": "not_found", "detail": "no such session of this guest"})


@pytest.mark.parametrize(("admission", "found"), [(NO_POLICY, []), (YES, Reason.SESSION_UNKNOWN)])
def test_a_user_whom_no_policy_names_is_told_so(admission: Answer, found: object) -> None:
    """Complain mode lets them in, and the broker has no session of theirs."""
    broker_client = BrokerClient(
        Link(personas=UNKNOWN, admissions=admission),  # type: ignore[arg-type]  # a fake
        LeaseBook(),
        lambda _session: None,
    )
    session = Session("s-1", Subject("u", (), "vm"), 1000, "sshd", "", "/bin/bash", 1, None, 0)
    answers: list[Any] = []
    broker_client.entries(session, answers.append)
    assert [answer.reason if isinstance(answer, Denied) else answer for answer in answers] == [found]


def shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: dict[str, Any], *words: str
) -> str:
    client = Mock(call=Mock(return_value=answer))
    client.__enter__ = lambda _self: client
    client.__exit__ = lambda *_: None
    monkeypatch.setattr(cli, "Client", lambda _path: client)
    assert cli.main(list(words)) == 0
    return capsys.readouterr().out


def test_an_empty_list_says_what_that_means(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = shown(monkeypatch, capsys, {"ok": True, "entries": []}, "list")
    assert said == "no policy is for you on this machine; ask its operator for one\n"


# --- what users and documents chose ----------------------------------------------------------------

STATUS = {
    "gated": True, "mode": "enforce", "session": "s-1", "user": "\x1b[2Jal\udcffice", "vm": "vm\r", "policy": "p\x07",
    "persona": {"name": "P\u202e", "version": 1}, "limits": {}, "network": ["\x9b1m"], "places": [], "lease_s": None,
    "layers": {"seccomp": True, "bpf": True}, "kernel": {"why_not": ""}, "broker": "connected", "standby": True,
    "generation": 1,
}  # fmt: skip
ENTRY = {"policy": "p\x1b", "commands": ["\x1b"], "persona": {"name": "P", "command_whitelist": ["\x1b[2J"]},
         "version": 1, "holds": False, "reason": "load_unknown", "detail": "\x07"}  # fmt: skip
DENIAL = {"at": 1e9, "first_at": 1e9, "event": "exec", "program": "/\udcff", "command": "\x1b",
          "reason": "load_unknown", "policy": None, "persona": None, "help": "\r",
          "session": "s-1", "count": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("status", STATUS),
        ("list", {"entries": [ENTRY]}),
        ("denials", {"items": [DENIAL]}),
        ("greeting", {"greeting": "persona: \x1b[2J\udcff"}),
    ],
)
def test_what_is_shown_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str, answer: dict[str, Any]
) -> None:
    said = shown(monkeypatch, capsys, answer, word)
    assert "\\x" in said
    assert all(line.isprintable() for line in said.rstrip("\n").split("\n"))


@pytest.mark.parametrize(
    ("origin", "under"),
    [
        ({}, " under persona P (policy p)"),  # an agent of before
        ({"policy_origin": ""}, " under persona P (policy p)"),
        ({"policy_origin": "10-a.yaml:3"}, " under persona P, policy p (10-a.yaml:3)"),
        ({"policy_origin": "\x1b[2J:3"}, r" under persona P, policy p (\x1b[2J:3)"),
    ],
)
def test_a_denial_says_where_its_policy_is_written_where_that_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], origin: dict[str, Any], under: str
) -> None:
    one = {**DENIAL, "program": "/usr/bin/x", "policy": "p", "persona": "P", **origin}
    said = shown(monkeypatch, capsys, {"items": [one]}, "denials").splitlines()[0]
    assert said.endswith(f"  /usr/bin/x: denied, load_unknown{under}")
    kept = json.loads(shown(monkeypatch, capsys, {"items": [one]}, "denials", "--json"))["items"][0]
    assert {"policy_origin": kept.get("policy_origin")} == {"policy_origin": None, **origin}


def test_what_is_explained_is_named_by_its_file(gated: Run, agent: Path) -> None:
    done = gated("ln -s /usr/bin/strace ls; persona explain ./ls; persona explain strace", by=agent)
    assert done.stdout.startswith("./ls (/usr/bin/strace): would be denied, no_matching_policy")
    assert "\nstrace: would be denied, no_matching_policy" in done.stdout
    done = gated("cp /usr/bin/true $'\\xff'; persona explain ./$'\\xff'; persona explain $'\\e[2J'", by=agent)
    assert done.stdout.startswith(r"$'./\xff': would be denied, program_not_trusted: others than root could change")
    assert done.stderr == r"persona: $'\x1b[2J': not found in PATH" + "\n"
    assert (
        gated("persona explain cd /", by=agent).stderr == "persona: cd: the shell does it itself, nothing is decided\n"
    )
