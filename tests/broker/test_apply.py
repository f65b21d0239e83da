"""``apply`` adds and changes; what it removes, and from whom, it names, and asks before."""

import json
import os
import pty
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from persona_broker.policy.losses import losses
from persona_broker.policy.merge import ADD, How
from persona_broker.store.interface import Author, SessionRow
from persona_broker.store.sqlite import SqliteStore
from persona_broker.store.stored_text import make_snapshot

from persona.decisions import Subject
from persona.documents import Document, parse_document
from persona.problems import PersonaError
from tests.broker.conftest import ROOT, Broker, apply, environment

EXAMPLES = str(ROOT / "examples")


def persona(name: str, *patterns: str) -> dict[str, Any]:
    return {"kind": "Persona", "name": name, "command_whitelist": list(patterns) or ["ls"]}


def policy(name: str, who: str = "alice", persona: str = "A", **more: Any) -> dict[str, Any]:
    return {"kind": "Policy", "name": name, "subjects": {"users": [who]}, "persona": persona, **more}


def write(file: Path, *documents: dict[str, Any]) -> str:
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n---\n".join(map(json.dumps, documents)))
    return str(file)


def names(cli: Broker) -> list[str]:
    return [item["name"] for item in json.loads(cli.run("policies", "list", "--json").stdout)["items"]]


@pytest.fixture
def store(cli: Broker) -> Iterator[SqliteStore]:
    store = SqliteStore(cli.directory / "db")
    yield store
    store.close()


def test_one_file_takes_nothing_away(cli: Broker, tmp_path: Path) -> None:
    assert cli.run("apply", EXAMPLES).returncode == 0
    before = names(cli)
    done = cli.run("apply", write(tmp_path / "one.yaml", persona("New"), policy("new", persona="New", order=1)))
    assert (done.returncode, done.stdout) == (0, "added: Persona New, Policy new\nrevision 2\n")
    assert names(cli) == ["new", *before]


@pytest.mark.parametrize("words", [("--prune",), ("--all",)])
def test_a_removal_names_what_goes_and_is_not_done_unasked(
    cli: Broker, store: SqliteStore, tmp_path: Path, words: tuple[str, ...]
) -> None:
    apply(
        store, [parse_document(value) for value in (persona("A"), persona("B"), policy("a"), policy("b", "bob", "B"))]
    )
    store.add_guest("vm-1")
    store.open_session(SessionRow("s-\x1bbob", "vm-1", Subject("bob", (), "vm-1"), "", "", 1.0, False))
    store.open_session(SessionRow("s-alice", "vm-1", Subject("alice", (), "vm-1"), "", "", 1.0, False))
    write(tmp_path / "set" / "x.yaml", persona("A"), policy("a"))
    call = ("apply", *words, str(tmp_path / "set"))
    done = cli.run(*call)
    effects = (
        "removed: Persona B, Policy b\n"
        "no longer admitted: bob on vm-1\n"
        "open sessions that are denied everything: s-\\x1bbob (bob on vm-1)\n"
    )
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith(effects)
    assert "--yes" in done.stderr
    assert "--dry-run" in done.stderr
    done = cli.run(*call, "--json")
    said = json.loads(done.stdout)
    assert (done.returncode, said["ok"], said["code"], done.stderr) == (4, False, "bad_request", effects)
    assert "--yes" in said["message"]
    assert cli.run(*call, "--dry-run").stdout == effects
    value = json.loads(cli.run(*call, "--dry-run", "--json").stdout)
    assert value["removed"] == ["Persona B", "Policy b"]
    assert value["denied_sessions"] == [{"id": "s-\x1bbob", "vm": "vm-1", "user": "bob"}]
    assert value["not_admitted"] == {"users": {"bob": ["vm-1"]}, "groups": {}, "complete": True}
    assert names(cli) == ["a", "b"]
    done = cli.run(*call, "--yes")
    assert (done.returncode, done.stdout) == (0, effects + "revision 2\n")
    assert names(cli) == ["a"]
    assert cli.run(*call).stdout == "nothing changed\n"  # and nothing to ask about


@pytest.mark.parametrize(
    ("answer", "code", "left"), [(b"y\n", 0, ["a"]), (b"\n", 4, ["a", "b"]), (b"\x04", 4, ["a", "b"])]
)
def test_on_a_terminal_it_asks(cli: Broker, tmp_path: Path, answer: bytes, code: int, left: list[str]) -> None:
    cli.run("apply", write(tmp_path / "x.yaml", persona("A"), policy("a"), policy("b")))
    less = write(tmp_path / "y.yaml", persona("A"), policy("a"))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        cli.argv("apply", "--prune", less), stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs, env=environment()
    )
    os.close(theirs)
    said = b""
    deadline = time.monotonic() + 30
    while b"[y/N]" not in said and time.monotonic() < deadline:
        said += os.read(ours, 4096)
    assert b"removed: Policy b" in said
    os.write(ours, answer)
    assert process.wait(30) == code
    os.close(ours)
    assert names(cli) == left


def test_a_new_policy_says_its_place(cli: Broker, tmp_path: Path) -> None:
    cli.run("apply", write(tmp_path / "x.yaml", persona("A"), policy("a"), policy("b"), policy("early", order=5)))
    new = write(tmp_path / "new.yaml", policy("n"), policy("m"))
    done = cli.run("apply", new)
    assert done.returncode == 1
    assert "policy n, m: new and without an order" in done.stderr
    assert "--before NAME or --after NAME" in done.stderr
    assert "'ghost' is not a policy that stays applied" in cli.run("apply", "--after", "ghost", new).stderr
    done = cli.run("apply", "--before", "early", new)  # before 5, which they are not
    assert (done.returncode, "give n an order instead" in done.stderr) == (1, True)
    assert names(cli) == ["early", "a", "b"]
    assert cli.run("apply", "--after", "a", new).returncode == 0
    assert names(cli) == ["early", "a", "n", "m", "b"]
    done = cli.run("apply", "--before", "early", new)  # they have their place
    assert (done.stdout, "--before and --after move nothing" in done.stderr) == ("nothing changed\n", True)
    assert cli.run("apply", "--before", "a", write(tmp_path / "z.yaml", policy("z"))).returncode == 0
    assert cli.run("apply", "--after", "early", write(tmp_path / "y.yaml", policy("y"))).returncode == 0
    assert names(cli) == ["early", "y", "z", "a", "n", "m", "b"]
    assert cli.run("apply", write(tmp_path / "a.yaml", policy("a", "carol"))).stdout.startswith("changed: Policy a\n")
    assert names(cli) == ["early", "y", "z", "a", "n", "m", "b"]


def test_a_folder_applied_whole_says_the_places(cli: Broker, tmp_path: Path) -> None:
    cli.run("apply", write(tmp_path / "x.yaml", persona("A"), policy("a"), policy("b")))
    write(tmp_path / "set" / "10.yaml", policy("b"), policy("n"), persona("A"))
    write(tmp_path / "set" / "20.yaml", policy("a"), policy("early", order=1))
    done = cli.run("apply", "--all", str(tmp_path / "set"))
    assert done.stdout == "added: Policy early, Policy n\nthe order changed\nrevision 2\n"
    assert names(cli) == ["early", "b", "n", "a"]


def test_no_policy_is_left_without_its_persona(cli: Broker, store: SqliteStore, tmp_path: Path) -> None:
    cli.run("apply", write(tmp_path / "x.yaml", persona("A"), policy("a")))
    only = write(tmp_path / "a.yaml", policy("a"))
    assert cli.run("apply", only).stdout == "nothing changed\n"  # its persona is applied
    assert cli.run("check", "--merged", only).returncode == 0
    done = cli.run("check", only)
    assert (done.returncode, "--merged" in done.stderr) == (1, True)
    done = cli.run("apply", "--prune", "--yes", only)
    assert (done.returncode, f"{only}:1: persona: there is no persona 'A'" in done.stderr) == (1, True)
    ghost = write(tmp_path / "g.yaml", policy("g", persona="Ghost", order=1))
    for words in (("apply",), ("check", "--merged")):
        done = cli.run(*words, ghost)
        assert done.returncode == 1
        assert f"{ghost}:1: persona: there is no persona 'Ghost' (known: A)" in done.stdout + done.stderr
    with pytest.raises(PersonaError, match="policy a would be left without its persona 'A'"):
        store.plan([parse_document(policy("a"))], How(prune=True))


def test_check_merged_says_that_a_place_is_wanted(cli: Broker, tmp_path: Path) -> None:
    cli.run("apply", write(tmp_path / "x.yaml", persona("A"), policy("a")))
    new = write(tmp_path / "n.yaml", policy("n"))
    done = cli.run("check", "--merged", new)
    assert (done.returncode, done.stdout.splitlines()[0].startswith("policy n is new")) == (0, True)
    assert json.loads(cli.run("check", "--merged", "--json", new).stdout)["unplaced"] == ["n"]
    assert cli.run("check", "--merged").returncode == 2


@pytest.mark.parametrize(
    "words",
    [(), ("--all", EXAMPLES, EXAMPLES), ("--all", EXAMPLES, "--prune"), ("--all", EXAMPLES, "--after", "x"),
     ("--all", f"{EXAMPLES}/personas/deploy.yaml"), ("--before", "a", "--after", "b", EXAMPLES)],
)  # fmt: skip
def test_options_that_do_not_go_together_are_usage(cli: Broker, words: tuple[str, ...]) -> None:
    done = cli.run("apply", *words)
    assert (done.returncode, done.stdout) == (2, "")


def test_what_was_shown_is_what_is_done(store: SqliteStore) -> None:
    values = (persona("A"), policy("a"), policy("b"), policy("c", order=1))
    one, two, three = ([parse_document(value) for value in values[:count]] for count in (3, 2, 4))
    apply(store, one)
    seen = store.plan(two, How(prune=True))
    apply(store, three, ADD)
    with pytest.raises(PersonaError, match="the revision is 2 by now, no longer 1: 2 by somebody unknown"):
        store.carry_out(seen, Author("ann"))
    assert len(store.snapshot().policies) == 3


def test_a_document_that_cannot_be_read_stays_until_it_is_named(
    cli: Broker, store: SqliteStore, tmp_path: Path
) -> None:
    cli.run("apply", write(tmp_path / "x.yaml", persona("A"), policy("a"), policy("b")))
    with store.writing() as db:
        db.execute("UPDATE documents SET body = '{' WHERE name = 'a'")
    assert cli.run("apply", write(tmp_path / "b.yaml", policy("b", "bob"))).stdout.startswith("changed: Policy b\n")
    assert names(cli) == ["a", "b"]
    assert cli.run("check").returncode == 1
    assert cli.run("apply", write(tmp_path / "a.yaml", policy("a"))).stdout == "changed: Policy a\nrevision 3\n"
    assert cli.run("check").returncode == 0


def lost(before: list[dict[str, Any]], after: list[dict[str, Any]], *guests: str, **sessions: Subject) -> Any:
    def snapshot(values: list[dict[str, Any]]) -> Any:
        found: list[Document] = [parse_document(value) for value in (persona("A"), *values)]
        return make_snapshot((document, 1) for document in found)

    return losses(snapshot(before), snapshot(after), sessions, guests)


def test_losses_are_the_engines_word() -> None:
    both: dict[str, Any] = {"subjects": {"users": ["alice", "bob"], "groups": ["staff"]}, "vms": ["a-*", "x?"]}
    before = [policy("p") | both, policy("all", "*", vms=["b-1"])]
    found = lost(before, [policy("p", "bob", vms=["a-1"])], "a-1", "a-2", "b-1")
    assert found.users == {"*": ("b-1",), "alice": ("a-1", "a-2", "x?"), "bob": ("a-2", "x?")}
    assert found.groups == {"staff": ("a-1", "a-2", "x?")}
    assert not lost(before, [*before[::-1], policy("more", "carol")], "a-1")
    assert not lost([policy("p", "alice")], [policy("q", "*")], "vm")  # by another policy


def test_a_policy_for_every_vm_is_told_as_such(cli: Broker, tmp_path: Path) -> None:
    cli.run("apply", write(tmp_path / "x.yaml", persona("A"), policy("a"), policy("b", "*", vms=["b-*"])))
    less = write(tmp_path / "y.yaml", persona("A"))
    said = "removed: Policy a, Policy b\nno longer admitted: everyone on b-*, alice on every VM\n"
    done = cli.run("apply", "--prune", "--dry-run", less)
    assert (done.stdout, done.stderr) == (said, "persona-broker: --dry-run: nothing was changed\n")
    assert "nothing was changed" not in cli.run("apply", "--prune", "--yes", less).stderr


def test_a_session_goes_by_its_groups() -> None:
    before = [policy("p") | {"subjects": {"groups": ["staff", "ops"]}}]
    after = [policy("p") | {"subjects": {"groups": ["ops"]}}]
    found = lost(before, after, "vm", one=Subject("a", ("staff",), "vm"), two=Subject("b", ("staff", "ops"), "vm"))
    assert (found.sessions, found.users, found.groups) == (("one",), {}, {"staff": ("vm",)})


def test_a_look_that_is_too_long_ends_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_broker.policy.losses._ASKED_MAX", 3)
    users = [f"u{number}" for number in range(9)]
    found = lost([policy("p") | {"subjects": {"users": users}}], [], "vm")
    assert (len(found.users), found.complete, bool(found)) == (3, False, True)
