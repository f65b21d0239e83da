"""What the architecture promises, read off the imports: the core stays pure, and the parts stay apart."""

import ast
import configparser
from pathlib import Path

import pytest

from tests.some import some

ROOT = Path(__file__).parents[1]
IO = {"os", "subprocess", "socket", "flask", "gunicorn", "sqlite3", "psutil", "yaml", "pyroute2", "libvirt", "pathlib"}
PURE = {
    "persona": IO | {"persona_broker", "persona_guest", "time"},
    "broker/persona_broker/policy": IO | {"time", "persona_guest"},
    "broker/persona_broker/host/core": IO | {"time", "persona_guest"},
    "broker/persona_broker/audit/core": IO | {"time", "persona_guest", "cryptography"},
    # os.path's string functions and fsdecode touch nothing: the guest's core may import os
    "guest/persona_guest/core": IO - {"os"} | {"time", "persona_broker"},
    "guest/persona_guest/audit/records.py": IO | {"time", "persona_broker"},
}


# Lowest first: a package, or a module at the top, imports only what stands before it.
ORDER = {
    "guest/persona_guest": [
        "core", "files", "loop", "settings", "kernel", "system", "program", "lsm", "session", "broker", "audit", "ipc",
        "dependencies", "health", "shell", "gate", "enforce", "login", "reassign", "agent", "standby", "__main__",
    ],
    "broker/persona_broker": [
        "policy", "policy_files", "settings", "lasting", "pki", "host", "store", "audit", "spread", "coverage",
        "problems", "condition_watcher", "view", "shaping", "metrics", "cli", "host_command", "api", "serve",
        "__main__",
    ],
}  # fmt: skip


def imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def modules_of(file: Path) -> set[Path]:
    """Which files of ours a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for top in (".", "broker", "guest"):
                module = ROOT / top / node.module.replace(".", "/")
                for alias in node.names:
                    choice = (module / f"{alias.name}.py", module.with_suffix(".py"), module / "__init__.py")
                    found |= set([path for path in choice if path.is_file()][:1])
    return found


@pytest.mark.parametrize("folder", PURE)
def test_the_core_reaches_for_nothing(folder: str) -> None:
    """Nor does what it imports."""
    reached: set[Path] = set()
    left = set((ROOT / folder).glob("*.py")) or {ROOT / folder}
    assert left
    while left:
        reached |= left
        left = set().union(*map(modules_of, left)) - reached
    assert {str(file): found for file in reached if (found := imports(file) & PURE[folder])} == {}


@pytest.mark.parametrize("side", ORDER)
def test_imports_go_one_way(side: str) -> None:
    def part(file: Path) -> str:
        return file.relative_to(ROOT / side).parts[0].removesuffix(".py")

    files = [file for file in (ROOT / side).rglob("*.py") if part(file) != "__init__"]
    assert {part(file) for file in files} == set(ORDER[side])
    wrong = [
        f"{file.relative_to(ROOT / side)} imports {other.relative_to(ROOT / side)}"
        for file in files
        for other in modules_of(file)
        if other.is_relative_to(ROOT / side) and ORDER[side].index(part(other)) > ORDER[side].index(part(file))
    ]
    assert wrong == []


def test_the_guest_has_four_modules_that_are_in_no_package() -> None:
    found = {file.name for file in (ROOT / "guest" / "persona_guest").glob("*.py")}
    assert found == {"__init__.py", "__main__.py", "files.py", "loop.py", "settings.py"}


def test_guest_and_broker_do_not_know_each_other() -> None:
    for file in some((ROOT / "broker").rglob("*.py")):
        assert "persona_guest" not in imports(file)
    for file in some((ROOT / "guest").rglob("*.py")):
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
        for file in some((ROOT / top).rglob("*.py")):
            assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(file.read_text()))), file


def test_the_guest_builds_its_records_in_one_module() -> None:
    building = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "guest").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Record"
    }
    assert building == {"guest/persona_guest/audit/records.py"}


def test_wildcards_have_one_meaning() -> None:
    """That of persona/wildcards.py: no part matches names or paths by the rules of another library."""
    for top in ("persona", "broker", "guest"):
        for file in some((ROOT / top).rglob("*.py")):
            assert not imports(file) & {"fnmatch", "glob"}, file
