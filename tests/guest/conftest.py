"""Real parts to test with: an agent and a broker as 'persona try' starts them, apt's own world, a table in a kernel."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from persona_guest.enforce.nft import Network
from persona_guest.enforce.table import Table

from persona.documents import Persona
from tests.guest import netns
from tests.guest.apt_root import AptRoot
from tests.guest.netns import FAR4, FAR6, OTHER4, OTHER6, World
from tests.guest.nft_world import number
from tests.guest.sorter_site import STUBBORN

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A persona that may start programs that start programs, but not strace."""
    path = tmp_path_factory.mktemp("documents") / "persona.yaml"
    names = ["bash", "sh", "ls", "cat", "cp", "ln", "mv", "rm", "mkdir", "chmod", "grep", "find", "env", "perl", "true",
             "sleep", "seq", "id", "kill", "sed", "wc", "unshare", "mount", "echo", "git log **"]  # fmt: skip
    listed = "".join(f"  - {name!r}\n" for name in [*names, "python3 **", "/usr/bin/python3.11"])
    path.write_text(f"kind: Persona\nname: Trial\ncommand_whitelist:\n{listed}")
    return path


@pytest.fixture
def gated(documents: Path, tmp_path: Path) -> Run:
    """Runs a bash script gated by that persona."""

    def run(
        script: str, *arguments: str, files: Path = documents, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(str(ROOT / part) for part in ("", "broker", "guest"))
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-m", "persona_guest.shell.cli", "try", "-q", str(files), "--",
             "bash", "-c", script, "bash", *arguments],
            capture_output=True, text=True, timeout=timeout, cwd=home, stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "SHELL": "/bin/bash", "PATH": "/usr/bin:/bin"},
        )  # fmt: skip

    return run


@pytest.fixture
def root(tmp_path: Path) -> AptRoot:
    """A source with a package that needs another, and one that breaks."""
    root = AptRoot(tmp_path / "root")
    root.package("hello", "2:2.0", depends="helper (>= 1)")
    root.package("helper", "1.5")
    root.package("broken", depends="helper", postinst="echo sorry; exit 3")
    return root


# --- the table of nftables in a kernel ----------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with netns.world("pnet") as found:
        found.start("serve", "53", "443", "5432", "5433", FAR4, FAR6, OTHER4, OTHER6, where="far")
        yield found


@pytest.fixture
def table(world: World) -> Iterator[Table]:
    found = world.in_near(lambda: Table(number))
    found.resolve(("10.9.0.2", "127.0.0.53", "2001:db8:9::2"))
    yield found
    found.rebuild({})
    found.close()


@pytest.fixture
def bases() -> dict[int, Persona]:
    return {}


@pytest.fixture
def network(world: World, table: Table, bases: dict[int, Persona]) -> Network:
    return Network(table, number, str(world.root), bases)


@pytest.fixture
def stubborn() -> Iterator[subprocess.Popen[str]]:
    """Ends by SIGKILL only."""
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()
