"""Real parts to test with: an agent and a broker as 'persona try' starts them, apt's own world, a table in a kernel."""

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from persona_guest.enforce.network.facility import Network
from persona_guest.enforce.network.table import Table
from persona_guest.shell import trial

from persona.documents import Persona
from tests.guest import netns
from tests.guest.apt_root import AptRoot
from tests.guest.migrate_site import STUBBORN
from tests.guest.netns import FAR4, FAR6, OTHER4, OTHER6, World
from tests.guest.nft_world import number
from tests.guest.spool_place import Place

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


@pytest.fixture(scope="session")
def agent(documents: Path) -> Iterator[Path]:
    with trial_of(documents) as socket:
        yield socket


@contextlib.contextmanager
def trial_of(documents: Path) -> Iterator[Path]:
    """The socket of an agent, with a broker that has these documents: as 'persona try' starts them."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="persona-")))
        trial.start(stack, home, [str(documents)])
        yield home / "run" / "agent.sock"


# What 'persona try' does once its broker and its agent are there.
GATED = "import sys; from persona_guest.shell import trial; sys.exit(trial._gated(sys.argv[1], sys.argv[2:]))"


@pytest.fixture
def gated(agent: Path, tmp_path: Path) -> Run:
    """Runs a bash script gated by that persona, by another agent, or by 'persona try' with the documents ``files``."""

    def run(
        script: str, *arguments: str, files: Path | None = None, by: Path = agent, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(str(ROOT / part) for part in ("", "broker", "guest"))
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        head = ["-c", GATED, str(by)]
        if files is not None:
            head = ["-m", "persona_guest.shell.cli", "try", "-q", str(files), "--"]
        return subprocess.run(
            [sys.executable, *head, "bash", "-c", script, "bash", *arguments],
            capture_output=True, text=True, timeout=timeout, cwd=home, stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "SHELL": "/bin/bash", "PATH": "/usr/bin:/bin"},
        )  # fmt: skip

    return run


class SmallDisk:
    """A file system of 64 KiB and 16 files at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self) -> None:
        """Not a byte more fits."""
        with contextlib.suppress(OSError), open(self.path / "filling", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def fill_files(self) -> None:
        """Not a file more fits."""
        with contextlib.suppress(OSError):
            for number in range(100):
                (self.path / f"filling{number}").touch()

    def empty(self) -> None:
        """There is space again."""
        for path in self.path.glob("filling*"):
            path.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A real one: what is written to it meets ENOSPC."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=16", "none", str(path)], check=True)
    yield SmallDisk(path)
    subprocess.run(["umount", "-l", str(path)], check=True)


@contextlib.contextmanager
def no_descriptor() -> Iterator[None]:
    """Whatever would need one fails with EMFILE, in all of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


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


@pytest.fixture(autouse=True)
def _programs_end_with_their_test(request: pytest.FixtureRequest) -> Iterator[None]:
    if "world" not in request.fixturenames:
        yield
        return
    with request.getfixturevalue("world").ending():
        yield


@pytest.fixture
def table(world: World) -> Iterator[Table]:
    found = world.in_near(lambda: Table(number))
    found.resolve(("10.9.0.2", "127.0.0.53", "2001:db8:9::2"))
    yield found
    found.rebuild({})
    found.close()


@pytest.fixture
def user_rules() -> dict[int, Persona]:
    return {}


@pytest.fixture
def network(world: World, table: Table, user_rules: dict[int, Persona]) -> Network:
    return Network(table, number, str(world.root), user_rules)


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


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Where the spool of one machine is."""
    place = Place(tmp_path)
    yield place
    place.close()
