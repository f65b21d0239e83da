"""What needs a real guest: the cost of a login, and how soon a change is felt in a live session."""

import time
from pathlib import Path

from persona_broker.store.sqlite import Store

from tests.bench.row import Row, median, pairs, percentile
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker, site

LOGINS = 3
CHANGES = 50


def login(machine: Machine) -> float:
    """Seconds for ``ssh host true`` as alice, the best of a few."""
    best = []
    for _ in range(LOGINS):
        began = time.perf_counter()
        if machine.ssh("alice", "true").code:
            raise RuntimeError("the login failed")
        best.append(time.perf_counter() - began)
    return min(best)


def login_ratio(machine: Machine) -> Row:
    """With the module in the PAM stacks and without, in turn."""
    machine.must("loginctl enable-linger alice")  # her user manager would start and stop in between

    def with_module() -> float:
        machine.must("pam-auth-update --package")
        return login(machine)

    def without() -> float:
        machine.must("pam-auth-update --package --remove persona")
        return login(machine)

    ours, theirs, ratio = pairs(with_module, without, 5)
    machine.must("pam-auth-update --package; loginctl disable-linger alice")
    return Row("login.ratio", ours, "s", "without the module", theirs, ratio, "< 1.15, target 1.05")


def revoke(machine: Machine, broker: Broker) -> Row:
    """From the load's change in the record to the first refusal of a program that runs in a loop."""
    store = Store(broker.directory / "broker.db")
    seconds = []
    with machine.session("alice") as session:
        for _ in range(CHANGES):
            store.put_set_load({"cpu": 30.0})
            session.ask("until git --version >/dev/null 2>&1; do :; done")
            session.write("while git --version >/dev/null 2>&1; do :; done")
            time.sleep(0.3)
            began = time.perf_counter()
            store.put_set_load({"cpu": 82.0})
            session.read()
            seconds.append(time.perf_counter() - began)
    p99 = percentile(seconds, 99)
    return Row("revoke.s", p99, "s", "median", median(seconds), p99 / median(seconds), "< 1.0, target 0.2")


def rows(directory: Path | None = None) -> list[Row]:
    """login.*, revoke.*"""
    with site(directory) as (machine, broker):
        machine.must("loginctl terminate-user alice || true")
        return [login_ratio(machine), revoke(machine, broker)]
