"""One libvirtd for a file of tests, with a domain that burns its CPU and one that sleeps."""

from collections.abc import Iterator

import pytest
from persona_broker.host.libvirt_hypervisor import start_event_loop

from tests.host.lab import BURN, SLEEP, Libvirtd


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[Libvirtd]:
    start_event_loop()  # before anything is opened, and for ever
    libvirtd = Libvirtd()
    try:
        libvirtd.begin("burner", BURN)
        libvirtd.begin("idle", SLEEP)
        yield libvirtd
    finally:
        libvirtd.close()
