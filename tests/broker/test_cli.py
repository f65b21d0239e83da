"""The operator's commands: files with their lines, dry runs, certificates and tokens."""

import json
import os
import pwd
import sqlite3
import ssl
import stat
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.broker.conftest import ROOT, Broker
from tests.some import some

BAD = """\
kind: Persona
name: DataAnalyst
command_whitelist:
  - ls
  - ./relative
resource_limits:
  memory: 2 potatoes
colour: red
---
kind: Policy
name: p
subjects: {users: [alice]}
persona: Ghost
"""


def test_check_names_file_line_field_and_fix(cli: Broker, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(BAD)
    done = cli.run("check", str(tmp_path / "bad.yaml"))
    assert done.returncode == 1
    assert f"{tmp_path}/bad.yaml:5: command_whitelist[1]: './relative': a relative path never matches" in done.stdout
    assert f"{tmp_path}/bad.yaml:7: resource_limits.memory:" in done.stdout
    assert f"{tmp_path}/bad.yaml:8: colour: unknown field" in done.stdout
    found = json.loads(cli.run("check", "--json", str(tmp_path / "bad.yaml")).stdout)
    assert {problem["line"] for problem in found["problems"]} >= {5, 7, 8}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: [",
        "kind: Persona\nkind: Persona\n",
        "\x00",
        "&a [*a, *a]",
        "a: &a [1]\nb: &b [*a, *a]\n"
        + "".join(f"{chr(99 + i)}: &{chr(99 + i)} [{', '.join([f'*{chr(98 + i)}'] * 9)}]\n" for i in range(12)),
        "!!python/object/apply:os.system [id]",
        "x" * (5 << 20),
        "[" * 500,
    ],
)
def test_files_that_are_no_documents_are_refused(cli: Broker, tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text or "42")
    done = cli.run("check", str(tmp_path / "x.yaml"))
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr


def test_examples_are_right(cli: Broker) -> None:
    assert cli.run("check", str(ROOT / "examples")).returncode == 0


def test_apply_is_whole_or_not_at_all(cli: Broker, tmp_path: Path) -> None:
    dry = cli.run("apply", "--dry-run", str(ROOT / "examples")).stdout
    assert dry.startswith("added: ")
    assert cli.run("apply", str(ROOT / "examples")).stdout == dry + "revision 1\n"
    (tmp_path / "bad.yaml").write_text(BAD)
    assert cli.run("apply", str(ROOT / "examples"), str(tmp_path / "bad.yaml")).returncode == 1
    assert cli.run("apply", str(ROOT / "examples")).stdout == "nothing changed\n"
    (tmp_path / "good.yaml").write_text("{kind: Persona, name: Deploy, command_whitelist: [sh]}")
    changes = json.loads(cli.run("apply", "--json", str(tmp_path / "good.yaml")).stdout)
    assert (changes["changed"], changes["removed"]) == (["Persona Deploy"], [])


def test_a_set_of_a_version_that_is_no_longer_read_can_be_replaced(cli: Broker) -> None:
    assert cli.run("apply", str(ROOT / "examples")).returncode == 0
    with closing(sqlite3.connect(cli.directory / "db", isolation_level=None)) as record:
        record.execute("""UPDATE documents SET digest = 'old', body = '{"kind": "Persona"}'""")
    done = cli.run("explain", "--user", "alice", "--vm", "v", "--", "ls")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(cli.run("check").stdout.splitlines()) - 1  # each document on one line
    assert all(" cannot be read: " in line for line in some(lines))
    assert cli.run("apply", str(ROOT / "examples")).returncode == 0
    assert "denied" in cli.run("explain", "--user", "bob", "--vm", "v", "--", "ls").stdout


def test_explain(cli: Broker) -> None:
    def explain(load: str, *command: str, user: str = "alice") -> subprocess.CompletedProcess[str]:
        files = ("--files", str(ROOT / "examples"))
        return cli.run("explain", "--user", user, "--vm", "analytics-1", "--load", load, *files, "--", *command)

    done = explain("cpu=50", "git", "log")
    granted = "granted under DataAnalyst, policy analysts-by-day (policies/10-analysts.yaml:1)"
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, granted)
    done = explain("cpu=80", "git", "log")
    assert done.returncode == 1
    assert done.stdout.startswith("denied, load_exceeds_threshold")
    assert "AnalystOnBusyHost: its persona does not allow this command" in done.stdout
    assert explain("cpu=50", "ls", user="bob").stdout.startswith("denied, no_matching_policy: no policy names bob")
    login = "it all the same where it is the login shell"
    assert login in explain("cpu=50", "fish").stdout
    assert login not in explain("cpu=50", "bash").stdout + explain("cpu=50", "nmap").stdout
    assert explain("cpu=many", "ls").returncode == 2
    assert explain("cpu=50", "/bin/git", "log").returncode == 0
    assert explain("cpu=50", "/home/alice/git", "log").stdout.startswith("denied, program_not_trusted")
    assert explain("cpu=50", "/home/bob/git", "log").stdout.startswith("denied, no_matching_policy")


def test_explain_names_what_people_forget(cli: Broker) -> None:
    def explain(*words: str, user: str = "alice") -> str:
        files = ("--files", str(ROOT / "examples"), "--load", "cpu=5")
        return cli.run("explain", "--user", user, "--vm", "analytics-1", *files, *words).stdout

    assert "no --group was given; policies for analytics-1 name analysts, operators" in explain("--", "ls", user="eve")
    assert "no --group" not in explain("--group", "other", "--", "ls", user="eve")
    assert "a shell does 'cd' itself" in explain("--", "cd", "/srv")
    assert "a shell does" not in explain("--", "nmap")
    assert "one program whose name has blanks" in explain("--", "git status")
    assert "blanks" not in explain("--", "nmap", "a b")


def test_options_in_the_wrong_place_are_told_where_they_stand(cli: Broker) -> None:
    done = cli.run("apply", "--db", "x.db", "y.yaml")
    assert (done.returncode, "stand before the command" in done.stderr) == (2, True)
    done = cli.run("explain", "--user", "a", "--vm", "v", "rsync", "--server", ".")
    assert (done.returncode, "put '--' before the command" in done.stderr) == (2, True)
    done = cli.run("apply", "--unknown", "y.yaml")
    assert (done.returncode, done.stderr.endswith("unrecognized arguments: --unknown\n")) == (2, True)


def test_a_load_that_no_broker_looks_at_is_told_as_such(cli: Broker, tmp_path: Path) -> None:
    settings = tmp_path / "broker.toml"
    for source, told in (("psutil", True), ("set", False)):
        settings.write_text(f"load_source = '{source}'\n")
        done = cli.run("--config", str(settings), "load", "set", "cpu=80")
        assert (done.returncode, "once the broker has load_source = set" in done.stderr) == (0, told)


def test_tokens_are_private_and_kept_as_hashes(cli: Broker, tmp_path: Path) -> None:
    assert cli.run("guest", "add", "vm-1", "--token-file", str(tmp_path / "t")).returncode == 0
    token = (tmp_path / "t").read_text().strip()
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o600
    assert token.encode() not in (tmp_path / "db").read_bytes()
    assert cli.run("guest", "list").stdout == "vm-1\n"
    assert cli.run("guest", "add", "../vm").returncode == 1


def test_certificates(cli: Broker, tmp_path: Path) -> None:
    assert (
        cli.run("tls", "init", "--dir", str(tmp_path / "tls"), "--host", "127.0.0.1", "--host", "b.example").returncode
        == 0
    )
    assert stat.S_IMODE((tmp_path / "tls" / "broker.key").stat().st_mode) == 0o600
    assert not (tmp_path / "tls" / "ca.key").exists()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "tls" / "broker.crt", tmp_path / "tls" / "broker.key")


def test_a_token_file_that_was_there_becomes_private(cli: Broker, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("x" * 100)
    (tmp_path / "t").chmod(0o644)
    assert cli.run("guest", "add", "vm-1", "--token-file", str(tmp_path / "t")).returncode == 0
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o600
    assert len((tmp_path / "t").read_text().strip()) == 43


@pytest.mark.parametrize(
    ("mode", "token", "why"),
    [(0o644, "t" * 43, "others may read"), (0o600, "", "at least"), (0o600, "short", "at least")],
)
def test_tokens_that_are_none_are_not_registered(cli: Broker, tmp_path: Path, mode: int, token: str, why: str) -> None:
    (tmp_path / "t").write_text(token)
    (tmp_path / "t").chmod(mode)
    done = cli.run("serve", "--guest", "vm-1", "--guest-token-file", str(tmp_path / "t"))
    assert done.returncode == 1
    assert why in done.stderr
    assert json.loads(cli.run("guest", "list", "--json").stdout)["items"] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_makes_is_the_services(cli: Broker, tmp_path: Path) -> None:
    user = pwd.getpwnam("nobody")
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, user.pw_uid, user.pw_gid)
    assert cli.run("--db", str(state / "db"), "apply", str(ROOT / "examples")).returncode == 0
    assert cli.run("tls", "init", "--dir", str(tmp_path / "tls"), "--host", "b", "--user", "nobody").returncode == 0
    made = list(state.rglob("*"))
    assert any(file.parent.name == "audit" for file in made)
    for file in (*made, tmp_path / "tls" / "broker.key"):
        mode = 0o700 if file.is_dir() else 0o600
        assert (file.stat().st_uid, stat.S_IMODE(file.stat().st_mode)) == (user.pw_uid, mode)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("colour = 'red'", "colour: unknown key"),
        ("workers = '2'", "workers: expected int"),
        ("workers = 0", "workers: expected 1 to 32"),
        ("load_source = 'dice'", "load_source: expected"),
        ("load_max_age_s = 1", "load_max_age_s: expected 3"),
        ("= =", "broker.toml: "),
    ],
)
def test_settings_that_are_refused(cli: Broker, tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "broker.toml").write_text(text)
    done = cli.run("serve")
    assert done.returncode == 1
    assert why in done.stderr


def test_errors_of_files_are_one_line(cli: Broker, tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    done = cli.run("guest", "list")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    done = cli.run("guest", "add", "vm", "--token-file", str(tmp_path / "no" / "t"), "--db")
    assert done.returncode == 2
    (tmp_path / "x").write_text("not a database, but long enough to be taken for one " * 10)
    done = cli.run("--db", str(tmp_path / "x"), "guest", "list")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)


def test_explain_without_a_load_is_about_right_now(cli: Broker) -> None:
    assert cli.run("apply", str(ROOT / "examples")).returncode == 0
    ask = ("explain", "--user", "alice", "--vm", "analytics-1", "--", "git", "log")
    assert cli.run(*ask).stdout.startswith("denied, load_unknown")
    cli.run("load", "set", "cpu=10")
    cli.start("--workers", "1")
    try:
        assert cli.run(*ask).stdout.startswith("granted under DataAnalyst")
        cli.run("load", "set", "cpu=80")
        time.sleep(0.3)
        cli.run("load", "set", "cpu=65")
        time.sleep(0.3)
        assert cli.run(*ask).stdout.startswith("denied, load_exceeds_threshold")  # 65 % on the way down
        assert json.loads(cli.run("load", "show", "--json").stdout)["load"] == {"cpu": 65.0}
    finally:
        cli.stop()


def test_hours_by_the_clock_that_is_given(cli: Broker, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "{kind: Persona, name: A, command_whitelist: [ls]}\n---\n"
        "{kind: Policy, name: a, subjects: {users: [alice]}, persona: A,"
        " when: {hours: 'Mon-Fri 07:00-20:00 Europe/Berlin'}}"
    )
    for moment, begins in (
        ("2026-11-24T06:00:00+00:00", "granted"),
        ("2026-11-24T05:59:59+00:00", "denied, outside_hours, policy a (x.yaml:3): it holds Mon-Fri"),
        ("2026-07-06T05:00:00+00:00", "granted"),  # summer time
        ("2026-11-28T12:00:00+00:00", "denied, outside_hours"),
    ):
        files = ("--files", str(tmp_path / "x.yaml"), "--at", moment)
        done = cli.run("explain", "--user", "alice", "--vm", "vm", *files, "--", "ls")
        assert done.stdout.startswith(begins), moment


@pytest.mark.parametrize("words", [("guest", "list"), ("sessions", "list"), ("records", "tail"), ("load", "show"),
                                   ("health",), ("explain", "--user", "a", "--vm", "v", "--", "ls")])  # fmt: skip
def test_what_only_reads_makes_no_record(cli: Broker, tmp_path: Path, words: tuple[str, ...]) -> None:
    absent = tmp_path / "nowhere" / "broker.db"
    done = cli.run("--db", str(absent), *words)
    assert done.returncode == 3
    assert f"there is no database {absent}" in done.stderr
    assert not absent.parent.exists()


def test_a_list_that_does_not_end_is_named_where_it_begins(cli: Broker, tmp_path: Path) -> None:
    (tmp_path / "open.yaml").write_text("kind: Persona\nname: X\ncommand_whitelist: [ls,\n  cat\n")
    assert "that began in line 3" in cli.run("check", str(tmp_path / "open.yaml")).stdout
