"""Warnings about whitelists: what they say, about which entries, and that they refuse nothing."""

import json
import re
from pathlib import Path

import pytest
from persona_broker.policy.cautions import Gap, cautions
from persona_broker.policy.misread import Misread
from persona_broker.policy_files.reader import load

from persona.documents import Persona, parse_document
from persona.program_facts import BUILTINS, Kind
from tests.broker.conftest import ROOT, Broker

FENCED = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)

SET = """\
kind: Persona
name: A
command_whitelist:
  - ls
  - vim
  - cat
  - valgrind
  - "grep *"
  - tar
  - /usr/bin/*
"""


def found(*patterns: str) -> dict[tuple[str, ...], tuple[Kind | Gap | Misread, ...]]:
    persona = parse_document({"kind": "Persona", "name": "A", "command_whitelist": list(patterns)})
    assert isinstance(persona, Persona)
    return {tuple(text for _, text in caution.entries): caution.kinds for caution in cautions(persona)}


def test_entries_that_allow_the_same_share_a_warning() -> None:
    assert found("cat", "vim", "ls", "grep", "/usr/bin/python3.11", "ld.so", "tar") == {
        ("cat", "grep"): (Kind.READS,),
        ("vim", "/usr/bin/python3.11"): (Kind.CODE,),
        ("ld.so",): (Kind.LOADS,),
        ("tar",): (Kind.STARTS, Kind.WRITES, Kind.READS),
    }


@pytest.mark.parametrize("pattern", ["ls", "python3 /opt/report.py", "find /tmp", "tar -tf /srv/x.tar", "/opt/x/*"])
def test_nothing_is_said_of(pattern: str) -> None:
    assert found(pattern) == {}


@pytest.mark.parametrize(
    "pattern", ["python3 **", "python3 /opt/*", "find /tmp **", "less /var/log/syslog", "gdb --args x", "bash -l"]
)
def test_arguments_count_where_the_user_chooses_one_or_gives_orders_later(pattern: str) -> None:
    assert list(found(pattern)) == [(pattern,)]


def test_programs_in_a_home_have_a_warning_of_their_own(tmp_path: Path) -> None:
    listed = {"kind": "Persona", "name": "A", "command_whitelist": ["vim"], "home_programs": ["bin/x", "**/node"]}
    persona = parse_document(listed)
    assert isinstance(persona, Persona)
    own = cautions(persona)[-1]
    assert (own.field, own.entries, own.kinds) == ("home_programs", ((0, "bin/x"), (1, "**/node")), (Kind.CODE,))
    text = "kind: Persona\nname: A\ncommand_whitelist: [ls]\nhome_programs:\n  - bin/x\n  - '**/node'\n"
    (tmp_path / "a.yaml").write_text(text)
    (warning,) = load([tmp_path / "a.yaml"]).warnings
    assert str(warning).startswith(
        f"{tmp_path}/a.yaml:5: warning: persona A: 'bin/x', '**/node' (line 6): whoever may write"
    )


def test_what_is_carved_out_is_not_allowed() -> None:
    assert found("/usr/bin/valg*", "!/usr/bin/valgrind", "!/usr/bin/valgrind.bin") == {}
    assert found("/usr/bin/valg*", "!/usr/bin/valgrind ** --x* **") == {("/usr/bin/valg*",): (Kind.LOADS,)}


def messages(*patterns: str) -> dict[str, str]:
    """The warnings about entries that do not say what people think, by their pattern."""
    persona = parse_document({"kind": "Persona", "name": "A", "command_whitelist": list(patterns)})
    assert isinstance(persona, Persona)
    return {c.entries[0][1]: c.message for c in cautions(persona) if isinstance(c.kinds[0], Gap)}


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("!git push **", "an option before it passes, as in 'git -C . push'; write '!git ** push **'"),
        ("!git push", "write '!git ** push **'"),
        ("!git remote add **", "write '!git ** remote ** add **'"),
        ("!git ** remote add **", "an option between them passes; write '!git ** remote ** add **'"),
        ("!git ** push", "more behind it pass; write '!git ** push **'"),
        ("!tool x", "an option before it passes; write '!tool ** x **'"),
        ("!nmap -sS *", "another option before it passes; write '!nmap ** -sS * **'"),
        ("!/usr/bin/g* push **", "write '!/usr/bin/g* ** push **'"),
        ("!journalctl ** --vacuum-size=1M **", "write '!journalctl ** --vacuum-size* **'"),
        ("!psql ** -h prod **", "'-hX' and '--host=X' pass; write '!psql ** -h* **' and '!psql ** --host* **'"),
        ("!tool ** -h prod **", "'-hX' and its long form, if it has one, pass"),
        ("!psql ** --host prod **", "write '!psql ** --host* **'"),
    ],
)
def test_a_carve_out_that_is_easily_passed(pattern: str, says: str) -> None:
    program = pattern[1:].split()[0].replace("g*", "git")
    assert says in messages(program, pattern)[pattern]


@pytest.mark.parametrize(
    "pattern",
    ["!git ** push **", "!git ** remote ** add **", "!journalctl ** --vacuum* **", "!psql ** -h* **", "!nmap **", "!ls",
     "!tool ** /etc/** **", "!tool ** x ** y **"],
)  # fmt: skip
def test_a_carve_out_that_is_not(pattern: str) -> None:
    assert messages("**", pattern) == {}


@pytest.mark.parametrize("pattern", ["!git push **", "!git remote add", "!nmap -sS *", r"!tool a\*b", "!tool x '' y"])
def test_what_is_proposed_is_not_warned_about_again(pattern: str) -> None:
    better = messages("**", pattern)[pattern].partition("write '")[2].removesuffix("'")
    assert better.startswith("!")
    assert messages("**", better) == {}


def test_a_carve_out_of_one_name_of_a_file() -> None:
    assert "pgrep, pidwait" in messages("**", "!pkill")["!pkill"]
    assert messages("pkill", "!pkill ** x **") == {}
    assert messages("**", "!view", "!vim")["!view"] != messages("**", "!view")["!view"]
    assert messages("**", "!pkill", "!pgrep", "!pidwait") == {}
    assert messages("/usr/bin/p*", "!/usr/bin/pkill") == {}  # the file, so all its names


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("psql -h db **", "does not hold its user to 'db': '**' lets them give -h once more ('-hX', '--host=X')"),
        ("psql ** -h db", "'db'"),
        ("tool --host=db **", "'db': '**' lets them give --host once more ('--host X')"),
    ],
)
def test_an_option_that_is_not_fixed(pattern: str, says: str) -> None:
    assert says in messages(pattern)[pattern]


@pytest.mark.parametrize(
    "pattern",
    ["psql -h db", "psql -h * **", "psql -h db -- **", "systemctl --user **", "python3 -m json.tool **", "git log **",
     "tool --host=* **", "psql -h db *"],
)  # fmt: skip
def test_an_option_that_is(pattern: str) -> None:
    assert messages(pattern) == {}


def test_the_documents_own_examples_say_what_they_mean(tmp_path: Path) -> None:
    blocks = [block for file in (ROOT / "docs").glob("*.md") for block in FENCED.findall(file.read_text())]
    personas = [block for block in blocks if "kind: Persona" in block]
    assert personas
    files = [ROOT / "examples"]
    for number, block in enumerate(personas):
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(block)
    for file in files:
        loaded = load([file])
        assert loaded.documents and loaded.problems == ()
        assert [str(found) for found in loaded.warnings if isinstance(found.caution.kinds[0], Gap)] == []


def test_a_wildcard_has_one_warning_with_how_many() -> None:
    persona = parse_document({"kind": "Persona", "name": "A", "command_whitelist": ["/usr/bin/*", "!/usr/bin/v*"]})
    assert isinstance(persona, Persona)
    (caution,) = cautions(persona)
    assert caution.message.startswith(
        "every program of /usr/bin, also of packages to come, among them where installed "
    )
    assert "(proot, rr, drrun, pin, ...)" in caution.message
    assert caution.message.endswith("resource limits and network rules still hold")
    assert caution.kinds == tuple(Kind)


def test_check_and_apply_warn_with_file_and_line_and_refuse_nothing(cli: Broker, tmp_path: Path) -> None:
    file = tmp_path / "set.yaml"
    file.write_text(SET)
    checked = cli.run("check", str(file))
    assert checked.returncode == 0
    lines = checked.stdout.splitlines()
    assert lines[-1] == "1 document, no problems, 5 warnings"
    assert [line.partition(" warning: ")[0] for line in lines[:-1]] == [f"{file}:{n}:" for n in (5, 6, 7, 9, 10)]
    assert "persona A: 'vim': runs any code that its user gives it" in lines[0]
    assert "persona A: 'cat', 'grep *' (line 8): each shows any file" in lines[1]
    assert "persona A: 'valgrind': loads other programs and runs them inside itself" in lines[2]
    assert all(line.endswith("resource limits and network rules still hold") for line in lines[:-1])
    warnings = json.loads(cli.run("check", "--json", str(file)).stdout)["warnings"]
    assert [(item["file"], item["line"]) for item in warnings] == [(str(file), n) for n in (5, 6, 7, 9, 10)]
    assert warnings[1]["kinds"] == ["reads_files"]
    assert [(item["line"], item["pattern"]) for item in warnings[1]["entries"]] == [(6, "cat"), (8, "grep *")]
    applied = cli.run("apply", "--json", str(file))
    assert applied.returncode == 0
    assert json.loads(applied.stdout)["added"] == ["Persona A"]
    assert [line.removeprefix("persona-broker: ") for line in applied.stderr.splitlines()] == lines[:-1]


@pytest.mark.parametrize(
    ("pattern", "kind", "says"),
    [
        ("ls -la | grep x", Misread.SHELL_SYNTAX, "'|' is an argument here"),
        ("make && make install", Misread.SHELL_SYNTAX, "'&&' is an argument here"),
        ("date > /tmp/x", Misread.SHELL_SYNTAX, "'>' is an argument here"),
        ("date 2>/dev/null", Misread.SHELL_SYNTAX, "'2>/dev/null' is an argument here"),
        ("date -u; ls", Misread.SHELL_SYNTAX, "'-u;' is an argument here"),
        ("sleep 5 &", Misread.SHELL_SYNTAX, "'&' is an argument here"),
        ("ls ~/data", Misread.SHELL_SYNTAX, "'~/data' stands for itself"),
        ("ls $HOME/*", Misread.SHELL_SYNTAX, "'$HOME/*' stands for itself"),
        ("LANG=C date", Misread.SHELL_SYNTAX, "'LANG=C' sets a variable in a shell"),
        ("cd", Misread.SHELL_BUILTIN, "no program starts for it"),
        ("export PATH=*", Misread.SHELL_BUILTIN, "no program starts for it"),
        ("/home/*/bin/**", Misread.USERS_OWN, "home_programs"),
        ("/tmp/run.sh", Misread.USERS_OWN, "home_programs"),
    ],
)
def test_entries_that_only_a_shell_would_understand(pattern: str, kind: Misread, says: str) -> None:
    persona = parse_document({"kind": "Persona", "name": "A", "command_whitelist": [pattern]})
    assert isinstance(persona, Persona)
    assert [caution.kinds for caution in cautions(persona) if isinstance(caution.kinds[0], Misread)] == [(kind,)]
    assert any(says in caution.message for caution in cautions(persona))


@pytest.mark.parametrize(
    "pattern",
    ["ls '|'", 'date ">"', "find /srv -exec ls {} ;", r"ls \~/x", "ls '$HOME'", r"ls it\'s", "ls a~ x$", "[ -e x ]",
     "/usr/local/bin/x", "/homes/x", "echo", "test"],
)  # fmt: skip
def test_what_is_meant_as_an_argument_has_no_such_warning(pattern: str) -> None:
    assert not [kinds for kinds in found(pattern).values() if isinstance(kinds[0], Misread)]


def test_no_program_of_debians_is_taken_for_a_builtin() -> None:
    """Those lie in /usr/bin as well; so a whitelist decides them where env, find or a script starts them."""
    assert not BUILTINS & {"echo", "false", "kill", "printf", "pwd", "test", "[", "true", "time", "nice", "env"}
    assert not [name for name in BUILTINS if Path("/usr/bin", name).exists()]
