"""What the operator's commands do not do without being asked twice, and how they say what is wrong with a call."""

import json
from pathlib import Path

from tests.broker.conftest import Broker


def test_check_counts_what_is_there_and_goes_by_lines(cli: Broker, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "{kind: Policy, name: p, subjects: {users: [a]}, persona: Ghost}\n---\n"
        "{kind: Persona, name: A, command_whitelist: [./a]}\n---\n"
        "{kind: Policy, name: q, subjects: {users: [a]}, persona: Ghost}\n"
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
