"""``pip install .``: what it brings is what the commands import, in an environment that has nothing else."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Libraries whose import name is not the name that pip knows them by.
DISTRIBUTIONS = {"yaml": "pyyaml", "systemd": "systemd-python", "werkzeug": "flask", "libvirt": "libvirt-python"}
NOT_FOR_PIP = {"apt_pkg"}  # python3-apt exists as a Debian package only


def declared(section: str, key: str) -> set[str]:
    """The names of the requirements in one list of setup.cfg, as pip compares them."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config.get(section, key, fallback="").split("\n")
    return {re.split(r"[<>=!~ ]", line)[0].lower() for line in lines if line}


def imported(*folders: str) -> set[str]:
    """Whatever code in these folders imports that neither Python nor this project brings, by the name for pip."""
    found = set()
    for file in (file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    ours = {"persona", "persona_broker", "persona_guest"}
    return {DISTRIBUTIONS.get(name, name) for name in found - ours - sys.stdlib_module_names - NOT_FOR_PIP}


def test_what_is_imported_is_declared() -> None:
    brought = declared("options", "install_requires")
    # tzdata is read by zoneinfo, where the machine has no files of its own
    host = declared("options.extras_require", "host")
    assert imported("persona", "broker") | {"tzdata"} == brought | host
    assert host == {"libvirt-python"} and not host & brought
    assert declared("options.extras_require", "broker") <= brought
    assert imported("guest") == declared("options.extras_require", "guest")


def test_the_tests_need_the_same_by_either_name() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extra = config.get("options.extras_require", "test", fallback="").split()
    assert extra == (ROOT / "tests" / "requirements.txt").read_text().split()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of a new virtual environment in which only this project was installed, from its sources."""
    tree, environment = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("environment")
    for name in ("persona", "broker", "guest"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    venv.create(environment, with_pip=True, symlinks=True)
    command = [str(environment / "bin" / "pip"), "install", "-q", "--disable-pip-version-check", "."]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return environment / "bin"


def run(installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = {"PATH": f"{installed}:/usr/bin:/bin", "HOME": "/nonexistent", "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        [installed / words[0], *words[1:]], env=path, cwd="/", capture_output=True, text=True, timeout=60
    )


@pytest.mark.long
def test_check_explain_and_try_work(installed: Path, tmp_path: Path) -> None:
    file = tmp_path / "persona.yaml"
    file.write_text("kind: Persona\nname: T\ncommand_whitelist: [ls]\n")
    done = run(installed, "persona-broker", "check", str(file))
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 document, no problems\n", "")
    examples = ("--files", str(ROOT / "examples"), "--user", "alice", "--vm", "analytics-1", "--load", "cpu=50")
    done = run(installed, "persona-broker", "explain", *examples, "--", "git", "log")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("granted under ")
    done = run(installed, "persona", "try", "--quiet", str(file), "--", "ls", "-d", "/")
    assert (done.returncode, done.stdout, done.stderr) == (0, "/\n", "")
    assert run(installed, "persona", "try", "--quiet", str(file), "--", "id").returncode == 126
