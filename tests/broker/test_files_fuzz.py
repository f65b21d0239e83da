"""Whatever a file holds, reading it ends soon, raises nothing and says what is wrong in printable words."""

import contextlib
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from persona_broker.policy_files.json_text import read_json
from persona_broker.policy_files.raw import Raw, TextError
from persona_broker.policy_files.reader import Loaded, load
from persona_broker.policy_files.yaml_text import read_yaml

from persona.parsing import Unread
from tests.broker.conftest import ROOT, Broker

QUICK = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TOKENS = [
    "kind: Persona", "kind: Policy", "name: A", "command_whitelist:", "- ", "  - ", "[", "]", "{", "}", ", ", ": ",
    "? ", "\n", "\n  ", "\t", "---\n", "...\n", "%YAML 1.1\n", "%TAG ! x\n", "!", "!!str ", "!x ", "!<y> ", "&a ",
    "*a ", "**", "|", ">", "|-\n", "'", '"', "\\", "\\x41", '"\\ud800"', '"\\U0011ffff"', "#", " # c", "~", "null",
    "no", "0256", "1:30", ".inf", "9" * 50, "9" * 5000, "-", "<<", "=", "2026-01-01", "@", "`", "\u0663", "\u2028",
    "\ufeff", "\x00", "\x85", "subjects: {users: [a]}", "persona: A", "resource_limits: {pids: 1}",
    "network_access: [any]", "\u00e9", "\U0001f600",
]  # fmt: skip
JSON_TOKENS = [
    "{", "}", "[", "]", ",", ":", '"kind"', '"Persona"', '"name"', '"A"', '"\\ud800"', '"\\', '"', "1", "-", "1e999",
    "NaN", "null", "true", "//", "'", "\n", "\t", "\x00", "0256", "9" * 5000, '"command_whitelist"', '["ls"]', "\u2028",
]  # fmt: skip
BYTES = [
    b"\xff",
    b"\xfe\xff",
    b"\xff\xfe",
    b"\x00",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\xf4\x90\x80\x80",
    b"\r",
]


def read(directory: Path, data: bytes, name: str) -> Loaded:
    (directory / name).write_bytes(data)
    begun = time.process_time()  # whatever else the machine does
    found = load([directory / name])
    assert time.process_time() - begun < 10
    for said in (*found.problems, *found.warnings, *found.skipped):
        assert str(said).isprintable()
        assert len(str(said)) < 5000
    for problem in found.problems:
        assert problem.file == f"{directory}/{name}"
        json.dumps([problem.line, problem.finding.path, problem.finding.message, problem.finding.fix]).encode()
    return found


def data(tokens: list[str]) -> st.SearchStrategy[bytes]:
    """Pieces of documents in any order, with bytes that are no text now and then."""
    piece = st.sampled_from(tokens).map(str.encode) | st.sampled_from(BYTES) | st.binary(max_size=4)
    return st.lists(st.sampled_from(tokens).map(str.encode) | piece, max_size=40).map(b"".join)


@QUICK
@given(data(TOKENS))
def test_pieces_of_yaml(tmp_path: Path, text: bytes) -> None:
    read(tmp_path, text, "in.yaml")


@QUICK
@given(data(JSON_TOKENS))
def test_pieces_of_json(tmp_path: Path, text: bytes) -> None:
    read(tmp_path, text, "in.json")


@QUICK
@given(st.binary(max_size=200))
def test_bytes(tmp_path: Path, text: bytes) -> None:
    read(tmp_path, text, "in.yaml")
    read(tmp_path, text, "in.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(TOKENS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ["kind", "name", "command_whitelist", "resource_limits", "network_access", "dependencies", "subjects", "when",
          "vms", "commands", "persona", "priority", "description", "on_revoke", "memory", "users"]  # fmt: skip


@QUICK
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES), st.sampled_from(["Persona", "Policy"]))
def test_any_value_in_any_field(tmp_path: Path, fields: dict[str, Any], kind: str) -> None:
    document = {"kind": kind, **fields}
    read(tmp_path, json.dumps(document).encode(), "in.json")
    with contextlib.suppress(yaml.YAMLError):
        read(tmp_path, yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass"), "in.yaml")


def test_documents_with_a_few_characters_changed(tmp_path: Path) -> None:
    chance = random.Random(13)  # noqa: S311  # the same each time
    originals = [file.read_bytes() for file in sorted((ROOT / "examples").rglob("*.yaml"))]
    for _ in range(80):
        text = bytearray(chance.choice(originals)[:1500])
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(text))
            piece = chance.choice([*map(str.encode, TOKENS), *BYTES])
            text[at : at + chance.choice([0, 0, 1, 5])] = piece[:20]
        read(tmp_path, bytes(text), "in.yaml")


# --- a value that is taken is the text that stands there --------------------------------------------------


def plain(value: object) -> bool:
    """Whether nothing in a value was refused."""
    if isinstance(value, dict):
        return all(map(plain, value.values()))
    if isinstance(value, list):
        return all(map(plain, value))
    return not isinstance(value, Unread)


@QUICK
@given(st.text("!*&|>~-:?#[]{},'\"\\%@`=<.0123456789eE_+xobnoyesffTrueNull \u00e9", min_size=1, max_size=12))
def test_a_word_without_quotes_is_itself_or_refused(text: str) -> None:
    """Of an entry of a list nothing is lost but the white space about it, and a comment."""
    assert [document.value for document in read_yaml("- word\n")] == [["word"]]  # what is gone over below is there
    try:
        documents = read_yaml(f"- {text}\n")
    except TextError:
        return
    for document in documents:
        if document.findings or not plain(document.value) or not isinstance(document.value, list):
            continue
        for item in document.value:
            if isinstance(item, str):
                quoted = text.strip().startswith(("'", '"', "|", ">"))
                assert quoted or item == text.partition(" #")[0].strip()
            elif isinstance(item, (int, float)):
                assert type(item)(text.partition(" #")[0].strip()) == item


@QUICK
@given(VALUES)
def test_json_is_read_as_it_was_written(value: object) -> None:
    def right(read: object, written: object) -> bool:
        if isinstance(written, dict):
            return isinstance(read, dict) and all(right(read[key], item) for key, item in written.items())
        if isinstance(written, list):
            return isinstance(read, list) and all(map(right, read, written)) and len(read) == len(written)
        if written is None or isinstance(written, bool):
            return isinstance(read, Unread)
        return isinstance(read, Unread) or (type(read) is type(written) and read == written)

    text = json.dumps({"x": value})
    if any(word in text for word in ("NaN", "Infinity")):
        return
    try:
        (document,) = read_json(text)
    except TextError:
        assert "e" in text or len(text) > 60  # a number of too many digits, or too deep
        return
    assert isinstance(document, Raw)
    assert right(document.value, {"x": value})


# --- large and deep ---------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20)
)
LARGE = {
    "billion laughs": LAUGHS,
    "a chain": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [[[[[[[[*a{i - 1}]]]]]]]]\n" for i in range(1, 200)),
    "itself": "&a [*a, *a]",
    "deep lists": "[" * 50_000,
    "deep mappings": "{a: " * 250_000,
    "deep dashes": "- " * 50_000,
    "deep questions": "? " * 50_000,
    "deep lines": "\n".join(" " * i + "a:" for i in range(1500)),
    "one word": "x" * 150_000,
    "one line": "a: " + "x " * 50_000,
    "many lines": "a: " + "x\n " * 250_000,
    "many quoted lines": 'a: "' + "x\n\n " * 150_000,
    "line breaks": "\n" * 150_000,
    "comments": "# x\n" * 250_000,
    "documents": "---\n" * 50_000,
    "commas": "[" + "," * 50_000,
    "values": "[" + "a," * 60_000,
    "fields": "".join(f"f{i}: x\n" for i in range(15_000)),
    "one field": "a: x\n" * 15_000,
    "digits": "a: " + "9" * 50_000,
    "colons": "a: 1" + ":1" * 250_000,
    "escapes": 'a: "' + "\\x41" * 150_000 + '"',
    "anchors": "- &" + "a" * 50_000,
    "tags": "- !" + "a" * 50_000,
    "directives": "%A\n" * 100_000,
    "block": "a: |\n" + " x\n" * 250_000,
    "spaces": "a:" + " " * 150_000 + "b",
    "unknown": "kind: Persona\n" + "".join(f"f{i}: x\n" for i in range(8_000)),
    "a long key": "kind: Persona\n? " + "k" * 50_000 + "\n: 1\n",
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_large_or_deep_ends_soon(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, LARGE[name].encode(), "in.yaml").documents == ()
    read(tmp_path, LARGE[name].encode(), "in.json")


def test_thousands_of_documents_with_problems_end_soon(tmp_path: Path) -> None:
    text = "".join(f"{{kind: Persona, name: Nam-A{i}, command_whitelist: []}}\n---\n" for i in range(2000))
    text += "".join(
        f"{{kind: Policy, name: p{i}, subjects: {{users: [a]}}, persona: Name-A{i}}}\n---\n" for i in range(2000)
    )
    found = read(tmp_path, text.encode(), "in.yaml")
    assert found.count == 4000
    assert "did you mean" in str(found.problems[0])


def test_no_command_prints_a_traceback(cli: Broker, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for index, text in enumerate(
        (LAUGHS, "a: !x [", '"\\ud800": "\\U00110000"', "- " * 100, "kind: &a\n", "\x00", "\ufeff\ufeff")
    ):
        (folder / f"{index}.yaml").write_text(text)
    (folder / "bytes.json").write_bytes(bytes(range(256)))
    (folder / "good.yaml").write_text("{kind: Persona, name: Good, command_whitelist: [./x]}")
    for words in (
        ("check", str(folder)),
        ("check", "--json", str(folder)),
        ("apply", str(folder)),
        ("apply", "--dry-run", str(folder)),
        ("explain", "--files", str(folder), "--user", "a", "--vm", "v", "--", "ls"),
        ("serve", "--bind", f"unix:{tmp_path}/a", "--events-bind", f"unix:{tmp_path}/e", "--apply", str(folder)),
    ):
        done = cli.run(*words)
        assert done.returncode == 1, words
        assert "Traceback" not in done.stdout + done.stderr
        for name in ("0.yaml", "1.yaml", "bytes.json", "good.yaml"):
            assert name in done.stdout + done.stderr, words
