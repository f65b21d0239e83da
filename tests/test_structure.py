"""What the architecture promises, read off the imports: the core stays pure, and the parts stay apart."""

import ast
import configparser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IO = {"os", "subprocess", "socket", "flask", "gunicorn", "sqlite3", "psutil", "yaml", "pyroute2", "libvirt", "pathlib"}
PURE = {
    "persona": IO | {"persona_broker", "persona_guest", "time"},
    "broker/persona_broker/policy": IO | {"time", "persona_guest"},
    # os.path's string functions and fsdecode touch nothing: the guest's core may import os
    "guest/persona_guest/core": IO - {"os"} | {"time", "persona_broker"},
}


def imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("folder", PURE)
def test_the_core_reaches_for_nothing(folder: str) -> None:
    files = list((ROOT / folder).glob("*.py"))
    assert files
    assert {file.name: found for file in files if (found := imports(file) & PURE[folder])} == {}


def test_guest_and_broker_do_not_know_each_other() -> None:
    for file in (ROOT / "broker").rglob("*.py"):
        assert "persona_guest" not in imports(file)
    for file in (ROOT / "guest").rglob("*.py"):
        if file.name != "trial.py":  # 'persona try' is both sides on one machine
            assert "persona_broker" not in imports(file)


def test_every_package_is_in_setup_cfg() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = set()
    for top in (ROOT / "persona", ROOT / "broker" / "persona_broker", ROOT / "guest" / "persona_guest"):
        found |= {".".join(file.parent.relative_to(top.parent).parts) for file in top.rglob("__init__.py")}
    assert listed == found


def test_no_check_depends_on_assert() -> None:
    for top in ("persona", "broker", "guest"):
        for file in (ROOT / top).rglob("*.py"):
            assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(file.read_text()))), file
