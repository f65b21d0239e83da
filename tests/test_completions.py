"""What bash completes: the packaged files are what the parsers say, and do what they should in a real bash."""

import subprocess

import pytest

from scripts.completions import COMMANDS, FOLDER, script

ASK = """
complete() { :; }; compopt() { :; }
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
"_${1//-/_}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(*words: str) -> set[str]:
    done = subprocess.run(
        ["bash", "-c", ASK, "bash", str(FOLDER / words[0]), *words],
        capture_output=True, text=True, check=True, timeout=30, env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_packaged_file_is_what_the_parser_says(name: str) -> None:
    assert (FOLDER / name).read_text() == script(name), "run scripts/completions.py"


def test_every_file_is_packaged() -> None:
    folder = FOLDER.parent / "debian"
    broker, guest = ((folder / f"persona-{which}.install").read_text() for which in ("broker", "guest"))
    for name in COMMANDS:
        line = f"packaging/completions/{name} usr/share/bash-completion/completions\n"
        assert line in (broker if name in ("persona-broker", "persona-host") else guest)


@pytest.mark.parametrize(
    ("words", "right"),
    [
        ("persona-broker se", {"serve", "sessions", "sets"}),
        ("persona-broker sessions ", {"list", "revoke", "--help"}),
        ("persona-broker sessions revoke --e", {"--end"}),
        ("persona-broker --db serve sessions l", {"list"}),
        ("persona-broker serve --role ", {"api", "events", "all"}),
        ("persona-broker records tail --denied --reason outside", {"outside_hours"}),
        ("persona-broker records tail --user ", set()),
        ("persona-broker --ver", {"--version"}),
        ("persona-host to", {"top"}),
        ("persona-agent pl", {"plan"}),
        ("persona-agent --config ", set()),
        ("persona li", {"list"}),
        ("persona status --j", {"--json"}),
    ],
)
def test_what_is_completed(words: str, right: set[str]) -> None:
    assert completed(*words.split(" ")) == right


@pytest.mark.parametrize(
    "words", ["persona explain syst", "persona-broker explain --vm x -- syst", "persona try f -- syst"]
)
def test_a_command_line_follows(words: str) -> None:
    assert {word.rpartition("/")[2] for word in completed(*words.split())} >= {"systemctl"}
