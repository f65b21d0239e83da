"""Programs in a home: what a pattern means, what is refused, and that nothing else of a persona allows them."""

import time
from typing import Any

import pytest

from persona import codec, json_fields
from persona.canonical import to_mapping
from persona.decisions import Program
from persona.documents import Persona, parse_document
from persona.home_programs import parse_home_program
from persona.parsing import Bad, DocumentError

NODE = ".vscode-server/cli/servers/Stable-1/server/node"


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        (".vscode-server/**/node", NODE, True),
        (".vscode-server/**/node", ".vscode-server/node", True),
        (".vscode-server/**/node", ".vscode-server/bin/node/x", False),
        (".vscode-server/**/node", ".vscode-server/bin/nodes", False),
        (".vscode-server/**/node", "x/.vscode-server/bin/node", False),
        (".vscode-server/*/node", NODE, False),
        (".vscode-server/*/node", ".vscode-server/bin/node", True),
        ("bin/tool", "bin/tool", True),
        ("bin/tool", "bin/tool/x", False),
        ("bin/tool", "tool", False),
        ("bin/*", "bin/a", True),
        ("bin/*", "bin/a/b", False),
        ("bin/**", "bin/a/b", True),
        ("bin/**", "bin", False),
        ("**", "a/b/c", True),
        ("**/jbr/bin/java", ".cache/JetBrains/x/jbr/bin/java", True),
        ("**/a/**/b", "a/b", True),
        ("**/a/**/b", "x/a/y/b/z/b", True),
        ("**/a/**/b", "x/y/b", False),
        ("t?ol", "tool", True),
        ("t?ol", "t/ol", False),
        ("a*b*c", "abxbyc", True),
        ("a*b*c", "abxbyd", False),
        ("*", "*", True),
    ],
)
def test_what_a_pattern_means(pattern: str, path: str, fits: bool) -> None:
    assert parse_home_program(pattern).matches(path) is fits


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("/home/alice/bin/x", "leave out"), ("~/bin/x", "leave out"), ("$HOME/x", "leave out"), ("", "like"),
        (7, "like"), ("bin/../x", "plainly"), ("./x", "plainly"), ("bin//x", "plainly"), ("bin/", "plainly"),
        ("a**/x", "directory of its own"), ("x[12]", "wildcards"), ("!x", "wildcards"), ("'x'", "wildcards"),
        ("a\\*", "wildcards"), ("x\n", "printable"), (" x", "printable"), ("x" * 2000, "printable"),
    ],
)  # fmt: skip
def test_what_is_refused_says_what_to_do(value: object, hint: str) -> None:
    with pytest.raises(Bad) as found:
        parse_home_program(value)
    assert hint in f"{found.value.message} {found.value.fix}"


def test_no_path_takes_long_to_match() -> None:
    pattern = parse_home_program("/".join(["**", "a*a*a*b"] * 60))
    began = time.process_time()
    assert not pattern.matches("/".join(["a" * 30] * 120))
    assert time.process_time() - began < 2


def document(**fields: Any) -> Persona:
    found = parse_document({"kind": "Persona", "name": "A", "command_whitelist": ["**"], **fields})
    assert isinstance(found, Persona)
    return found


def test_a_document_is_read_and_written() -> None:
    found = document(home_programs=[".vscode-server/**/node", "bin/x"])
    assert to_mapping(found)["home_programs"] == [".vscode-server/**/node", "bin/x"]
    assert parse_document(to_mapping(found)) == found
    assert "home_programs" not in to_mapping(document())
    with pytest.raises(DocumentError, match=r"home_programs\[1\].*there twice"):
        document(home_programs=["x", "x"])
    with pytest.raises(DocumentError, match=r"home_programs\[0\].*leave out"):
        document(home_programs=["~/x"])


def program(home: str = NODE, **fields: Any) -> Program:
    return Program(f"/home/alice/{home}", (), (f"/home/alice/{home}",), home=home, **fields)


def test_only_home_programs_allows_a_program_in_a_home() -> None:
    listed = document(home_programs=[".vscode-server/**/node"], command_whitelist=[])
    assert listed.allows(program(), ("node", "--any", "thing"))
    assert not listed.allows(program("bin/node"), ("node",))
    assert not listed.allows(Program("/usr/bin/node", ("node",), ("/usr/bin/node",)), ("node",))
    wide = document(command_whitelist=["**", "/home/alice/*"])
    assert not wide.allows(program(), ("node",))
    assert not wide.allows(program("x"), ("x",))


def test_a_loader_is_never_one() -> None:
    everything = document(home_programs=["**"])
    assert everything.allows(program(), ("node",))
    assert not everything.allows(program(loader=True), ("node",))
    assert not everything.allows(program("lib/ld-linux-x86-64.so.2"), ("ld.so", "x"))


def test_it_travels_and_is_said_only_of_programs_in_a_home() -> None:
    assert codec.decode_program(codec.encode_program(program())) == program()
    plain = codec.encode_program(Program("/usr/bin/ls"))
    assert "home" not in plain  # which an older broker would refuse
    for home in ("../bin/ls", "/ls", "bin//ls", "other", "./ls"):
        with pytest.raises(json_fields.CodecError, match=r"program\.home"):
            codec.decode_program({**plain, "home": home})
    with pytest.raises(json_fields.CodecError, match=r"program\.home"):
        codec.decode_program({**plain, "home": 1})
