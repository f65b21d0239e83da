"""What operators write is read as they meant it, or refused with file, line, field and what to do."""

import json
import os
from pathlib import Path

import pytest
import yaml
from persona_broker.policy_files.reader import Loaded, load

from persona.documents import Persona, Policy
from tests.broker.conftest import ROOT, Broker

GOOD = "{kind: Persona, name: Good, command_whitelist: [ls]}\n"


def loaded(directory: Path, text: str | bytes, name: str = "in.yaml") -> Loaded:
    (directory / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return load([directory / name])


def problems(directory: Path, text: str | bytes, name: str = "in.yaml") -> list[str]:
    return [str(problem).removeprefix(f"{directory}/") for problem in loaded(directory, text, name).problems]


# --- what YAML would change -----------------------------------------------------------------------------


LOST = """\
kind: Persona
name: Dev
command_whitelist:
  - bash
  - git
  - ! git push **
---
kind: Policy
name: devs
subjects: {users: [ann]}
persona: Dev
"""


def test_a_carve_out_that_yaml_takes_for_a_tag_is_refused(cli: Broker, tmp_path: Path) -> None:
    (tmp_path / "in.yaml").write_text(LOST)
    asked = ("explain", "--files", str(tmp_path / "in.yaml"), "--user", "ann", "--vm", "x")
    done = cli.run(*asked, "--", "git", "push", "origin", "main")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{tmp_path}/in.yaml:6: command_whitelist[2]: YAML reads" in done.stderr
    assert 'put it in quotes: "! git push **"' in done.stderr
    done = cli.run("check", str(tmp_path / "in.yaml"))
    assert (done.returncode, done.stdout.count("\n")) == (1, 2)  # and nothing about the policy
    assert cli.run("apply", str(tmp_path / "in.yaml")).returncode == 1


def test_a_tag_is_no_traceback_and_other_files_are_read(cli: Broker, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "in.yaml").write_text(LOST.replace("! git", "!git"))
    (tmp_path / "d" / "good.yaml").write_text(GOOD)
    (tmp_path / "d" / "other.yaml").write_text("{kind: Persona, name: Other, command_whitelist: [./x]}")
    for words in (("check",), ("check", "--json"), ("apply",)):
        done = cli.run(*words, str(tmp_path / "d"))
        assert done.returncode == 1
        said = done.stdout + done.stderr
        assert "Traceback" not in said
        assert "put it in quotes" in said
        assert "other.yaml" in said
        assert "<unicode string>" not in said
    found = json.loads(cli.run("check", "--json", str(tmp_path / "d")).stdout)
    assert [(problem["line"], problem["field"]) for problem in found["problems"]] == [
        (6, "command_whitelist[2]"), (1, "command_whitelist[0]")
    ]  # fmt: skip


IN_A_LIST = [
    "!git push **", "! git push **", "!!str git", "!x", "!<tag:x> y", "!", "!git 'push **'", "!local!x y", '!"git"',
    "&a ls", "*a", "**", "*.py", "!p {a: b}", "!p [a]",
    "yes", "no", "on", "off", "Yes", "NO", "true", "false", "~", "null", "Null", "",
    "0256", "0x10", "0b11", "1_000", "+5", "12:30", "190:20:30", "1.5e+3", ".5", "1.", ".inf", "-.inf", ".nan",
    "2026-01-01", "2026-01-01 10:00:00", "=", "<<", "git\n      - push", "git log\n      --all", "99999999999999999999",
]  # fmt: skip


@pytest.mark.parametrize("item", IN_A_LIST)
def test_what_yaml_would_change_is_refused_with_its_line(tmp_path: Path, item: str) -> None:
    lists = {"command_whitelist": "Persona", "network_access": "Persona", "dependencies": "Persona", "vms": "Policy"}
    for field, kind in lists.items():
        wrong = problems(tmp_path, f"kind: {kind}\nname: A\n{field}:\n    - ls\n    - {item}\n")
        assert any(line.startswith("in.yaml:5: ") for line in wrong), wrong


@pytest.mark.parametrize("item", [item for item in IN_A_LIST if item not in ("", "99999999999999999999")])
def test_in_quotes_it_is_what_is_written(tmp_path: Path, item: str) -> None:
    if "\n" in item or "'" in item or '"' in item or item in ("!", "!x"):
        return
    text = f"kind: Persona\nname: A\ncommand_whitelist: [ls]\ndescription: '{item}'\n"
    (document,) = loaded(tmp_path, text).documents
    assert document.description == item


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("resource_limits: {pids: %s}", "0256", "YAML reads 0256 as the number 174"),
        ("resource_limits: {pids: %s}", "1_000", "YAML reads 1_000 as the number 1000"),
        ("resource_limits: {pids: %s}", "0x10", "YAML reads 0x10 as the number 16"),
        ("resource_limits: {memory: %s}", "0o17", "expected an amount of bytes"),
        ("resource_limits: {memory: %s}", "0777777777777", "as the number 68719476735"),
        ("resource_limits: {cpu: %s}", "010", "YAML reads 010 as the number 8"),
        ("priority: %s", "1:30", "YAML reads 1:30 as the number 90"),
        ("priority: %s", ".inf", "YAML reads .inf as the number inf"),
        ("priority: %s", "99999999999999999999", "a number of too many digits"),
        ("priority: %s", "!!int 5", "as a tag"),
        ("priority: %s", "", "has no value"),
        ("on_revoke: %s", "~", "YAML reads ~ as nothing"),
        ("network_access: %s", "", "has no value"),
        ("network_access: %s", "!x [any]", "as a tag"),
        ("network_access: %s", "*other", "as an alias"),
        ("priority: %s", "&other 5", "as an anchor"),
        ("description: %s", "on", "put it in quotes"),
    ],
)
def test_fields_of_a_persona(tmp_path: Path, field: str, value: str, said: str) -> None:
    (problem,) = problems(tmp_path, f"kind: Persona\nname: A\ncommand_whitelist: [ls]\n{field % value}\n")
    assert problem.startswith("in.yaml:4: ")
    assert said in problem


HIDDEN = ["\u2028", "\u2029", "\x85", "\r", "\u202e", "\u2066", "\ufeff"]


@pytest.mark.parametrize("char", HIDDEN, ids=ascii)
def test_no_entry_hides_in_what_looks_like_a_comment(tmp_path: Path, char: str) -> None:
    """U+2028 and its like end a line, and so a comment, to YAML; a terminal shows one line."""
    text = f'kind: Persona\nname: A\ncommand_whitelist:\n  - ls  # nothing else{char}  - "**"\n'
    found = loaded(tmp_path, text.encode())
    assert found.documents == ()
    (problem,) = found.problems
    assert problem.line == 4
    assert "look other than it is read" in problem.finding.message


def test_lines_may_end_as_windows_ends_them(tmp_path: Path) -> None:
    assert problems(tmp_path, b"kind: Persona\r\nname: A\r\ncommand_whitelist:\r\n- ls\r\n") == []


@pytest.mark.parametrize("quotes", ["\u201c%s\u201d", "\u201e%s\u201c", "\u2018%s\u2019", "\u00ab%s\u00bb"])
def test_quotes_of_word_processors_are_none(tmp_path: Path, quotes: str) -> None:
    text = f"kind: Persona\nname: A\ncommand_whitelist: [git, {quotes % '!git push **'}]\n"
    (problem,) = problems(tmp_path, text)
    assert problem.startswith("in.yaml:3: command_whitelist[1]: ")
    assert "is not a quote to YAML" in problem


def test_values_that_yaml_leaves_alone(tmp_path: Path) -> None:
    text = """\
%YAML 1.2
---
# a comment
kind: Persona
name: A
description: a text
  that goes on
command_whitelist: [7z, "no", 'yes', x:y, git push **, "[", "*", -x, a#b]
resource_limits: {cpu: 1.50, memory: 2GiB, pids: 256}
network_access: [10.0.0.0/8:tcp/5432, any:tcp/443, "2001:db8::/32"]
dependencies: [postgresql-client (>= 15), service:cron]
priority: 0
---
kind: Policy
name: p
subjects: {users: ["no", "on", "null"]}
when: {hours: Mon-Fri 07:00-20:00 Europe/Berlin, host_load: {cpu: {below: 70.5}}}
persona: A
---
"""
    found = loaded(tmp_path, text.replace('"*", ', ""))
    assert [str(problem) for problem in found.problems] == []
    persona, policy = found.documents
    assert isinstance(persona, Persona)
    assert isinstance(policy, Policy)
    assert persona.description == "a text that goes on"
    patterns = [pattern.text for pattern in persona.command_whitelist.patterns]
    assert patterns == ["7z", "no", "yes", "x:y", "git push **", "[", "-x", "a#b"]
    assert policy.users == ("no", "on", "null")
    assert found.count == 2  # nothing after the last '---'


def test_a_list_may_be_named_and_used_again_as_programs_write_it(tmp_path: Path) -> None:
    names = ["a", "b"]
    documents = [
        {"kind": "Policy", "name": "p", "subjects": {"users": names, "groups": names}, "persona": "A"},
        {"kind": "Persona", "name": "A", "command_whitelist": ["ls"]},
    ]
    text = yaml.safe_dump_all(documents)
    assert "*id001" in text
    policy = loaded(tmp_path, text).documents[0]
    assert isinstance(policy, Policy)
    assert (policy.users, policy.groups) == (("a", "b"), ("a", "b"))
    # not in the next document, and not in itself
    assert any("as an alias" in line for line in problems(tmp_path, "a: &a [x]\n---\nkind: Persona\nname: *a\n"))
    assert any(
        "as an alias" in line for line in problems(tmp_path, "kind: Persona\nname: B\nnetwork_access: &a [*a]\n")
    )
    wrong = "kind: Policy\nname: p\nsubjects:\n  users: &a [no]\n  groups: *a\npersona: A\n"
    assert [line[:26] for line in problems(tmp_path, wrong)] == [
        "in.yaml:4: subjects.users[",
        "in.yaml:5: subjects.groups",
    ]


def test_fields_twice_and_names_of_fields_that_are_none(tmp_path: Path) -> None:
    text = "kind: Persona\nname: A\ncommand_whitelist: [ls]\nname: B\n? [x]\n: y\n!t z: 1\n<<: {a: b}\n"
    found = problems(tmp_path, text)
    assert "in.yaml:4: name: is there twice, first in line 2 (remove one)" in found
    assert any("the name of a field must be a word" in line for line in found)
    assert any(line.startswith("in.yaml:7: z: YAML reads") for line in found), found
    assert any(line.startswith("in.yaml:8: <<: unknown field (merge keys") for line in found)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: [\n  x\n", 1, "that began in line 1"),
        ("a: 1\n\tb: 2\n", 2, "indented with spaces"),
        ('a:\n  - "x" y\n', 2, "put the whole value in quotes"),
        ("a:\n  - @x\n", 2, "put the value in quotes"),
        ("a:\n  - `x`\n", 2, "put the value in quotes"),
        ("a:\n  - **\n", 2, 'put it in quotes, like "**"'),
        ('a: "\\d"\n', 1, "single quotes"),
        ('a: "\\U99999999"\n', 1, "cannot be read as YAML"),
        ("a: x: y\n", 1, "is put in quotes"),
        ("a: 1\n  b: 2\n", 2, "each field begins its own line"),
        ("a: 'x\n", 1, "the closing quote is missing"),
        ("%YAML 3.0\n---\na: 1\n", 1, "incompatible"),
        ("a: b\n\x07", 2, "U+0007"),
        ("a: b\n\x00", 2, "U+0000"),
        ("a: b\n---\n\ufeffkind: Persona\n", 3, "U+FEFF"),
        ("a: b\n# \u202e\n", 2, "U+202E"),
        (b"a: b\nc: \xff\n", 2, "0xff is not UTF-8"),
        ("[" * 500, 1, "nested too deeply"),
        ("- " * 500 + "x", 1, "nested too deeply"),
        ("a: " + "{b: " * 500, 1, "nested too deeply"),
        ("[" + "a," * 150_000 + "]", 1, "too many values"),
    ],
)
def test_text_that_cannot_be_read_is_named_with_its_line(
    tmp_path: Path, text: str | bytes, line: int, said: str
) -> None:
    found = problems(tmp_path, text)
    assert [problem for problem in found if said in problem], found
    assert any(f"in.yaml:{line}: " in problem or "began in line" in problem for problem in found), found


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    (problem,) = problems(tmp_path, GOOD.encode(encoding))
    assert problem == "in.yaml: is not UTF-8 but UTF-16 or UTF-32: save it as UTF-8"


@pytest.mark.parametrize("name", ["in.yaml", "in.json"])
def test_a_byte_order_mark_at_the_beginning_is_none_of_the_text(tmp_path: Path, name: str) -> None:
    text = '{"kind": "Persona", "name": "Good", "command_whitelist": ["ls"]}'
    assert problems(tmp_path, b"\xef\xbb\xbf" + text.encode(), name) == []


def test_the_case_of_small_things(cli: Broker, tmp_path: Path) -> None:
    (tmp_path / "in.yaml").write_text(
        'kind: Persona\nname: S\ncommand_whitelist: [ls, "["]\nnetwork_access: ["fe80::2%eth7:tcp/22"]\n'
        'dependencies: ["service:ssh.socket"]\nresource_limits: {pids: 0256}\n'
    )
    done = cli.run("check", str(tmp_path / "in.yaml"))
    assert [line.partition("in.yaml:")[2].partition(":")[0] for line in done.stdout.splitlines()] == ["4", "5", "6", ""]
    assert "an address in a rule is for every interface" in done.stdout
    assert "can never be active" in done.stdout
    assert "YAML reads 0256 as the number 174" in done.stdout


# --- JSON -----------------------------------------------------------------------------------------------


def test_json_may_have_tabs(cli: Broker, tmp_path: Path) -> None:
    text = '{\n\t"kind": "Persona",\n\t"name": "Temp",\n\t"command_whitelist": ["ls"]\n}\n'
    (tmp_path / "in.json").write_text(text)
    done = cli.run("check", str(tmp_path / "in.json"))
    assert (done.returncode, done.stdout) == (0, "1 document, no problems\n")


def test_json_of_several_documents_with_the_lines_of_fields(tmp_path: Path) -> None:
    text = '[\n{"kind": "Persona", "name": "A", "command_whitelist": ["ls"]},\n{"kind": "Persona",\n"name": "B",\n'
    text += '"x": 1,\n"command_whitelist": [\n"ls",\n"./x", null, 5]}]'
    found = loaded(tmp_path, text, "in.json")
    assert [document.name for document in found.documents] == ["A"]
    assert [(item.line, item.finding.path) for item in found.problems] == [
        (5, "x"), (8, "command_whitelist[1]"), (8, "command_whitelist[2]"), (8, "command_whitelist[3]")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('{"a": 1,\n"a": 2}', 2, "is there twice, first in line 1"),
        ('{"a":\nNaN}', 2, "NaN is not a value of JSON"),
        ('{"a": -Infinity}', 1, "-Infinity is not a value of JSON"),
        ('{"a": 1e999}', 1, "1e999 is not a value of JSON"),
        ('{"a": 0256}', 1, "0256 is not a value of JSON"),
        ('{"a": "x",\n}', 2, "a comma after the last value"),
        ("// x\n{}", 1, "JSON has no comments"),
        ("{\na: 1}", 2, "double quotes"),
        ("{'a': 1}", 1, "double quotes"),
        ('{"a": "x\ny"}', 1, "Invalid control character"),
        ('{"a": "\\x"}', 1, "escape"),
        ('{"a": "x', 1, "Unterminated"),
        ("{}\n{}", 2, "several documents are a list"),
        ("kind: Persona\n", 1, "not a value of JSON"),
        ("[" * 100_000, 1, "nested too deeply"),
        ('{"a":' * 100_000, 1, "nested too deeply"),
        ("[[" + "1," * 150_000 + "1]]", 1, "too many values"),
        ("9" * 5000, 1, "too"),
        ('{"kind": "Persona", "name": "A", "command_whitelist": [],\n"priority": null}', 2, "null is not a value here"),
        ('{"kind": "Persona", "name": "A", "command_whitelist": [],\n"priority": true}', 2, "true is not a value here"),
    ],
)
def test_json_is_read_strictly(tmp_path: Path, text: str, line: int, said: str) -> None:
    found = problems(tmp_path, text, "in.json")
    assert any(problem.startswith(f"in.json:{line}: ") and said in problem for problem in found) or said == "too", found
    assert found


# --- a problem is said once -----------------------------------------------------------------------------

POLICY = "---\n{kind: Policy, name: p, subjects: {users: [a]}, persona: A}\n"


@pytest.mark.parametrize(
    "persona",
    [
        "{kind: Persona, name: A, command_whitelist: [./x]}\n",
        "{kind: persona, name: A, command_whitelist: [x]}\n",
        "{kind: Persona, name: no, command_whitelist: [x]}\n",
        "{kind: Persona, nam: A, command_whitelist: [x]}\n",
        "!x {kind: Persona, name: A, command_whitelist: [x]}\n",
    ],
)
def test_a_persona_that_is_refused_is_no_problem_of_its_policy(tmp_path: Path, persona: str) -> None:
    assert not [problem for problem in problems(tmp_path, persona + POLICY) if "there is no persona" in problem]


def test_a_file_that_cannot_be_read_is_no_problem_of_policies_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("kind: Persona\nname: A\ncommand_whitelist: [\n")
    (tmp_path / "b.yaml").write_text(POLICY)
    (problem,) = load([tmp_path]).problems
    assert problem.file == f"{tmp_path}/a.yaml"
    (problem,) = load([tmp_path / "absent.yaml", tmp_path / "b.yaml"]).problems
    assert "No such file" in str(problem)


def test_a_persona_that_nobody_wrote_is(tmp_path: Path) -> None:
    other = (
        "{kind: Persona, name: B, command_whitelist: [./x]}\n---\n{kind: Persona, name: Aa, command_whitelist: []}\n"
    )
    found = problems(tmp_path, other + POLICY)
    assert [problem for problem in found if "there is no persona 'A'" in problem]


# --- what is printed ------------------------------------------------------------------------------------


def test_names_from_files_do_nothing_to_the_terminal(cli: Broker, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "\x1b[31mred.yaml").write_text('"\\e[2J": 1\nkind: Persona\nname: "\\ud800"\n')
    with open(os.fsencode(folder) + b"/\xff.yaml", "w") as file:
        file.write('kind: "\\x07"\n')
    done = cli.run("check", str(folder))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert all(char.isprintable() for char in done.stdout.replace("\n", ""))
    assert done.stdout.splitlines()[-1].startswith("2 documents, ")


def test_thousands_of_problems_are_counted_not_listed(tmp_path: Path) -> None:
    found = loaded(tmp_path, "".join(f"kind: x{index}\n---\n" for index in range(2000)))
    assert len(found.problems) == 501
    assert "and 1500 more problems" in str(found.problems[-1])


def test_the_examples_have_nothing_to_refuse_or_skip() -> None:
    found = load([ROOT / "examples"])
    assert (found.problems, found.skipped) == ((), ())
