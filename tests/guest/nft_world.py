"""What tests of the table in a kernel share: personas, and cgroups to bring under them."""

import json

from persona_guest.core.persona_cgroups import PersonaCgroup
from persona_guest.enforce import plan as plans
from persona_guest.enforce.network.facility import Network

from persona.decisions import PersonaRef
from persona.documents import Persona
from persona.network import Via, parse_rule
from persona.patterns import Whitelist
from tests.guest.netns import World

UID = 4321
REFUSED, CUT = "ECONNREFUSED", "EPERM"  # of TCP, and of what else goes out; of ICMPv6 the kernel says EACCES
RULES = [
    "10.20.0.0/16:tcp/5432",
    "2001:db8:20::/48:tcp/5432,440-450",
    "10.9.0.2:udp/443",
    "2001:db8:9::2:udp/443",
    "icmp",
    "dns",
]


def under(network: Network, user_rules: dict[int, Persona], uid: int, *rules: str) -> None:
    """A user's base."""
    user_rules[uid] = persona(*rules, name="Base")
    plans.apply(network.bind_user(uid))


def number(via: Via) -> int:
    return {"dev e1": 1, "10.9.0.9": 2, "table 100": 3}[str(via)]


def persona(*rules: str, name: str = "Analyst") -> Persona:
    return Persona(name, Whitelist(()), network_access=tuple(map(parse_rule, rules)))


def place(world: World, name: str = "Analyst", version: int = 1) -> PersonaCgroup:
    return PersonaCgroup("s-1", PersonaRef(name, version), world.cgroup(name), UID)


def enter(network: Network, world: World, *rules: str, name: str = "Analyst") -> str:
    """Brings the cgroup of that name under these rules."""
    where = place(world, name)
    plans.apply(network.enter(where, persona(*rules, name=name)))
    return where.cgroup


def listed(world: World) -> list[dict[str, object]]:
    return list(json.loads(world.near_run("nft", "-j", "list", "ruleset"))["nftables"])
