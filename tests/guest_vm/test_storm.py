"""Sessions that come and go while the agent is killed: nothing is left over, and nothing was ever open."""

import json
from collections.abc import Callable

import pytest

from tests.guest_vm.bound import CGROUPS
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import ROOT, Broker, await_connected, status

LONG_S = 4 * 3600


@pytest.mark.parametrize(
    ("rounds", "sessions"),
    [
        pytest.param(3, 10, id="short"),
        pytest.param(20, 200, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(LONG_S)]),
    ],
)
def test_rounds_of_sessions_leave_nothing_and_let_nothing_through(
    guest: Machine, broker: Broker, record_property: Callable[[str, object], None], rounds: int, sessions: int
) -> None:
    reach = f"(exec 3<>/dev/tcp/10.0.2.2/{broker.port}) && echo reached"
    assert guest.must(f"bash -c '{reach}'") == "reached\n", "or the sessions' tries would say nothing"
    kept = guest.must("systemctl show -p NFileDescriptorStore persona-agent")
    guest.put(ROOT / "tests" / "guest_vm" / "helpers" / "storm.py", to="/root/")
    command = f"python3 /root/storm.py {rounds} {sessions} {broker.port} alice carol"
    found = json.loads(guest.must(command, timeout=600 + rounds * sessions * 2))
    for name, value in found.items():
        record_property(name, value)
    assert found["opened"] > rounds * sessions / 4, "too few sessions to say anything"
    assert (found["ran"], found["reached"], found["hung"]) == (0, 0, 0)
    await_connected(guest)
    ours = "-path '*/persona-sessions.service/?*/?*' -o -name DataAnalyst -o -name Escapist -o -name login"
    left = (
        "ls /run/persona/state/places /run/persona/state/sessions | grep json;"
        f" find {CGROUPS}user.slice -type d \\( {ours} \\)"
    )
    # the last try to leave a cgroup comes after some seconds
    guest.must(f'for i in $(seq 30); do test -z "$({left})" && exit 0; sleep 1; done; {left}; exit 1')
    plan = json.loads(guest.must("persona-agent plan --json"))
    assert plan["places"] == []
    assert {step["op"] for step in plan["plan"]} <= {"network.remove"}  # the table, which is empty
    assert guest.must("nft list table inet persona 2>/dev/null | grep -E 'DataAnalyst|Escapist' || true") == ""
    assert status(guest)["sessions"] == 0
    assert guest.must("systemctl show -p NFileDescriptorStore persona-agent") == kept
    assert guest.must("ip rule show | grep -i persona || true") == ""
