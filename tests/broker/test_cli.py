"""The operator's commands: files with their lines, dry runs, certificates and tokens."""

import json
import ssl
import stat
import subprocess
from pathlib import Path

import pytest

from tests.broker.conftest import ROOT, Broker


@pytest.fixture
def cli(tmp_path: Path) -> Broker:
    return Broker(tmp_path)


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
    assert "added" in cli.run("apply", "--dry-run", str(ROOT / "examples")).stdout
    assert cli.run("apply", str(ROOT / "examples")).returncode == 0
    (tmp_path / "bad.yaml").write_text(BAD)
    assert cli.run("apply", str(ROOT / "examples"), str(tmp_path / "bad.yaml")).returncode == 1
    assert cli.run("apply", str(ROOT / "examples")).stdout == "nothing changed\n"


def test_explain(cli: Broker) -> None:
    def explain(load: str, *command: str, user: str = "alice") -> subprocess.CompletedProcess[str]:
        files = ("--files", str(ROOT / "examples"))
        return cli.run("explain", "--user", user, "--vm", "analytics-1", "--load", load, *files, "--", *command)

    done = explain("cpu=50", "git", "log")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "granted under DataAnalyst (policy analysts-by-day)")
    done = explain("cpu=80", "git", "log")
    assert done.returncode == 1
    assert done.stdout.startswith("denied, load_exceeds_threshold")
    assert "AnalystOnBusyHost: its persona does not allow this command" in done.stdout
    assert explain("cpu=50", "ls", user="bob").stdout.startswith("denied, no_matching_policy: no policy names bob")
    assert explain("cpu=many", "ls").returncode == 1


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


def test_plain_http_is_for_the_loopback_only(cli: Broker) -> None:
    done = cli.run("serve", "--bind", "0.0.0.0:1", "--events-bind", "127.0.0.1:2", "--insecure-loopback")
    assert done.returncode == 1
    assert "without TLS only 127.0.0.1" in done.stderr
