"""The kernel has the last word: no race is won between the agent's reading of a program start and the kernel's."""

import time
from collections.abc import Callable

import pytest

from tests.guest_vm.conftest import Compiler
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker
from tests.guest_vm.test_kernel import kernel, put

TRIES = 20_000  # or as many as fit into the seconds
SHORT, LONG = 3, 3600
SECONDS = [
    pytest.param(SHORT, id="short"),
    pytest.param(LONG, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(LONG * 6)]),
]
GOES = 8  # at most: in a short one it may happen that nothing was swapped between the two readings


@pytest.fixture
def programs(guest: Machine, static_c: Compiler) -> None:
    """What races, and what is raced for; an empty directory for what a race that is won leaves."""
    if guest.root("test -e /usr/local/bin/race").code:
        put(guest, static_c, "race")
    guest.must("rm -rf /tmp/race; mkdir -m 777 /tmp/race; sysctl -q vm.unprivileged_userfaultfd=1")


def found(guest: Machine, kind: str) -> int:
    """How many programs left that they ran."""
    return int(guest.must(f"find /tmp/race -name '{kind}-*' | wc -l"))


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("what", ["path", "argv"])
@pytest.mark.parametrize("who", ["shared", "thread", "writev", "fault"])
def test_no_race_is_won(
    guest: Machine, broker: Broker, record_property: Callable[[str, object], None], who: str, what: str, seconds: int
) -> None:
    event = "killed" if what == "argv" else "stopped"
    # what arrives by userfaultfd is nearly always swapped in time: there it is chance whether any runs as allowed
    some_run = what == "argv" and who != "fault"
    before, began, caught, tries = kernel(guest), guest.moment(), dict[str, int](), 0
    for _ in range(GOES):
        race = f"race {who} {what} {TRIES} {seconds} /tmp/race 2>/dev/null"
        done = guest.ssh("carol", race, timeout=60 + seconds * 5)
        assert done.code == 0, done.text
        tries += int(done.out)
        after = kernel(guest)
        caught = {name: after[name] - before[name] for name in after}
        if caught[event] and (found(guest, "right") or not some_run):
            break
    for name, value in {"tries": tries, **caught}.items():
        record_property(name, value)
    assert (found(guest, "ran"), found(guest, "wrong"), caught["lost"]) == (0, 0, 0)
    assert caught[event] > 0  # or nothing was raced for
    assert found(guest, "right") > 0 or not some_run
    deadline = time.monotonic() + 20
    while (recorded := records(broker, began, event)) < caught[event] and time.monotonic() < deadline:
        time.sleep(0.5)
    assert recorded >= caught[event]


def records(broker: Broker, since: str, event: str) -> int:
    """How many of carol's program starts the broker has as stopped, or killed, since then."""
    return sum(record["event"] == event for record in broker.records(since, "--user", "carol"))


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("seconds", SECONDS)
def test_no_race_is_won_in_root_s_own_login_either(guest: Machine, seconds: int) -> None:
    # root's su to carol has root's login uid and cgroup: what gates it is that its shell was approved
    before = kernel(guest)["stopped"]
    race = f"race shared path {TRIES} {seconds} /tmp/race"
    for _ in range(GOES):
        guest.must(f"su - carol -c '{race}' 2>/dev/null", timeout=60 + seconds * 5)
        if kernel(guest)["stopped"] > before:
            break
    assert guest.must("ls /tmp/race") == ""
    assert kernel(guest)["stopped"] > before
