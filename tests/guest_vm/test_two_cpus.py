"""What a guest with one CPU cannot show."""

from tests.guest_vm.bound import USER, bound
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker
from tests.guest_vm.test_limits import BURN, python


def test_more_than_one_cpu_is_a_limit_too(guest: Machine, broker: Broker) -> None:
    assert guest.must("nproc") == "2\n"
    with bound(broker, {"cpu": "150%"}):
        got = float(guest.ssh(USER, python(BURN, "3")).out)
    assert abs(got - 150) <= 15, got
