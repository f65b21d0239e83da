"""``check --upgrade``: it names every entry that means another thing than to 0.1, and says so by its exit code."""

import json
import shlex
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from persona_broker.policy.upgrade import compare

from persona.decisions import Program
from persona.parsing import Bad
from persona.patterns import parse_pattern
from tests.broker import patterns_0_1
from tests.broker.conftest import Broker

TOOL = Program("/usr/bin/tool", ("tool",), ("/usr/bin/tool",))
PROGRAMS = (
    TOOL,
    *(Program(path, (), (path,)) for path in ("/usr/bin/[t]ool", "/usr/bin/*", "/opt/x/tool", "/usr/bin/t")),
)


def changed(*patterns: str, kind: str = "Persona") -> list[str]:
    field = {"Persona": "command_whitelist", "Policy": "commands"}[kind]
    return [item.pattern for item in compare(kind, {field: list(patterns)}).differences]


@pytest.mark.parametrize(
    "pattern",
    [r"kill -9 \*", "kill '*'", 'kill "[0-9]"', "less /var/log/*", "less --file=/var/log/*", "grep x /a/?",
     "cat a/[bc]",
     "!cat /etc/shadow", "!cat /etc/* **", "ls [^a]", "cat ../*", r"/opt/\*", "/usr/bin/[a-c]x", "less /a/** **",
     "!marked */wrong-*", "tool ***", "!tool ****", r"tool [\!]", r"tool [\!a]"],
)  # fmt: skip
def test_what_changed(pattern: str) -> None:
    (found,) = compare("Persona", {"command_whitelist": ["ls", pattern]}).differences
    assert (found.field, found.pattern) == ("command_whitelist[1]", pattern)
    assert found.old != found.new
    assert changed(pattern, kind="Policy") == [pattern]


@pytest.mark.parametrize(
    "pattern",
    ["ls", "**", "git **", "git log *", "git log --oneline", "cat /etc/passwd", "/usr/bin/*", "/usr/lib/git-core/*",
     "ls *.txt", "!nmap", "!git push **", "!git log --all", "systemctl status *", "psql -h *.internal **",
     "kill -[0-9] *", "ls [!a]", "echo 'a b'", "less ../x", "!/usr/bin/v*", "ls a[b"],
)  # fmt: skip
def test_what_did_not(pattern: str) -> None:
    assert changed(pattern) == []


TEXTS = st.text("ab*?[]!^/.\\'- ", max_size=8)
PATTERNS = st.tuples(
    st.sampled_from(
        ["tool ", "!tool ", "/usr/bin/tool ", "/usr/bin/* ", "/usr/bin/[t]ool ", r"/usr/bin/\* ", "!/usr/bin/t* "]
    ),
    TEXTS,
    st.sampled_from(["", " **", " *"]),
).map("".join)


@settings(max_examples=500, deadline=None)
@given(PATTERNS, st.lists(st.text("ab/.*[]^-", max_size=4), max_size=3), st.data())
def test_what_is_not_named_means_the_same(text: str, arguments: list[str], data: st.DataObject) -> None:
    try:
        old = patterns_0_1.parse_pattern(text)
    except Bad:
        return  # it could not be stored
    if changed(text):
        return
    new = parse_pattern(text)
    shared = shlex.split(text.strip().removeprefix("!"))[1:]
    for given_ in (arguments, shared, [*shared, "x"], data.draw(st.permutations([*shared, *arguments]))):
        for program in PROGRAMS:
            argv = ("tool", *given_)
            assert new.matches(program, argv) is old.matches(program, argv), (program.path, argv)


@pytest.mark.parametrize("body", [None, 1, [], {}, {"command_whitelist": 1}, {"command_whitelist": [None, 1, "'", ""]}])
def test_what_is_no_document_changes_nothing(body: object) -> None:
    assert compare("Persona", body).differences == ()
    assert compare("Set", body).differences == ()


DOCUMENTS = """\
kind: Persona
name: Reader
command_whitelist: [ls, "less /var/log/*", vim]
---
kind: Persona
name: Same
command_whitelist: [ls, "ls *.txt"]
---
kind: Policy
name: readers
subjects: {users: [ann]}
commands: ["**", "!cat /etc/shadow"]
persona: Reader
"""


def test_check_upgrade(cli: Broker, tmp_path: Path) -> None:
    file = tmp_path / "documents.yaml"
    file.write_text(DOCUMENTS)
    assert cli.run("apply", str(file)).returncode == 0
    done = cli.run("check", "--upgrade")
    assert (done.returncode, done.stderr) == (1, "")
    first, note, second, last = done.stdout.splitlines()
    assert first.startswith("Persona Reader: command_whitelist[1]: 'less /var/log/*': so far, ")
    assert "'..' is never matched" in first
    assert note.startswith("Persona Reader: note: command_whitelist[2]: 'vim': so far, it allows vi, view, ")
    assert second.startswith("Policy readers: commands[1]: '!cat /etc/shadow': so far, ")
    assert last == "2 of 3 documents mean another thing than to version 0.1 (docs/patterns.md)"
    value = json.loads(cli.run("check", "--upgrade", "--json").stdout)
    assert value["documents"] == 3
    assert [
        (item["kind"], item["name"], item["version"], item["field"], item["pattern"]) for item in value["changed"]
    ] == [
        ("Persona", "Reader", 1, "command_whitelist[1]", "less /var/log/*"),
        ("Policy", "readers", 1, "commands[1]", "!cat /etc/shadow"),
    ]
    assert all(item["old"] and item["new"] for item in value["changed"])
    assert [item["pattern"] for item in value["notes"]] == ["vim"]
    assert cli.run("check", "--upgrade", str(file)).stdout == done.stdout
    assert cli.run("check", "--upgrade", str(file)).returncode == 1


def test_nothing_that_changes_is_0(cli: Broker, tmp_path: Path) -> None:
    file = tmp_path / "documents.yaml"
    file.write_text("kind: Persona\nname: Same\ncommand_whitelist: [ls]\n")
    assert cli.run("apply", str(file)).returncode == 0
    done = cli.run("check", "--upgrade")
    assert (done.returncode, done.stdout) == (
        0,
        "none of 1 document mean another thing than to version 0.1 (docs/patterns.md)\n",
    )


def test_what_is_refused_now_is_named_too(cli: Broker, tmp_path: Path) -> None:
    """A document as 0.1 stored it, which this version cannot read any more."""
    file = tmp_path / "documents.yaml"
    file.write_text("kind: Persona\nname: Up\ncommand_whitelist: [ls]\n")
    assert cli.run("apply", str(file)).returncode == 0
    with closing(sqlite3.connect(cli.directory / "db", isolation_level=None)) as record:
        record.execute("UPDATE documents SET body = replace(body, 'ls', 'cat ../*')")
    done = cli.run("check", "--upgrade")
    assert done.returncode == 1
    assert "Persona Up: command_whitelist[0]: 'cat ../*': so far, it is read; from now on, it is refused" in done.stdout
    other = '{"kind": "Persona", "name": "Up", "command_whitelist": ["ls"], "network_access": ["fe80::2%eth7:tcp/22"]}'
    with closing(sqlite3.connect(cli.directory / "db", isolation_level=None)) as record:
        record.execute("UPDATE documents SET body = ?", (other,))
    done = cli.run("check", "--upgrade")
    assert done.returncode == 1
    assert "Persona Up: network_access[0]: so far, it is read; from now on, it is refused (" in done.stdout
    with closing(sqlite3.connect(cli.directory / "db", isolation_level=None)) as record:
        record.execute("UPDATE documents SET body = '{'")
    assert cli.run("check", "--upgrade").returncode == 0  # what cannot be read at all is told by 'check'
    assert cli.run("check").returncode == 1
