"""What a persona's ``network_access`` means to the kernel: chains of rules as values, in nftables' own words.

A packet of a persona's socket is judged each time, so that a narrowed persona cuts what is open.
Outgoing packets go through ``NAME/out``, packets for its listening sockets through ``NAME/in``; both end
by counting, logging and rejecting.  ``str`` of a rule is its text in the language of nft(8).
"""

import contextlib
import hashlib
import ipaddress
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from persona.documents import Persona
from persona.network import NetworkRule, Via

TABLE = "persona"
WAYS = "ways"
LEVELS = (4, 3, 2)  # of a place, of a user's service manager, of a user's slice; the deepest first
LOG_GROUP = 0x5045  # nflog's groups are 16 bit; 0 is ulogd's own
LOG_RATE, LOG_BURST, LOG_BYTES = 20, 100, 64  # a second, at once, of each packet
MARK_SHIFT = 24
MARK_MASK = 0xFF << MARK_SHIFT  # the low bits of a mark are other programs'
MARKS_MAX = 255
ICMP, TCP, UDP, ICMPV6, UDPLITE = 1, 6, 17, 58, 136
_NAMES = {ICMP: "icmp", TCP: "tcp", UDP: "udp", ICMPV6: "ipv6-icmp", UDPLITE: "udplite"}
_USUAL = (TCP, UDP)
_DNS = 53
# Where a local stub may listen: systemd-resolved(8); resolv.conf names the others.
STUBS = ("127.0.0.53", "127.0.0.54")


@dataclass(frozen=True, slots=True)
class Protocol:
    """The transport protocol, by number."""

    number: int

    def __str__(self) -> str:
        return f"meta l4proto {_NAMES[self.number]}"


@dataclass(frozen=True, slots=True)
class Family:
    """The IP version."""

    version: int

    def __str__(self) -> str:
        return f"meta nfproto ipv{self.version}"


@dataclass(frozen=True, slots=True)
class Address:
    """``side`` (saddr or daddr) lies in a prefix of either family."""

    side: str
    network: str

    def __str__(self) -> str:
        return f"{'ip6' if ':' in self.network else 'ip'} {self.side} {self.network}"


@dataclass(frozen=True, slots=True)
class Resolver:
    """``side`` is one of the resolvers of this machine of that IP version."""

    side: str
    version: int

    def __str__(self) -> str:
        return f"{'ip6' if self.version == 6 else 'ip'} {self.side} @resolvers{self.version}"


@dataclass(frozen=True, slots=True)
class Port:
    """``side`` (sport or dport) lies in an inclusive range."""

    side: str
    low: int
    high: int

    def __str__(self) -> str:
        return f"th {self.side} {self.low}" + (f"-{self.high}" if self.high > self.low else "")


@dataclass(frozen=True, slots=True)
class Not:
    """Another protocol, or another port than this one."""

    what: Protocol | Port

    def __str__(self) -> str:
        head, _, last = str(self.what).rpartition(" ")
        return f"{head} != {last}"


@dataclass(frozen=True, slots=True)
class NotOpening:
    """A TCP segment other than the one that opens a connection: a listener's side never sends that one."""

    def __str__(self) -> str:
        return "tcp flags & (syn | ack) != syn"


@dataclass(frozen=True, slots=True)
class ReplyDirection:
    """Goes back to who sent first.  Only UDP needs the kernel's connection tracking to know."""

    def __str__(self) -> str:
        return "ct direction reply"


@dataclass(frozen=True, slots=True)
class Loopback:
    """Leaves (oif) or comes (iif) by the loopback device."""

    side: str

    def __str__(self) -> str:
        return f'{self.side} "lo"'


@dataclass(frozen=True, slots=True)
class ByCgroup:
    """Goes on where a map sends the cgroup in which the socket was made, seen at a level."""

    level: int
    map: str

    def __str__(self) -> str:
        return f"socket cgroupv2 level {self.level} vmap @{self.map}"


@dataclass(frozen=True, slots=True)
class ByOwner:
    """Goes on where a map sends the socket's owner."""

    map: str

    def __str__(self) -> str:
        return f"meta skuid vmap @{self.map}"


@dataclass(frozen=True, slots=True)
class Marked:
    """Carries the mark of a way."""

    index: int

    def __str__(self) -> str:
        return f"meta mark & {MARK_MASK:#010x} == {self.index << MARK_SHIFT:#010x}"


@dataclass(frozen=True, slots=True)
class Mark:
    """Gives the packet the mark of a way; routing rules lead it there."""

    index: int

    def __str__(self) -> str:
        return f"meta mark set meta mark & {MARK_MASK ^ 0xFFFFFFFF:#010x} | {self.index << MARK_SHIFT:#010x}"


@dataclass(frozen=True, slots=True)
class Count:
    """Counts in a named counter."""

    counter: str

    def __str__(self) -> str:
        return f"counter name {self.counter}"


@dataclass(frozen=True, slots=True)
class Log:
    """Sends the packet's beginning to the agent, a bounded number a second."""

    prefix: str

    def __str__(self) -> str:
        head = f"limit rate {LOG_RATE}/second burst {LOG_BURST} packets"
        return f'{head} log prefix "{self.prefix}" group {LOG_GROUP} snaplen {LOG_BYTES}'


@dataclass(frozen=True, slots=True)
class NftVerdict:
    """``accept``, ``masquerade``, ``jump CHAIN``, ``reset`` or ``refuse``.

    A connect that is reset fails with ECONNREFUSED at once, an open flow with ECONNRESET.  One that is refused
    by an ICMP error fails only after a second: the socket is locked when the error comes.
    """

    what: str

    def __str__(self) -> str:
        words = {"reset": "reject with tcp reset", "refuse": "reject with icmpx admin-prohibited"}
        return words.get(self.what, self.what)


Expression = (
    Protocol | Family | Address | Resolver | Port | Not | NotOpening | ReplyDirection | Loopback | ByCgroup | ByOwner
    | Marked | Mark | Count | Log | NftVerdict
)  # fmt: skip
Rule = tuple[Expression, ...]
ACCEPT = NftVerdict("accept")


@dataclass(frozen=True, slots=True)
class Hook:
    """Where a base chain hangs: its type, its hook and its priority, nft(8)."""

    type: str
    name: str
    priority: int


@dataclass(frozen=True, slots=True)
class Chain:
    """Rules in order; ``hook`` only for the chains that packets enter from the kernel."""

    name: str
    rules: tuple[Rule, ...]
    hook: Hook | None = None


@dataclass(frozen=True)
class Access:
    """All that the kernel needs for one set of network rules.  Equal rules, equal name: chains never change."""

    name: str
    out: Chain
    into: Chain
    ways: frozenset[Via]

    @property
    def counter(self) -> str:
        """The counter of what was refused."""
        return self.name

    @cached_property
    def texts(self) -> dict[str, list[str]]:
        """Its rules as nft(8) would have them, by chain."""
        return {chain.name: [text(rule) for rule in chain.rules] for chain in (self.out, self.into)}


def text(rule: Rule) -> str:
    """A rule as nft(8) would have it."""
    return " ".join(map(str, rule))


def access(persona: Persona, marks: Mapping[Via, int]) -> Access:
    """The chains for a persona's rules.

    ``marks`` has a number from 1 to ``MARKS_MAX`` for each way that the rules name.
    """
    out: list[Rule] = []
    into: list[Rule] = []
    for rule in persona.network_access:
        if rule.inbound:
            into += [(*match, ACCEPT) for match in _matches(rule, "saddr", "dport")]
            out += [(*match, ACCEPT) for match in _answers(rule)]
        else:
            mark = (Mark(marks[rule.via]),) if rule.via is not None else ()
            family = _family(rule)
            out += [(*family, *match, *mark, ACCEPT) for match in _matches(rule, "daddr", "dport")]
            into += [(*match, ACCEPT) for match in _datagrams(rule)]
    if not marks:  # then it is all one which rule lets a packet through
        out.sort(key=_rarity)
    into.sort(key=_rarity)
    signs = f"{persona.name} {[text(rule) for rule in out]} {[text(rule) for rule in into]}"
    name = f"{persona.name}.{hashlib.sha256(signs.encode()).hexdigest()[:12]}"
    noted: list[Rule] = [(Count(name),), (Log(persona.name),)]
    return Access(
        name,
        Chain(f"{name}/out", (*out, *noted, (Protocol(TCP), NftVerdict("reset")), (NftVerdict("refuse"),))),
        Chain(f"{name}/in", (*into, *noted, (NftVerdict("refuse"),))),
        frozenset(rule.via for rule in persona.network_access if rule.via is not None),
    )


def _rarity(rule: Rule) -> tuple[bool, int]:
    """Sorts first what most packets are about and what asks them least: any address, and TCP before UDP."""
    protocols = [item.number for item in rule if isinstance(item, Protocol)]
    addressed = any(isinstance(item, Address | Resolver) for item in rule)
    return addressed, _USUAL.index(protocols[0]) if protocols and protocols[0] in _USUAL else len(_USUAL)


def _family(rule: NetworkRule) -> Rule:
    """By a gateway goes what is of its IP version; a prefix says its version itself."""
    if rule.via is None or not rule.via.gateway or rule.network != "any" or rule.protocol == "dns":
        return ()
    return (Family(6 if ":" in rule.via.gateway else 4),)


def _matches(rule: NetworkRule, address: str, port: str) -> list[Rule]:
    if rule.protocol == "icmp":
        return [(Protocol(ICMP),), (Protocol(ICMPV6),)]
    if rule.protocol == "dns":
        return [
            (Protocol(protocol), Port(port, _DNS, _DNS), Resolver(address, version))
            for version in (4, 6)
            for protocol in (UDP, TCP)
        ]
    if rule.protocol == "any":
        return [_addressed(rule, address)]
    return _ported((Protocol(TCP if rule.protocol == "tcp" else UDP),), port, rule, address)


def _ported(head: Rule, side: str, rule: NetworkRule, address: str) -> list[Rule]:
    """The cheapest question first: most rules are not about most packets."""
    tail = _addressed(rule, address)
    return [(*head, Port(side, low, high), *tail) for low, high in rule.ports] or [(*head, *tail)]


def _addressed(rule: NetworkRule, side: str) -> Rule:
    return () if rule.network == "any" else (Address(side, rule.network),)


def _answers(rule: NetworkRule) -> list[Rule]:
    """What a listening socket sends back: TCP by its flags, UDP by connection tracking."""
    found: list[Rule] = []
    if rule.protocol in ("tcp", "any"):
        found += _ported((Protocol(TCP), NotOpening()), "sport", rule, "daddr")
    if rule.protocol in ("udp", "any"):
        found += _ported((Protocol(UDP), ReplyDirection()), "sport", rule, "daddr")
    return found


def _datagrams(rule: NetworkRule) -> list[Rule]:
    """What comes back over UDP, which knows no connections: who may be spoken to may speak."""
    if rule.protocol == "dns":
        return [(Protocol(UDP), Port("sport", _DNS, _DNS), Resolver("saddr", version)) for version in (4, 6)]
    if rule.protocol not in ("udp", "any"):
        return []
    return _ported((Protocol(UDP),), "sport", rule, "saddr")


def base_chains() -> tuple[Chain, ...]:
    """The chains that packets enter from the kernel.

    Loopback is always open, but for name service: a stub resolver there speaks to the world.
    """
    other: Rule = (Not(Protocol(TCP)), Not(Protocol(UDP)))
    # each map is named once: the kernel walks all that a map leads to, for each rule that names it, at each change
    judge: list[Rule] = [(ByCgroup(level, f"out{level}"),) for level in LEVELS]
    listen: list[Rule] = [(ByCgroup(level, f"in{level}"),) for level in LEVELS]
    local: list[Rule] = [(Not(Port("dport", _DNS, _DNS)), ACCEPT), (*other, ACCEPT)]
    output: list[Rule] = [(Loopback("oif"), NftVerdict("jump local")), *judge, (ByOwner("owner"),)]
    # of an ICMP error the kernel would look up the socket that it is about; of protocols but these it finds none, and
    # a socket of UDP-Lite is anybody's to make, without a module
    strange: Rule = (*other, NftVerdict("jump strange"))
    into: list[Rule] = [(Protocol(TCP), NotOpening(), ACCEPT), (Loopback("iif"), ACCEPT), strange, *listen]
    return (
        Chain("local", tuple(local)),
        Chain("strange", ((Protocol(UDPLITE), NftVerdict("refuse")), (ACCEPT,))),
        # of type route, so that a mark given here is routed by; before the translation of addresses
        Chain("output", tuple(output), Hook("route", "output", -150)),
        Chain("input", tuple(into), Hook("filter", "input", 0)),
    )


def way_chains(marks: Iterable[int]) -> tuple[Chain, ...]:
    """The chain that gives packets on a way the address of the device by which they leave.

    Their socket took its address by the machine's own route.
    """
    rules = tuple((Marked(index), NftVerdict("masquerade")) for index in marks)
    return (Chain(WAYS, rules, Hook("nat", "postrouting", 100)),) if rules else ()


def resolvers(text: bytes | str) -> tuple[str, ...]:
    """The addresses that resolv.conf(5) names, and the stubs; what is no address is left out."""
    found = set(STUBS)
    for line in os.fsencode(text).split(b"\n")[:1000]:
        words = line.split()
        if len(words) >= 2 and words[0] == b"nameserver":
            with contextlib.suppress(ValueError):
                found.add(str(ipaddress.ip_address(words[1].partition(b"%")[0].decode("ascii"))))
    return tuple(sorted(found))
