"""Command sets: what a persona is with them, when that is a new version, and what is refused where."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from persona_broker.policy.merge import ADD, How
from persona_broker.policy.unreadable import Unreadable
from persona_broker.policy_files.reader import load
from persona_broker.store.sqlite import SqliteStore

from persona.canonical import digest, to_mapping
from persona.decisions import Program
from persona.documents import Document, Persona, parse_document
from persona.parsing import DocumentError
from persona.problems import PersonaError
from persona.program_facts import Kind
from persona.schema import SCHEMA
from persona.sets import by_set
from tests.broker.conftest import ROOT, VM, Broker, apply

GIT = {"kind": "CommandSet", "name": "git", "commands": ["git", "/usr/lib/git-core/*"]}
CORE = {"kind": "CommandSet", "name": "core", "commands": ["ls", "rm", "cat"]}
POLICY = {"kind": "Policy", "name": "a", "subjects": {"users": ["alice"]}, "persona": "A"}


def persona(*patterns: str, name: str = "A") -> dict[str, Any]:
    return {"kind": "Persona", "name": name, "command_whitelist": list(patterns)}


def parsed(*values: dict[str, Any]) -> list[Document]:
    return [parse_document(value) for value in values]


def write(file: Path, *documents: dict[str, Any]) -> str:
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n---\n".join(map(json.dumps, documents)))
    return str(file)


def stored(store: SqliteStore, name: str = "A") -> tuple[int, list[str]]:
    """Version and whitelist of a persona as decisions are made from them."""
    found = store.snapshot().personas[name]
    return found.version, [pattern.text for pattern in found.persona.command_whitelist.patterns]


def may(store: SqliteStore, *argv: str) -> bool:
    program = Program(f"/usr/bin/{argv[0]}", (argv[0],), (f"/usr/bin/{argv[0]}",))
    return store.snapshot().personas["A"].persona.command_whitelist.allows(program, argv)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "db")
    yield store
    store.close()


def test_a_persona_is_stored_with_what_its_sets_stand_for(store: SqliteStore, tmp_path: Path) -> None:
    apply(store, parsed(persona("@core", "less", "@git", "!git push **", "!rm", "cat"), POLICY, GIT, CORE))
    whitelist = ["ls", "rm", "less", "git", "/usr/lib/git-core/*", "!git push **", "!rm", "cat"]
    assert stored(store) == (1, whitelist)
    assert [may(store, *argv) for argv in (("ls",), ("git", "log"), ("git", "push", "x"), ("rm",), ("vi",))] == [
        True, True, False, False, False
    ]  # fmt: skip
    with closing(sqlite3.connect(tmp_path / "db")) as db:
        [[body]] = db.execute("SELECT body FROM documents WHERE name = 'A'").fetchall()
    assert json.loads(body)["command_whitelist"] == whitelist  # a decision can be looked up without any set
    assert "@" not in body
    again = parse_document(json.loads(body), accepted=True)  # as a guest reads it
    assert to_mapping(again) == json.loads(body)
    assert by_set(store.snapshot().personas["A"].persona) == {
        "core": ["ls", "rm"], "git": ["git", "/usr/lib/git-core/*"]
    }  # fmt: skip


def test_a_change_of_a_set_is_a_new_version_of_who_uses_it(store: SqliteStore) -> None:
    apply(store, parsed(persona("@git", "ls"), persona("ls", name="B"), POLICY, GIT, CORE))
    before = store.generation()
    assert not apply(store, parsed(persona("@git", "ls"), GIT), ADD)
    assert store.generation() == before
    changes = apply(store, parsed(GIT | {"commands": ["git", "tig"]}), ADD)
    assert sorted(changes.changed) == ["CommandSet git", "Persona A"]
    assert stored(store) == (2, ["git", "tig", "ls"])
    assert stored(store, "B") == (1, ["ls"])
    found = store.version("Persona", "A", 1)  # what a decision of then meant
    assert found is not None
    assert to_mapping(found[1])["command_whitelist"] == ["git", "/usr/lib/git-core/*", "ls"]  # type: ignore[arg-type]
    assert apply(store, parsed(GIT), ADD).changed
    assert stored(store) == (3, ["git", "/usr/lib/git-core/*", "ls"])
    assert apply(store, parsed(persona("@core", "@git")), ADD).changed == ("Persona A",)
    assert apply(store, parsed(CORE | {"commands": ["ls"]}), ADD).changed
    assert stored(store) == (5, ["ls", "git", "/usr/lib/git-core/*"])


def test_what_it_uses_is_remembered_also_where_it_comes_to_the_same(store: SqliteStore) -> None:
    apply(store, parsed(persona("git", "/usr/lib/git-core/*"), POLICY, GIT))
    assert apply(store, parsed(persona("@git")), ADD).changed == ("Persona A",)
    apply(store, parsed(GIT | {"commands": ["tig"]}), ADD)
    assert stored(store)[1] == ["tig"]
    apply(store, parsed(persona("tig")), ADD)
    apply(store, parsed(GIT), ADD)
    assert stored(store)[1] == ["tig"]


def test_documents_without_sets_are_what_they_were() -> None:
    [document] = parsed(persona("ls"))
    assert digest(document) == "828b39718fae5675d0cce8d1f8636aa6d381e5f076b24069ecdac5fefaab9fe2"


def test_check_names_an_unknown_set_where_it_is_used(cli: Broker, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text('kind: Persona\nname: A\ncommand_whitelist:\n  - ls\n  - "@gti"\n---\n' + json.dumps(GIT))
    said = f"{file}:5: command_whitelist[1]: there is no command set 'gti' (known: git)"
    assert said in cli.run("check", str(file)).stdout
    assert said in cli.run("apply", str(file)).stderr


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (persona("!@git"), "command_whitelist[0]: '!@git': a command set cannot be carved out"),
        (persona("@git **"), "command_whitelist[0]: '@git **' names no command set"),
        (persona("@"), "'@' names no command set"),
        (persona("@git", "@git"), "command_whitelist[1]: '@git' is there twice"),
        (persona("@git", "ls", "ls"), "command_whitelist[2]: 'ls' is there twice"),
        (
            POLICY | {"commands": ["@git"]},
            "commands[0]: '@git': command sets are for the command_whitelist of personas",
        ),
        (POLICY | {"commands": ["**", "!@git"]}, "commands[1]: '!@git': command sets are for"),
        (GIT | {"commands": ["git", "!git push **"]}, "commands[1]: '!git push **': a command set has no carve-outs"),
        (GIT | {"commands": ["@core"]}, "commands[0]: '@core': a command set cannot use another"),
        (GIT | {"commands": []}, "commands: missing"),
        ({"kind": "CommandSet", "name": "x"}, "commands: missing"),
        (GIT | {"commands": ["git", "git"]}, "commands[1]: 'git' is there twice"),
        (GIT | {"colour": "red"}, "colour: unknown field"),
        (GIT | {"name": "@git"}, "name: '@git' is not a valid name"),
    ],
)
def test_what_is_refused(value: dict[str, Any], why: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_document(value)
    assert why in caught.value.message


def test_schema_and_canonical_form() -> None:
    for value in (GIT, GIT | {"description": "Version control"}):
        assert to_mapping(parse_document(value)) == value
        jsonschema.validate(value, SCHEMA)
    for wrong in (GIT | {"commands": []}, GIT | {"commands": ["!git"]}, GIT | {"commands": ["@x"]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, SCHEMA)


def test_problems_and_warnings_are_where_the_author_wrote(tmp_path: Path) -> None:
    editors = {"kind": "CommandSet", "name": "edit", "commands": ["vim", "nano"]}
    (tmp_path / "x.yaml").write_text(
        'kind: Persona\nname: A\ncommand_whitelist:\n  - ls\n  - "@edit"\n  - "!tar **"\n  - "!nano"\n---\n'
        + json.dumps(editors)
    )
    found = load([tmp_path / "x.yaml"])
    [problem] = found.problems  # that a carve-out takes something of a set away is none
    assert (problem.line, problem.finding.path) == (6, "command_whitelist[2]")
    assert "carves out of nothing" in problem.finding.message
    assert (found.warnings[0].persona, found.warnings[0].lines) == ("A", (5,))
    assert found.warnings[0].caution.entries[0] == (1, "vim")


def test_a_broken_set_is_one_problem(cli: Broker, tmp_path: Path) -> None:
    file = write(tmp_path / "x.yaml", persona("@git", "!git push **"), GIT | {"commands": ["./git"]})
    done = cli.run("check", file)
    assert done.stdout.splitlines()[-1] == "2 documents, 1 problem, 1 warning", done.stdout


def test_a_set_that_is_applied_is_there_for_files(cli: Broker, store: SqliteStore, tmp_path: Path) -> None:
    assert cli.run("apply", write(tmp_path / "sets.yaml", GIT, CORE)).returncode == 0
    file = write(tmp_path / "a.yaml", persona("@git"), POLICY)
    assert cli.run("check", file).returncode == 1
    assert cli.run("check", "--merged", file).returncode == 0
    assert cli.run("apply", file).returncode == 0
    assert stored(store)[1] == ["git", "/usr/lib/git-core/*"]
    assert cli.run("sets", "list").stdout == "git: 2 patterns, used by A\ncore: 3 patterns, used by no persona\n"
    done = cli.run("apply", "--prune", "--yes", file)  # would take the set away
    assert (done.returncode, f"{file}:1: command_whitelist[0]: there is no command set 'git'" in done.stderr) == (
        1,
        True,
    )
    with pytest.raises(PersonaError, match=r"persona A: .*there is no command set 'git'"):
        store.plan(parsed(persona("@git"), POLICY, CORE), How(prune=True))
    assert (
        cli.run("apply", "--prune", "--yes", write(tmp_path / "b.yaml", persona("@git"), POLICY, GIT)).returncode == 0
    )
    assert json.loads(cli.run("sets", "list", "--json").stdout)["items"][0]["name"] == "git"


def test_a_set_that_grows_too_much_is_refused_for_who_uses_it(cli: Broker, tmp_path: Path) -> None:
    own = [f"own{number}" for number in range(1000)]
    assert cli.run("apply", write(tmp_path / "x.yaml", persona(*own, "@git"), POLICY, GIT)).returncode == 0
    more = write(tmp_path / "git.yaml", GIT | {"commands": [f"g{number}" for number in range(25)]})
    for words in (("apply",), ("check", "--merged")):
        done = cli.run(*words, more)
        assert done.returncode == 1
        assert (
            "persona A: command_whitelist: 1025 entries with those of its sets, at most 1024"
            in done.stdout + done.stderr
        )


@pytest.mark.parametrize("text", ["{", "null", "[]", '{"written": ["@git"], "origins": ["git"]}',
                                  '{"written": ["ls"], "origins": ["git", "git"]}',
                                  '{"written": ["@git", "rm"], "origins": ["git", "git"]}',
                                  '{"written": ["@git", 1], "origins": ["git", "git", 1]}'])  # fmt: skip
def test_a_persona_whose_origin_cannot_be_read_grants_nothing_until_applied_anew(
    store: SqliteStore, tmp_path: Path, text: str
) -> None:
    """It would not follow its sets any more, and nobody would see that."""
    documents = parsed(persona("@git"), POLICY, GIT)
    apply(store, documents)
    with closing(sqlite3.connect(tmp_path / "db")) as db, db:
        db.execute("UPDATE expansions SET body = ?", (text,))
    store._parsed.clear()
    assert any(isinstance(document, Unreadable) for document, _ in store.documents())
    assert apply(store, documents).changed == ("Persona A",)
    assert not apply(store, documents)
    assert stored(store) == (2, ["git", "/usr/lib/git-core/*"])


def test_a_set_that_cannot_be_read_leaves_its_personas_as_they_are(store: SqliteStore, tmp_path: Path) -> None:
    apply(store, parsed(persona("@git"), POLICY, GIT, CORE))
    with closing(sqlite3.connect(tmp_path / "db")) as db, db:
        db.execute("UPDATE documents SET body = '{' WHERE name = 'git'")
    store._parsed.clear()
    apply(store, parsed(CORE | {"commands": ["ls"]}), ADD)
    assert stored(store) == (1, ["git", "/usr/lib/git-core/*"])
    with pytest.raises(PersonaError, match="there is no command set 'git'"):
        apply(store, parsed(persona("@git", "ls")), ADD)
    assert apply(store, parsed(GIT), ADD).changed == ("CommandSet git",)


def test_explain_and_a_trial_read_them_from_files(cli: Broker, tmp_path: Path) -> None:
    file = write(tmp_path / "x.yaml", persona("@git"), POLICY, GIT)
    ask = ("explain", "--files", file, "--user", "alice", "--vm", "v", "--", "git", "log")
    assert cli.run(*ask).returncode == 0


def test_a_persona_that_was_not_expanded_allows_only_what_it_names() -> None:
    [document] = parsed(persona("@git", "ls", "!ls -x"))
    assert isinstance(document, Persona)
    assert [pattern.text for pattern in document.command_whitelist.patterns] == ["ls", "!ls -x"]


def test_the_examples_are_right_by_themselves_and_together(cli: Broker) -> None:
    done = cli.run("check", str(ROOT / "examples"))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "sets").iterdir()), ids=lambda file: file.stem)
def test_each_example_is_a_set_of_that_name(tmp_path: Path, file: Path) -> None:
    user = write(tmp_path / "x.yaml", persona(f"@{file.stem}"))
    found = load([file, Path(user)])
    assert found.problems == ()
    assert [document.name for document in found.documents] == [file.stem, "A"]
    if file.stem == "core-utilities":
        assert not {Kind.CODE, Kind.LOADS}.intersection(kind for w in found.warnings for kind in w.caution.kinds)


# what strace, and the record of a guest, saw of first and second interactive logins under Debian 12 with the files of
# /etc/skel, and an exit
AT_LOGIN = """\
bash -l
id -u
dircolors -b
lesspipe
basename /usr/bin/lesspipe
dirname /usr/bin/lesspipe
clear_console -q
zsh -l
clear
cp /etc/zsh/newuser.zshrc.recommended /home/alice/.zshrc
mv -f /home/alice/.zcompdump.vm.7510 /home/alice/.zcompdump
rm -f /tmp/zsh-zni-7510*
fish -l
mkdir -p /home/alice/.config/fish/completions /home/alice/.config/fish/conf.d /home/alice/.config/fish/functions
kill -t
kill -L
seq 31
git rev-parse --git-dir --is-inside-git-dir --is-bare-repository --is-inside-work-tree HEAD
git config -z --get-regexp ^(svn-remote)$
systemctl --user set-environment DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/1001/bus
python3 -B /usr/share/fish/tools/create_manpage_completions.py --manpath --cleanup-in x --cleanup-in y
"""


def test_a_login_shell_starts_what_its_set_allows_and_not_what_it_would(store: SqliteStore) -> None:
    file = ROOT / "examples" / "sets" / "login-shell.yaml"
    apply(store, [*load([file]).documents, *parsed(persona("@login-shell"), POLICY)])
    for line in AT_LOGIN.splitlines():
        assert may(store, *line.split()), line
    for line in (
        "cp /etc/passwd /home/alice/.zshrc",
        "rm -f /tmp/zsh-zni-1 x",
        "python3 -c x",
        "mv -f a b",
        "kill 1",
        "git push",
        "mkdir x",
        "systemctl --user start x",
        "cat x",
        "ls",
    ):
        assert not may(store, *line.split()), line


def test_a_guest_is_told_what_is_from_which_set(cli: Broker, tmp_path: Path) -> None:
    cli.start("--workers", "1", applied=(Path(write(tmp_path / "x.yaml", persona("@git", "ls"), POLICY, GIT)),))
    try:
        subject = {"user": "alice", "groups": [], "vm": VM}
        session = {"session": "s", "subject": subject, "service": "sshd", "remote": ""}
        assert cli.call("POST", "/v1/sessions", session)[0] == 201
        entry = cli.call("GET", "/v1/sessions/s/personas", speaks=None)[1]["entries"][0]  # 0.1.0
        assert sorted(entry) == ["commands", "detail", "holds", "persona", "policy", "reason", "version"]
        for method, body in (("GET", None), ("POST", {"groups": []})):
            asked = cli.call(method, "/v1/sessions/s/personas", body)[1]["entries"][0]
            assert asked == {**entry, "sets": {"git": ["git", "/usr/lib/git-core/*"]}}
        document = cli.call("GET", "/v1/personas/A/versions/1")[1]["document"]
        assert document == entry["persona"]
        assert document["command_whitelist"] == ["git", "/usr/lib/git-core/*", "ls"]
    finally:
        cli.stop()
