"""One libvirtd for a file of tests, with a domain that burns its CPU and one that sleeps."""

from collections.abc import Iterator

import pytest
from persona_broker.host.libvirt_hypervisor import start_event_loop

from tests.host.lab import BURN, SLEEP, Libvirtd


@pytest.fixture(scope="session", autouse=True)
def _libvirt_s_events() -> None:
    """Before anything is opened, and for ever: no test leaves that thread behind."""
    start_event_loop()


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[Libvirtd]:
    libvirtd = Libvirtd()
    try:
        libvirtd.begin("burner", BURN)
        libvirtd.begin("idle", SLEEP)
        yield libvirtd
    finally:
        libvirtd.close()
