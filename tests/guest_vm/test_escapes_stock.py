"""Some of the escapes where nothing of the guest was changed for speed: two CPUs, addresses at random."""

from tests.guest_vm.escapes import ROUTES
from tests.guest_vm.machine import Machine
from tests.guest_vm.test_escapes import arrived

SAMPLE = list(ROUTES)[::6]


def test_no_route_leads_to_a_program_that_is_not_allowed(guest: Machine) -> None:
    assert guest.must("nproc; cat /proc/sys/kernel/randomize_va_space").split() == ["2", "2"]
    assert set(SAMPLE) - arrived(guest, "/usr/bin/touch", "worked", SAMPLE) == set()
    assert arrived(guest, "/usr/local/bin/forbidden", "escaped", SAMPLE) == set()
