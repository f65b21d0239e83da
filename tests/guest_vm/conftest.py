"""One guest for all guest tests: booted, persona-guest installed by apt, enforcing, its broker on this host.

It is frozen when it is ready and put back to that moment for each file of tests and after each failure,
so that no test inherits what another left.
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.guest_vm.bound import DOCUMENTS
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import ROOT, Broker, await_connected, configure, site

ARTIFACTS = ROOT / "build" / "artifacts"
# These hold the guest to times and rates, which another guest beside it would spoil.
TIMED = {"test_limits.py", "test_following.py", "test_network.py", "test_network_kept.py", "test_failures.py"}
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")  # of several, each has a guest of its own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs the guest, and what needs the machine for itself."""
    for item in items:
        if isinstance(item, pytest.Function) and "_warm" in item.fixturenames:
            item.add_marker(pytest.mark.guest)
            item.add_marker(pytest.mark.timeout(900))
            if item.path.name in TIMED:
                item.add_marker(pytest.mark.alone)


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Lets the guest fixture know how its test ended."""
    report = yield
    before = report.when != "setup" and item.stash.get(_FAILED, False)  # each try begins anew
    item.stash[_FAILED] = before or report.failed
    return report


class Warm:
    """A gated guest and its broker; the guest can be put back to how it was when it was ready."""

    def __init__(self, machine: Machine, broker: Broker) -> None:
        self.machine, self.broker = machine, broker
        self._used_by: str | None = None
        # the target of every escape: harmless, on no whitelist, and it tells that it ran
        machine.must("cp /usr/bin/touch /usr/local/bin/forbidden && loginctl terminate-user alice || true")
        machine.freeze()

    def ready_for(self, file: str) -> None:
        """Each file of tests begins with a guest that no other has touched."""
        if self.broker.process is None:
            self.broker.start()
        self.broker.load(30)
        if self._used_by not in (None, file):
            self.machine.thaw()
            configure(self.machine, self.broker)
        self._used_by = file
        await_connected(self.machine)

    def spoil(self, test: str) -> None:
        """Keeps what a failed test leaves to look at, and tells the end of it; the next one begins anew."""
        self._used_by = test
        lines = self.keep(test).splitlines()
        print(*lines[-40:], sep="\n")  # where only the output is left to look at, as under CI

    def keep(self, name: str) -> str:
        """The guest's journal and console and the broker's log, in ``build/artifacts/NAME``; the journal."""
        journal = ""
        folder = ARTIFACTS / re.sub(r"[^\w.-]+", "_", name)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a guest that hangs has its console still
            journal = self.machine.root("journalctl -b --no-pager", timeout=60).out
        (folder / "journal.txt").write_text(journal)
        (folder / "console.txt").write_text(self.machine.console_tail())
        (folder / "broker.txt").write_text((self.broker.directory / "log").read_text())
        return journal


@pytest.fixture(scope="session")
def _warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    with site(tmp_path_factory.mktemp("site")) as (machine, broker):
        broker.run("apply", *map(str, DOCUMENTS))
        warm = Warm(machine, broker)
        yield warm
        warm.keep(f"end-{WORKER}")


@pytest.fixture
def guest(_warm: Warm, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """The guest, its agent connected and the load low when a test begins."""
    _warm.ready_for(request.path.name)
    yield _warm.machine
    if request.node.stash.get(_FAILED, False):
        _warm.spoil(request.node.name)
        return
    wait = "for i in $(seq 15); do systemctl -q is-active persona-agent && exit 0; sleep 1; done; exit 1"
    if _warm.machine.root(wait, timeout=60).code:
        _warm.spoil(request.node.name)
        pytest.fail("the agent is not running after the test")


@pytest.fixture
def broker(_warm: Warm) -> Broker:
    """The broker on this host."""
    return _warm.broker


@pytest.fixture(scope="session")
def static_c(tmp_path_factory: pytest.TempPathFactory) -> "Compiler":
    """Compiles a small C program on this host, statically, for the guest."""
    return Compiler(tmp_path_factory.mktemp("c"))


class Compiler:
    """``compile`` returns the binary's path on this host."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def compile(self, name: str, source: str, *flags: str) -> Path:
        """Raises ``CalledProcessError``."""
        return self._compile(name, source, "-static", "-pthread", *flags)

    def shared(self, name: str, source: str) -> Path:
        """A shared library, for the guest's own C library: both are Debian 12's."""
        return self._compile(name, source, "-shared", "-fPIC")

    def _compile(self, name: str, source: str, *flags: str) -> Path:
        (self._directory / f"{name}.c").write_text(source)
        binary = self._directory / name
        words = ["cc", "-O2", "-w", *flags, "-o", str(binary), str(self._directory / f"{name}.c")]
        subprocess.run(words, check=True, timeout=120)
        return binary
