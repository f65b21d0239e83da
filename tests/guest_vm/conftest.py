"""One guest at a time for all guest tests: persona-guest installed by apt, enforcing, its broker on this host.

It is frozen when it is ready and put back to that moment for each file of tests and after each failure,
so that no test inherits what another left.  Tests of escapes and races get one with Debian's own settings,
which is slower; all others one that is made for speed (``machine.Machine``).
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.conftest import STOCK
from tests.guest_vm.bound import DOCUMENTS
from tests.guest_vm.machine import HOST_SEEN_FROM_GUEST, Machine
from tests.guest_vm.site import ROOT, Broker, await_connected, site

ARTIFACTS = ROOT / "build" / "artifacts"
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")  # of several, each has a guest of its own
# What takes longest begins first, so that no process is left alone with it; files that are not named, last.
FIRST = [
    "test_kernel_roads.py", "test_dependencies.py", *sorted(STOCK), "test_standby.py", "test_packages.py",
    "test_kernel_absent.py", "test_limits.py", "test_sessions.py", "test_health.py", "test_network_kept.py",
    "test_network.py", "test_kernel.py", "test_hostile.py", "test_failures.py", "test_user_memory.py",
    "test_broker_package.py",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs the guest, and brings the files into the order in which they run."""
    for item in items:
        if isinstance(item, pytest.Function) and "_warm" in item.fixturenames:
            item.add_marker(pytest.mark.guest)
            item.add_marker(pytest.mark.timeout(900))
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


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
            self._reconnect()
        self._used_by = file
        await_connected(self.machine)

    def _reconnect(self) -> None:
        """Ends the agent's connections, which are of another time, and waits until it has made new ones."""
        host = f"dst {HOST_SEEN_FROM_GUEST}"
        stream = f"ss -Htn state established {host} dport = :{self.broker.events_port} | grep -q ."
        self.machine.must(f"ss -HK {host} sport != :22 >/dev/null; until {stream}; do sleep 0.1; done", timeout=60)

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


class Guests:
    """The guest that a test needs; where the last one was of the other kind, that one has ended."""

    def __init__(self, directories: pytest.TempPathFactory) -> None:
        self._directories = directories
        self._stack = contextlib.ExitStack()
        self._up: tuple[bool, Warm] | None = None

    def get(self, *, stock: bool) -> Warm:
        """Booted where there is none."""
        if self._up is None or self._up[0] != stock:
            self.end()
            machine, broker = self._stack.enter_context(site(self._directories.mktemp("site"), stock=stock))
            broker.documents(*DOCUMENTS)
            self._up = stock, Warm(machine, broker)
        return self._up[1]

    def end(self) -> None:
        """Keeps the end of its journal."""
        if self._up is not None:
            self._up[1].keep(f"end-{WORKER}{'-stock' if self._up[0] else ''}")
        self._up = None
        self._stack.close()


@pytest.fixture(scope="session")
def _guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guests]:
    guests = Guests(tmp_path_factory)
    yield guests
    guests.end()


@pytest.fixture
def _warm(_guests: Guests, request: pytest.FixtureRequest) -> Warm:
    return _guests.get(stock=request.path.name in STOCK)


@pytest.fixture
def guest(_warm: Warm, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """The guest, its agent connected and the load low when a test begins."""
    began = _warm.machine.cpu_seconds()
    _warm.ready_for(request.path.name)
    yield _warm.machine
    # of the same test on a machine with other work, too: the junit file has it
    request.node.user_properties.append(("guest_cpu_s", f"{_warm.machine.cpu_seconds() - began:.1f}"))
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

    def freestanding(self, name: str, source: str) -> Path:
        """A position-independent static program with no C library in it."""
        flags = (
            "-static-pie",
            "-nostdlib",
            "-fPIE",
            "-fno-tree-loop-distribute-patterns",
        )  # these become calls of libc
        return self._compile(name, source, *flags)

    def _compile(self, name: str, source: str, *flags: str) -> Path:
        (self._directory / f"{name}.c").write_text(source)
        binary = self._directory / name
        words = ["cc", "-O2", "-w", *flags, "-o", str(binary), str(self._directory / f"{name}.c")]
        subprocess.run(words, check=True, timeout=120)
        return binary
