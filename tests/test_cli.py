"""One convention for all commands, docs/cli.md: read off the parsers, and seen in what each command writes."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from persona_broker.audit import checkpoints, keys
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.checkpoint import Checkpoint
from persona_broker.audit.core.format import split
from persona_broker.audit.delivery import Delivery
from persona_broker.host.core.readings import Domain, DomainState
from persona_broker.host.core.sample import HostSample
from persona_broker.host.sample_files import SampleFiles
from persona_broker.store.interface import SessionRow
from persona_broker.store.sqlite import SqliteStore

from persona.decisions import Subject
from persona.health import Report
from persona.problems import Reason
from persona.record_codec import Record, encode_record
from persona.version import VERSION
from scripts.completions import COMMANDS, Command, parser_of, read
from tests.some import some

ROOT = Path(__file__).parents[1]
RUN_SOMETHING = {"persona try", "persona-broker serve", "persona-agent run", "persona-host run"}
MODULES = {
    "persona": "persona_guest.shell.cli", "persona-agent": "persona_guest", "persona-broker": "persona_broker",
    "persona-host": "persona_broker.host_command",
}  # fmt: skip
UUID = "6695eb01-f6a4-4304-89aa-97f2502e193f"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def leaves(name: str) -> Iterator[tuple[str, Command]]:
    """Every command that does something, and its parser's words."""
    top = read(parser_of(name))
    if name == "persona-agent":  # its commands are no parsers of their own
        yield from ((f"{name} {word}", top) for word in top.words if not word.startswith("-"))
    else:
        yield from ((name + command.path, command) for command in top.all() if not command.below)


ALL = dict(leaf for name in COMMANDS for leaf in leaves(name))


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / part) for part in ("", "broker", "guest"))
    return subprocess.run(
        [sys.executable, "-m", MODULES[name], *words],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def test_whatever_has_an_answer_has_it_as_json() -> None:
    assert {name for name, command in ALL.items() if "--json" not in command.words} == RUN_SOMETHING - {
        "persona-agent run"  # shares the options of the others
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_each_has_help_that_can_be_shown(name: str) -> None:
    waiting = [parser_of(name)]
    for parser in waiting:
        assert parser.format_help().startswith("usage: persona")
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()


@pytest.mark.parametrize("name", COMMANDS)
def test_each_says_its_version(name: str) -> None:
    done = run(name, "--version")
    assert (done.returncode, done.stdout) == (0, f"{name} {VERSION}\n")


def test_the_packages_are_of_this_version() -> None:
    first = (ROOT / "packaging" / "debian" / "changelog").read_text().partition("\n")[0]
    assert first.startswith(f"persona ({VERSION}) ")
    for page in some((ROOT / "packaging" / "man").iterdir()):
        assert f'"Persona {VERSION.rpartition(".")[0]}"' in page.read_text().partition("\n")[0], page


def test_the_page_names_every_command_once_and_no_other() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    table = page.partition("## --json")[2].partition("\n\n- ")[0]
    named = re.findall(r"^\| `(persona[a-z -]*?)(?: CMD)?` \|", table, re.MULTILINE)
    assert sorted(named) == sorted(set(ALL) - RUN_SOMETHING)
    assert set(re.findall(r"`(persona[a-z-]* [a-z]+)`", table.rpartition("|\n")[2])) == RUN_SOMETHING


def obeys(value: Any, name: str = "") -> None:
    """What the page says of times and names, of all that is in an answer."""
    if isinstance(value, dict):
        assert "guest" not in value, "a VM is 'vm'"
        for key, member in value.items():
            obeys(member, key)
    elif isinstance(value, list):
        for item in value:
            obeys(item)
    elif name == "at" or name.endswith("_at"):
        assert value is None or TIME.fullmatch(value), (name, value)
    elif name.endswith("_s"):
        assert value is None or isinstance(value, int | float), (name, value)


def answer(text: str) -> dict[str, Any]:
    assert text.count("\n") == 1 and text.endswith("\n"), text
    value = json.loads(text)
    assert isinstance(value, dict)
    obeys(value)
    return value


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Path]:
    """A broker's record with something of each kind."""
    from persona_broker.policy.conditions import Sample

    path = tmp_path / "db"
    with closing(SqliteStore(path)) as store:
        store.add_guest("vm-1")
        domains = (Domain(UUID, "one", DomainState.RUNNING), Domain(UUID[:-1] + "0", "two", DomainState.RUNNING))
        store.put_hosts([(HostSample("lab", "qemu:///system", time.time(), {}, time.time(), domains), frozenset())])
        store.open_session(SessionRow("s-1", "vm-1", Subject("alice", (), "vm-1"), "sshd", "", 1e9, revoked=False))
        store.put_sample(Sample(1e9, {"cpu": 5.0}, "set"), frozenset())
        store.put_report("vm-1", Report(), (), 1e9)
        denied = Reason.NO_MATCHING_POLICY
        argv = ("ls", "\n")
    record = Record(1e9, "s", "alice", "/x", argv, "denied", denied, "A", 1, "a", "exec", False, True)
    with closing(Chain(tmp_path / "audit")) as chain:
        chain.deliver([Delivery("vm-1", [split(encode_record(record))])])
    key, _ = keys.load_or_make(tmp_path / "audit.key")
    with closing(SqliteStore(path)) as store:
        checkpoints.put(store, [key.sign(Checkpoint("a" * 32, 9, "b" * 64, 1, 0, ""))])
    yield path


@pytest.mark.long
def test_every_answer_of_the_broker_s_commands(record: Path, tmp_path: Path) -> None:
    examples = str(ROOT / "examples")
    token, tls = str(tmp_path / "token"), str(tmp_path / "tls")
    calls: dict[str, tuple[str, ...]] = {
        "check": (examples,),
        "apply": (examples,),
        "history": (),
        "show": ("DataAnalyst",),
        "export": (),
        "diff": ("1",),
        "rollback": ("1", "--yes"),
        "migrate": (),
        "rollout": (),
        "backup": (str(tmp_path / "backup"),),
        "restore": (str(tmp_path / "backup"), "--yes"),
        "policies list": (),
        "sets list": (),
        "explain": ("--user", "alice", "--vm", "vm-1", "--", "ls"),
        "guest add": ("vm-2", "--token-file", token),
        "guest list": (),
        "guest bind": ("vm-1", "--uuid", UUID),
        "guest unbind": ("vm-1",),
        "coverage": (),
        "guest remove": ("vm-2",),
        "guest readmit": ("--all",),
        "load set": ("cpu=10",),
        "load show": (),
        "health": (),
        "sessions list": (),
        "sessions revoke": ("alice",),
        "records tail": ("--distinct",),
        "audit acknowledge-loss": ("--message", "the disk died", "--yes"),
        "audit verify": (),
        "audit search": ("--event", "exec"),
        "audit tail": ("-n", "1"),
        "audit export": ("--event", "exec"),
        "audit gaps": (),
        "audit key": (),
        "audit hold add": ("--user", "carol"),
        "audit hold list": (),
        "audit hold remove": ("--user", "carol"),
        "audit prune": ("--before", "2001-01-01"),
        "audit erase": ("--user", "alice", "--yes"),
        "tls init": ("--dir", tls, "--host", "b.example"),
    }
    page = (ROOT / "docs" / "cli.md").read_text()
    assert {f"persona-broker {name}" for name in calls} <= set(ALL)
    covered = {name for name in ALL if name.startswith("persona-broker ")} - RUN_SOMETHING
    assert covered == {f"persona-broker {name}" for name in calls}, "a command that is not tried here"
    for name, words in calls.items():
        done = run("persona-broker", "--db", str(record), *name.split(), "--json", *words)
        assert done.returncode in (0, 1), (name, done.stderr)
        value = answer(done.stdout)
        if name == "records tail":
            assert (value["vm"], value["at"], value["count"]) == ("vm-1", "2001-09-09T01:46:40.000Z", 1)
            continue
        if name in ("audit search", "audit tail", "audit export"):
            assert {"number", "received_at", "vm", "record"} <= set(value), name
            continue
        assert value.pop("ok") is True, name
        row = next(line for line in page.splitlines() if line.startswith(f"| `persona-broker {name}` |"))
        if "the same" not in row:
            named = set(re.findall(r"`([a-z_]+)`", row.partition("|")[2].partition("|")[2]))
            inner = value["items"][0] if value.get("items") and isinstance(value["items"][0], dict) else {}
            assert set(value) | set(inner) <= named, name
    text = run("persona-broker", "--db", str(record), "guest", "add", "vm-3", "--json")
    assert set(answer(text.stdout)) == {"ok", "vm", "token"}


@pytest.mark.parametrize(
    ("code", "why", "words"),
    [
        (1, "not_found", ("sessions", "revoke", "nobody", "--json")),
        (1, "conflict", ("guest", "add", "vm-1", "--json")),
        (1, "bad_document", ("apply", "--json", "/dev/null")),
        (3, "not_ready", ("--db", "/nonexistent/db", "records", "tail", "--json")),
    ],
)
def test_a_refusal_of_the_broker_s_commands(record: Path, code: int, why: str, words: tuple[str, ...]) -> None:
    done = run("persona-broker", "--db", str(record), *words)
    value = answer(done.stdout)
    assert (done.returncode, value["ok"], value["code"]) == (code, False, why)
    assert value["message"]
    assert done.stderr == ""


def test_every_answer_of_the_agent_s_commands(tmp_path: Path) -> None:
    config = tmp_path / "guest.toml"
    paths = f'runtime_dir = "{tmp_path}/run"\nstate_dir = "{tmp_path}"\nbpf_dir = ""\ncgroup_root = ""'
    config.write_text(f"[paths]\n{paths}\n")
    right = {
        "check-config": {"ok", "config", "mode", "vm", "notes"},
        "plan": {"ok", "code", "message"},
        "release": {"ok", "code", "message"},
        "load-kernel": {"ok", "loaded", "why_not"},
        "unload-kernel": {"ok", "loaded", "why_not"},
    }
    assert {f"persona-agent {name}" for name in right} == {n for n in ALL if "agent" in n} - RUN_SOMETHING
    for name, members in right.items():
        done = run("persona-agent", "--config", str(config), name, "--json")
        value = answer(done.stdout)
        assert set(value) == members, name
        assert done.returncode == (0 if value["ok"] else 1)
    value = answer(run("persona-agent", "--config", "/nonexistent/guest.toml", "plan", "--json").stdout)
    assert (value["ok"], value["code"]) == (False, "not_found")


@pytest.mark.parametrize("words", [("status",), ("list",), ("denials",), ("greeting",), ("explain", "ls")])
def test_persona_says_so_where_there_is_no_agent(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert f"persona {words[0]}" in ALL
    done = run("persona", words[0], "--json", "--socket", str(tmp_path / "none"), *words[1:])
    value = answer(done.stdout)
    assert (done.returncode, value["ok"], value["code"]) == (3, False, "agent_unreachable")


def test_every_answer_of_persona_host(tmp_path: Path) -> None:
    config = tmp_path / "broker.toml"
    config.write_text(f'[host]\nnames = ["lab"]\ndirectory = "{tmp_path}"\n')
    named = {name for name in ALL if name.startswith("persona-host ")}
    assert named - RUN_SOMETHING == {"persona-host top", "persona-host plan"}
    for code in (1, 0):
        done = run("persona-host", "--config", str(config), "top", "--json")
        (item,) = answer(done.stdout)["items"]
        assert (done.returncode, set(item)) == (
            code, {"host", "at", "load", "domains_at", "domains", "problem"}
        )  # fmt: skip
        SampleFiles(tmp_path).put(HostSample("lab", "qemu:///system", time.time(), {"cpu": 5.0}, time.time(), ()))
    assert item["load"] == {"cpu": 5.0}
    config.write_text("[host]\nuris = [7]\n")
    value = answer(run("persona-host", "--config", str(config), "top", "--json").stdout)
    assert (value["ok"], value["code"], "host.uris" in value["message"]) == (False, "bad_document", True)
