"""Command patterns: the documentation's table, what is refused, and carve-outs."""

import re
import shlex
from pathlib import Path

import pytest

from persona.decisions import Program
from persona.parsing import Bad
from persona.patterns import Whitelist, check_whitelist, is_loader, parse_pattern

TABLE = (Path(__file__).parents[2] / "docs" / "patterns.md").read_text()
ROWS = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (yes|no) \|$", TABLE, re.MULTILINE)


CARVED = re.findall(r"^\| `(!.+?)` \| `(.+?)` \| (yes|no) \|$", TABLE, re.MULTILINE)
ROWS = [row for row in ROWS if row not in CARVED]


def program(name: str) -> Program:
    return Program(f"/usr/bin/{name}", (name,), (f"/usr/bin/{name}",))


def test_the_table_is_there() -> None:
    assert len(ROWS) > 60
    assert len(CARVED) > 10


@pytest.mark.parametrize(("pattern", "command", "answer"), ROWS)
def test_table(pattern: str, command: str, answer: str) -> None:
    argv = tuple(shlex.split(command))
    assert Whitelist((parse_pattern(pattern),)).allows(program(argv[0]), argv) is (answer == "yes")


@pytest.mark.parametrize(("pattern", "command", "answer"), CARVED)
def test_table_of_carve_outs(pattern: str, command: str, answer: str) -> None:
    argv = tuple(shlex.split(command))
    whitelist = Whitelist((parse_pattern(argv[0]), parse_pattern(pattern)))
    assert whitelist.allows(program(argv[0]), argv) is (answer == "no")


@pytest.mark.parametrize(
    "text",
    ["", "  ", "./ls", "bin/ls", "/usr//bin/ls", "/usr/../bin/ls", "/usr/bin/", "l*", "l[s]", "** x", "** **",
     "echo 'a", "echo a\\", "less ../*", "less --file=/srv/../*", "x" * 5000, "a\x00b", "ls\nrm", "!", "a " * 200],
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


LOADERS = [
    Program("/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", ("ld.so",), ("/usr/bin/ld.so",)),
    Program("/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"),
    Program("/usr/lib/x86_64-linux-gnu/ld-2.31.so"),
    Program("/usr/lib/powerpc64le-linux-gnu/ld64.so.2"),
    Program("/usr/lib/ld-musl-x86_64.so.1", (), ("/usr/lib/ld-musl-x86_64.so.1",)),
    Program("/opt/libc/start", ("start",), ("/opt/libc/start",), loader=True),  # as the agent found it, by any name
]


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.path)
@pytest.mark.parametrize("text", ["**", "/usr/bin/*", "/usr/lib/*", "/usr/lib/*/*", "/opt/*/*", "/opt/libc/star?"])
def test_no_wildcard_allows_a_loader(loader: Program, text: str) -> None:
    assert not Whitelist((parse_pattern(text),)).allows(loader, ("x", "/usr/bin/nmap"))


@pytest.mark.parametrize(
    ("loader", "text"),
    [
        (LOADERS[0], "ld.so"),
        (LOADERS[0], "/bin/ld.so **"),
        (LOADERS[4], "/lib/ld-musl-x86_64.so.1"),
        (LOADERS[5], "start"),
    ],
)
def test_its_own_name_allows_a_loader(loader: Program, text: str) -> None:
    assert Whitelist((parse_pattern(text),)).allows(loader, ("x",))


def test_a_carve_out_with_a_wildcard_refuses_a_loader() -> None:
    assert not Whitelist((parse_pattern("ld.so"), parse_pattern("!/usr/bin/ld*"))).allows(LOADERS[0], ("x",))


def test_a_policy_may_be_for_every_program_and_loaders_too() -> None:
    assert Whitelist((parse_pattern("**"),)).speaks_for(LOADERS[0], ("x",))
    assert not Whitelist((parse_pattern("**"), parse_pattern("!ld.so"))).speaks_for(LOADERS[0], ("x",))


@pytest.mark.parametrize("name", ["ld", "ldd", "ldconfig", "ld.bfd", "ld.gold", "ld.so.conf", "sold.so", "ls"])
def test_what_is_no_loader(name: str) -> None:
    assert not is_loader(program(name))


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("~/bin/x", "home_programs"),
        ("$HOME/bin/*", "home_programs"),
        ("./x", "write the absolute path or the bare name"),
        ("/srv/tools/", "write '/srv/tools/*'"),
        ("/srv//tools/", "write it plainly"),
        ("/", "write it plainly"),
        ("/srv/../x", "write it plainly"),
    ],
)
def test_a_path_that_never_matches_is_refused_with_what_is_meant(text: str, fix: str) -> None:
    with pytest.raises(Bad) as refused:
        parse_pattern(text)
    assert fix in refused.value.fix
