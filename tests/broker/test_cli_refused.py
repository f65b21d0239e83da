"""What the operator's commands do not do without being asked twice, and how they say what is wrong with a call."""

import json
from pathlib import Path

import pytest

from tests.broker.conftest import ROOT, Broker

EXPLAIN = ("explain", "--files", str(ROOT / "examples"), "--user", "alice", "--vm", "analytics-1")


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n"])
def test_an_empty_set_removes_everything_only_where_that_is_meant(cli: Broker, tmp_path: Path, text: str) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text(text)
    assert cli.run("apply", str(ROOT / "examples")).returncode == 0
    words: tuple[str, ...]
    for words in (("apply",), ("apply", "--dry-run"), ("apply", "--allow-empty"), ("serve", "--apply")):
        done = cli.run(*words, str(empty))
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"persona-broker: refused: no documents in {empty}\n"
    for words in (("apply", "--prune", "--yes"), ("apply", "--prune", "--dry-run")):
        done = cli.run(*words, str(empty))
        assert (done.returncode, done.stdout) == (1, "")
        assert f"no documents in {empty}: this would remove all 17" in done.stderr
        assert "--allow-empty" in done.stderr
    assert cli.run("apply", str(ROOT / "examples")).stdout == "nothing changed\n"
    everything = ("apply", "--prune", "--allow-empty")
    assert "Policy deployment" in cli.run(*everything, "--dry-run", str(empty)).stdout
    assert cli.run(*everything, str(empty)).returncode == 4
    assert "Persona AnalystOnBusyHost, " in cli.run(*everything, "--yes", str(empty)).stdout
    done = cli.run("apply", "--prune", str(empty))
    assert (done.returncode, "would remove" in done.stderr) == (1, False)


def test_help_of_apply_says_what_is_removed(cli: Broker) -> None:
    text = " ".join(cli.run("apply", "--help").stdout.split())
    assert "adds and changes documents, and removes none but with --prune or --all" in text


@pytest.mark.parametrize("name", ["ca.pem", "ca.key"])
def test_an_authority_is_replaced_only_where_that_is_meant(cli: Broker, tmp_path: Path, name: str) -> None:
    init = ("tls", "init", "--dir", str(tmp_path / "tls"), "--host", "127.0.0.1")
    (tmp_path / "tls").mkdir()
    (tmp_path / "tls" / name).write_text("as it was")
    done = cli.run(*init)
    assert done.returncode == 1
    assert f"{tmp_path}/tls/{name}" in done.stderr
    assert "--force" in done.stderr
    assert [file.name for file in (tmp_path / "tls").iterdir()] == [name]
    assert (tmp_path / "tls" / name).read_text() == "as it was"
    assert cli.run(*init, "--force").returncode == 0
    assert sorted(file.name for file in (tmp_path / "tls").iterdir()) == ["broker.crt", "broker.key", "ca.pem"]
    assert "BEGIN CERTIFICATE" in (tmp_path / "tls" / "ca.pem").read_text()


def test_an_authority_that_could_not_be_made_is_not_in_the_way(cli: Broker, tmp_path: Path) -> None:
    assert cli.run("tls", "init", "--dir", str(tmp_path / "tls"), "--host", "a,b").returncode == 1
    assert list((tmp_path / "tls").iterdir()) == []
    assert cli.run("tls", "init", "--dir", str(tmp_path / "tls"), "--host", "a.example").returncode == 0


def test_a_guest_gets_another_token_only_where_that_is_meant(cli: Broker, tmp_path: Path) -> None:
    add = ("guest", "add", "vm-1", "--token-file", str(tmp_path / "t"))
    assert cli.run("guest", "add", "vm-1", "--token-file", str(tmp_path / "no" / "t")).returncode == 3
    assert cli.run(*add).returncode == 0  # what could not be written registered nobody
    token = (tmp_path / "t").read_text()
    done = cli.run(*add)
    assert done.returncode == 1
    assert "vm-1" in done.stderr
    assert "--renew" in done.stderr
    assert (tmp_path / "t").read_text() == token
    assert cli.run(*add, "--renew").returncode == 0
    assert (tmp_path / "t").read_text() not in ("", token)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("load", "set", "cpu=300"), "'cpu=300': expected cpu|memory"),
        (("load", "set", "cpu=1", "moon=1"), "'moon=1': expected cpu|memory"),
        ((*EXPLAIN, "--load", "cpu=abc", "--", "ls"), "--load: 'cpu=abc': expected cpu|memory"),
        ((*EXPLAIN, "--load", "cpu=1,cpu=300", "--", "ls"), "--load: 'cpu=300': expected cpu|memory"),
        ((*EXPLAIN, "--health", "x", "--", "ls"), "--health: 'x': disk_free=8%,"),
        (("load", "set", "cpu=1_0"), "'cpu=1_0': expected cpu|memory"),
        ((*EXPLAIN, "--health", "errors=1_0", "--", "ls"), "--health: 'errors=1_0'"),
        ((*EXPLAIN, "--health", "disk_free=\u0663%", "--", "ls"), "--health: "),
        ((*EXPLAIN, "--at", "0001-01-01T00:00:00+14:00", "--", "ls"), "expected a year from 1970 to 9998"),
        ((*EXPLAIN, "--at", "9999-12-31T23:59:59+00:00", "--", "ls"), "expected a year from 1970 to 9998"),
        ((*EXPLAIN, "--at", "bogus", "--", "ls"), "--at: 'bogus': expected"),
        ((*EXPLAIN, "--at", "2026-01-01", "--", "ls"), "--at: '2026-01-01': has no zone; 2026-01-01T00:00:00+00:00"),
        (("records", "tail", "-n", "-1"), "-n: '-1': expected"),
        (("records", "tail", "-n", "1" * 30), "expected"),
    ],
)
def test_a_call_that_is_wrong_is_usage(cli: Broker, words: tuple[str, ...], why: str) -> None:
    done = cli.run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert why in done.stderr


def test_no_guests_are_nothing_wrong(cli: Broker) -> None:
    assert cli.run("apply", str(ROOT / "examples")).returncode == 0
    done = cli.run("health")
    assert (done.returncode, done.stdout.startswith("no guests")) == (0, True)
    done = cli.run("health", "--json")
    assert (done.returncode, json.loads(done.stdout)["items"]) == (0, [])
    assert cli.run("health", "ghost").returncode == 1


def test_check_counts_what_is_there_and_goes_by_lines(cli: Broker, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "{kind: Policy, name: p, subjects: {users: [a]}, persona: []}\n---\n"
        "{kind: Persona, name: A, command_whitelist: [./a]}\n---\n"
        "{kind: Policy, name: q, subjects: {users: [a]}, persona: []}\n"
    )
    (tmp_path / "b.yaml").write_text("{kind: Persona, name: B, colour: red}\n---\n{kind: Person}\n")
    done = cli.run("check", str(tmp_path / "b.yaml"), str(tmp_path / "nothing"), str(tmp_path / "a.yaml"))
    *problems, last = done.stdout.splitlines()
    assert [line.removeprefix(f"{tmp_path}/").split(": ")[0] for line in problems] == [
        "b.yaml:1", "b.yaml:1", "b.yaml:3", "nothing", "a.yaml:1", "a.yaml:3", "a.yaml:5"
    ]  # fmt: skip
    assert problems[3] == f"{tmp_path}/nothing: No such file or directory"
    assert last == "5 documents, 7 problems"
    found = json.loads(cli.run("check", "--json", str(tmp_path / "nothing")).stdout)
    assert found["documents"] == 0
    assert found["problems"][0]["line"] is None
