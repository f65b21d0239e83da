"""Command patterns: the documentation's table, what is refused, and carve-outs."""

import re
import shlex
from pathlib import Path

import pytest

from persona.decisions import Program
from persona.parsing import Bad
from persona.patterns import Whitelist, check_whitelist, parse_pattern

TABLE = (Path(__file__).parents[2] / "docs" / "patterns.md").read_text()
ROWS = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (yes|no) \|$", TABLE, re.MULTILINE)


def program(name: str) -> Program:
    return Program(f"/usr/bin/{name}", (name,), (f"/usr/bin/{name}",))


def test_the_table_is_there() -> None:
    assert len(ROWS) > 20


@pytest.mark.parametrize(("pattern", "command", "answer"), ROWS)
def test_table(pattern: str, command: str, answer: str) -> None:
    argv = tuple(shlex.split(command))
    assert parse_pattern(pattern).matches(program(argv[0]), argv) is (answer == "yes")


@pytest.mark.parametrize(
    "text",
    ["", "  ", "./ls", "bin/ls", "/usr//bin/ls", "/usr/../bin/ls", "/usr/bin/", "l*", "git ** log", "** x",
     "echo 'a", "/usr/**", "x" * 5000, "a\x00b", "ls\nrm", "!", "a " * 200],
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(Bad):
        parse_pattern(text)


def test_carve_out_wins() -> None:
    whitelist = Whitelist(tuple(map(parse_pattern, ["**", "!nmap", "git", "!git push **"])))
    assert whitelist.allows(program("ls"), ("ls",))
    assert not whitelist.allows(program("nmap"), ("nmap", "host"))
    assert whitelist.allows(program("git"), ("git", "log"))
    assert not whitelist.allows(program("git"), ("git", "push", "origin"))


def test_incomplete_command_lines_are_never_let_through_by_arguments() -> None:
    allow = Whitelist((parse_pattern("git log **"),))
    deny = Whitelist(tuple(map(parse_pattern, ["git", "!git push **"])))
    assert not allow.allows(program("git"), ("git", "log"), complete=False)
    assert not deny.allows(program("git"), ("git", "log"), complete=False)
    assert Whitelist((parse_pattern("git"),)).allows(program("git"), ("git",), complete=False)


def test_a_name_that_the_multi_call_file_was_not_called_by_matches_nothing() -> None:
    called_otherwise = Program("/usr/bin/busybox", (), ())
    assert not parse_pattern("busybox").matches(called_otherwise, ("nmap",))
    assert not parse_pattern("/usr/bin/busybox").matches(called_otherwise, ("nmap",))


@pytest.mark.parametrize(
    ("patterns", "count"),
    [(["ls", "ls"], 1), (["git log", "!git"], 1), (["!nmap"], 1), (["**", "!nmap"], 0), (["git", "!git push **"], 0)],
)
def test_pointless_patterns(patterns: list[str], count: int) -> None:
    assert len(check_whitelist(tuple(map(parse_pattern, patterns)))) == count
