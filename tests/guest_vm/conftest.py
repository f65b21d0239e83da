"""One guest for all guest tests: booted, persona-guest installed by apt, enforcing, its broker on this host."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest_vm.machine import Machine
from tests.guest_vm.site import ROOT, Broker, await_connected, site

ARTIFACTS = ROOT / "build" / "artifacts"
DOCUMENTS = [ROOT / "examples", Path(__file__).parent / "documents"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs the guest."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.guest)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def _site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Broker]]:
    with site(tmp_path_factory.mktemp("site")) as (machine, broker):
        broker.run("apply", *map(str, DOCUMENTS))
        # the target of every escape: harmless, on no whitelist, and it tells that it ran
        machine.must("cp /usr/bin/touch /usr/local/bin/forbidden && loginctl terminate-user alice || true")
        yield machine, broker
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        (ARTIFACTS / "journal.txt").write_text(machine.root("journalctl -b --no-pager", timeout=120).out)
        (ARTIFACTS / "console.txt").write_text(machine.console_tail())
        (ARTIFACTS / "broker.txt").write_text((broker.directory / "log").read_text())


@pytest.fixture
def guest(_site: tuple[Machine, Broker]) -> Iterator[Machine]:
    """The guest, its agent connected and the load low when a test begins."""
    machine, broker = _site
    if broker.process is None:
        broker.start()
    broker.load(30)
    await_connected(machine)
    yield machine
    if machine.root("systemctl is-active persona-agent", timeout=60).out.strip() != "active":
        pytest.fail("the agent is not running after the test")


@pytest.fixture
def broker(_site: tuple[Machine, Broker]) -> Broker:
    """The broker on this host."""
    return _site[1]


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
        (self._directory / f"{name}.c").write_text(source)
        binary = self._directory / name
        subprocess.run(
            ["cc", "-O2", "-static", "-pthread", *flags, "-o", str(binary), str(self._directory / f"{name}.c")],
            check=True,
            timeout=120,
        )
        return binary
