"""Sessions that come and go while the agent is killed: nothing is left over, and nothing was ever open."""

import json
import os
import time

import pytest

from tests.guest_vm.bound import CGROUPS
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import ROOT, Broker, await_connected

# 20 rounds of 200 take the better part of an hour: by hand, PERSONA_STORM_SESSIONS=200
ROUNDS, SESSIONS = 20, int(os.environ.get("PERSONA_STORM_SESSIONS", "10"))


@pytest.mark.timeout(900 + ROUNDS * SESSIONS * 2)
def test_twenty_rounds_leave_nothing_and_let_nothing_through(guest: Machine, broker: Broker) -> None:
    reach = f"(exec 3<>/dev/tcp/10.0.2.2/{broker.port}) && echo reached"
    assert guest.must(f"bash -c '{reach}'") == "reached\n", "or the sessions' tries would say nothing"
    kept = guest.must("systemctl show -p NFileDescriptorStore persona-agent")
    guest.put(ROOT / "tests" / "guest_vm" / "helpers" / "storm.py", to="/root/")
    command = f"python3 /root/storm.py {ROUNDS} {SESSIONS} {broker.port} alice carol"
    found = json.loads(guest.must(command, timeout=600 + ROUNDS * SESSIONS * 2))
    print(found)
    assert found["opened"] > ROUNDS * SESSIONS / 4, "too few sessions to say anything"
    assert (found["ran"], found["reached"], found["hung"]) == (0, 0, 0)
    await_connected(guest)
    time.sleep(10)  # the last try to leave a cgroup comes after some seconds
    assert guest.must("ls /run/persona/places /run/persona/sessions | grep json || true") == ""
    ours = "-path '*/persona-sessions.service/?*' -o -name DataAnalyst -o -name Escapist -o -name login"
    assert guest.must(f"find {CGROUPS}user.slice -type d \\( {ours} \\)") == ""
    plan = json.loads(guest.must("persona-agent plan --json"))
    assert plan["places"] == []
    assert {step["op"] for step in plan["plan"]} <= {"network.remove"}  # the table, which is empty
    assert guest.must("nft list table inet persona 2>/dev/null | grep -E 'DataAnalyst|Escapist' || true") == ""
    assert json.loads(guest.must("persona status --json"))["sessions"] == 0
    assert guest.must("systemctl show -p NFileDescriptorStore persona-agent") == kept
    assert guest.must("ip rule show | grep -i persona || true") == ""
