"""A world behind the guest: a namespace in it, by a cable of its own, whose addresses answer at some ports."""

import json
from collections.abc import Sequence
from pathlib import Path

from tests.guest_vm.machine import Machine

PROBE = Path(__file__).parents[1] / "guest" / "netprobe.py"
PROGRAM = "/usr/local/lib/netprobe.py"
NEAR4, FAR4, OTHER4 = "10.9.0.1", "10.9.0.2", "10.20.0.2"
NEAR6, FAR6, OTHER6 = "2001:db8:9::1", "2001:db8:9::2", "2001:db8:20::2"
PORTS = (22, 53, 443, 5432, 5433)
Try = tuple[str, str, int]

_SET_UP = f"""
set -e
sysctl -qw net.ipv4.ping_group_range='0 2147483647'
ip netns add far
ip link add far0 type veth peer name near0 netns far
ip link set far0 up
ip address add {NEAR4}/24 dev far0
ip address add {NEAR6}/64 dev far0 nodad
ip -n far link set lo up
ip -n far link set near0 up
ip -n far address add {FAR4}/24 dev near0
ip -n far address add {FAR6}/64 dev near0 nodad
ip -n far address add {OTHER4}/32 dev lo
ip -n far address add {OTHER6}/128 dev lo nodad
ip route add 10.20.0.0/16 via {FAR4}
ip -6 route add 2001:db8:20::/48 via {FAR6}
systemd-run -q --unit far-serve -p NetworkNamespacePath=/run/netns/far /usr/bin/python3 -I {PROGRAM} serve \
    {" ".join(map(str, PORTS))} {FAR4} {FAR6} {OTHER4} {OTHER6}
for i in $(seq 100); do
    ip netns exec far ss -Hltn 'sport = :5433' | grep -q . && exit 0
    sleep 0.2
done
exit 1
"""


def set_up(guest: Machine) -> None:
    """Once a guest."""
    if guest.root("ip netns list | grep -qw far").code == 0:
        return
    guest.put(PROBE, to=PROGRAM)
    guest.must(_SET_UP)


def begin(guest: Machine, user: str) -> None:
    """The world is there, and nothing of the user's lives."""
    set_up(guest)
    guest.must(f"pkill -KILL -u {user}; for i in $(seq 50); do pgrep -u {user} >/dev/null || exit 0; sleep 0.2; done")


def attempt(guest: Machine, user: str, tries: Sequence[Try], before: str = "") -> list[str]:
    """What becomes of each try of a user's own ssh session; ``before`` begins the command line."""
    done = guest.ssh(user, f"{before} python3 -I {PROGRAM} try".strip(), stdin=json.dumps(list(tries)))
    assert done.code == 0, done.text
    found: list[str] = json.loads(done.out.strip().splitlines()[-1])
    return found


def attempt_as_root(guest: Machine, tries: Sequence[Try], before: str = "") -> list[str]:
    """The same of root's, or of what ``before`` makes of it."""
    found: list[str] = json.loads(
        guest.must(f"{before} python3 -I {PROGRAM} try".strip(), stdin=json.dumps(list(tries)))
    )
    return found


def from_outside(guest: Machine, tries: Sequence[Try]) -> list[str]:
    """The same from the far side."""
    return attempt_as_root(guest, tries, "ip netns exec far")


def background(words: str, until: str) -> str:
    """A command line that leaves the probe running, with its output in ``probe.out``, once it has said that."""
    run = f"python3 -Iu {PROGRAM} {words} >probe.out 2>&1 &"
    return f"{run} for i in $(seq 100); do grep -q {until} probe.out && break; sleep 0.1; done"
