"""``persona explain`` says what the gate then does: both go by the same walk, its implicit rules included."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from persona_guest.gate.evaluate import Ask, Refused, Runs, judge
from persona_guest.gate.implicit_allow import Own
from persona_guest.program.exec_request import ExecRequest

from persona.decisions import Decision, Denied, Granted, Lease, PersonaRef, Width
from persona.problems import Reason
from tests.guest.conftest import Run, trial_of

COMPARE = """
import json, subprocess, sys
found = {}
for line in sys.stdin.read().splitlines():
    name, command = json.loads(line)
    try:
        ran = subprocess.run(command, capture_output=True).returncode in range(126)
    except PermissionError:
        ran = False
    explain = [sys.executable, "-m", "persona_guest.shell.cli", "explain", "--socket", sys.argv[1], "--json", "--"]
    said = subprocess.run(explain + command, capture_output=True, text=True)
    found[name] = ran, said.returncode == 0, json.loads(said.stdout or said.stderr)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A gate whose persona allows python and ls: no shell."""
    documents = tmp_path_factory.mktemp("narrow") / "persona.yaml"
    documents.write_text("kind: Persona\nname: T\ncommand_whitelist: [ls, 'python3 **', '/usr/bin/python3.11']\n")
    with trial_of(documents) as socket:
        yield socket


def test_what_is_explained_is_what_happens(gated: Run, narrow: Path, tmp_path: Path) -> None:
    for name, text in (
        ("mine", "#!/bin/bash\n"),
        ("python", "#!/usr/bin/python3\n"),
        ("nested", f"#!{tmp_path}/mine\n"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    commands = {
        "login shell": ["bash", "-c", "true"],
        "login shell by its path": ["/bin/bash", "-c", "true"],
        "another shell": ["dash", "-c", "true"],
        "listed": ["ls", "-d", "/"],
        "not listed": ["cat", "/dev/null"],
        "script of the shell": [f"{tmp_path}/mine"],
        "script of what is listed": [f"{tmp_path}/python"],
        "nested": [f"{tmp_path}/nested"],
        "machinery": ["systemd-tmpfiles", "--version"],
    }
    (tmp_path / "compare.py").write_text(COMPARE)
    (tmp_path / "commands").write_text("".join(json.dumps(item) + "\n" for item in commands.items()))
    script = 'exec python3 "$1" "$2" <"$3"'
    done = gated(script, f"{tmp_path}/compare.py", str(narrow), f"{tmp_path}/commands", by=narrow)
    found = json.loads(done.stdout)
    assert {name: said for name, (_, said, _) in found.items()} == {name: ran for name, (ran, _, _) in found.items()}
    assert {name for name, (ran, _, _) in found.items() if ran} == {
        "login shell", "login shell by its path", "listed", "script of what is listed", "machinery",
    }  # fmt: skip
    shell = found["login shell"][2]
    assert shell["always"] == "login_shell"
    assert (shell["decision"]["decision"], shell["decision"]["persona"]) == ("granted", None)
    assert found["machinery"][2]["always"] == "machinery"
    assert found["listed"][2]["always"] is None
    assert found["listed"][2]["decision"]["persona"]["name"] == "T"


@pytest.mark.parametrize(("folder", "name"), [("", "bash"), ("\x1b[2J/", r"$'\x1b[2J/bash'")])
def test_a_person_is_told_why_it_runs(gated: Run, narrow: Path, tmp_path: Path, folder: str, name: str) -> None:
    if folder:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "bash").symlink_to("/bin/bash")
    script = 'cd "$2"; python3 -m persona_guest.shell.cli explain --socket "$1" -- "$3" -l'
    assert gated(script, str(narrow), str(tmp_path), f"{folder}bash", by=narrow).stdout == (
        f"{name}: would run whatever the personas say: it is the login shell of this session\n"
    )


# --- the walk -----------------------------------------------------------------------------------------

NO, OBSTACLE = Denied(Reason.NO_MATCHING_POLICY), Denied(Reason.PROGRAM_NOT_TRUSTED)
YES = Granted(PersonaRef("A", 1), "p", Lease(1, Width.PROGRAM))


class Stages(ExecRequest):
    """An attempt of so many stages; ``trusted``: whether the first is root's."""

    @property
    def told_stage(self) -> int:
        return 0 if self.obstacles[0] is None else len(self.stages) - 1


def stages(*obstacles: Denied | None) -> ExecRequest:
    return Stages(b"x", (b"x",), True, (None,) * len(obstacles), obstacles=obstacles)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("obstacles", "known", "own", "verdict"),
    [
        ((None,), {}, None, Ask(0, ())),
        ((None,), {0: YES}, None, Runs(0, YES, None, ())),
        ((None,), {0: NO}, None, Refused(0, NO, (NO,))),
        ((None,), {0: NO}, Own.LOGIN_SHELL, Runs(0, None, Own.LOGIN_SHELL, (NO,))),
        ((None,), {}, Own.LOGIN_SHELL, Ask(0, ())),
        ((OBSTACLE, None), {}, None, Ask(1, (OBSTACLE,))),
        ((OBSTACLE, None), {0: YES, 1: NO}, None, Refused(1, NO, (OBSTACLE, NO))),
        ((None, None), {0: NO, 1: YES}, None, Runs(1, YES, None, (NO,))),
        ((None, OBSTACLE), {0: NO}, None, Refused(0, NO, (NO, OBSTACLE))),
    ],
)
def test_the_walk(
    obstacles: tuple[Denied | None, ...], known: dict[int, Decision], own: Own | None, verdict: object
) -> None:
    assert judge(stages(*obstacles), 0, (), known.get, lambda _denials: own) == verdict
