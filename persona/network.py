"""Network rules: who a persona may talk to, who may talk to it, and by which way.

``10.20.0.0/16:tcp/5432``, ``any:tcp/443``, ``2001:db8::/32``, ``icmp``, ``dns``, ``in:any:tcp/8080``,
``10.20.0.0/16:tcp/5432 via 10.0.0.1``, ``any:tcp/443 via dev eth1``, ``dns via table 100``.
docs/network.md says what each means.
"""

import ipaddress
import re
from dataclasses import dataclass

from persona.guesses import rule_meant
from persona.parsing import Bad, shown

RULE_MAX = 512  # characters of one rule
PORT_RANGES_MAX = 16
_SERVICE = re.compile(r":(tcp|udp)/([0-9,-]+|\*)$", re.ASCII)
_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}", re.ASCII)  # IFNAMSIZ, netdevice(7)
_TABLE_MAX = (1 << 32) - 1
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
_NUMBER = re.compile(r"[1-9][0-9]*", re.ASCII)  # no leading zero: nobody can tell whether it was meant as octal
_VIA_HINT = "via GATEWAY, via GATEWAY dev DEVICE, via dev DEVICE or via table NUMBER"
OUR_TABLES = range(21_000, 21_256)  # routing tables that the guest makes for gateways and devices


@dataclass(frozen=True, slots=True)
class Via:
    """The way that packets take instead of the machine's own: a gateway, a device, or a routing table.

    Exactly one of ``gateway`` (with or without ``device``), ``device`` and ``table`` is set.
    """

    gateway: str = ""
    device: str = ""
    table: int = 0

    def __str__(self) -> str:
        if self.table:
            return f"table {self.table}"
        device = f"dev {self.device}" if self.device else ""
        return f"{self.gateway} {device}".strip()


@dataclass(frozen=True, slots=True)
class NetworkRule:
    """One destination (or, with ``inbound``, source) that a persona may talk to.

    ``network`` is a CIDR prefix or ``any``; ``protocol`` is tcp, udp, icmp, dns or any; ``ports``
    are inclusive ranges, empty = all.
    """

    inbound: bool
    network: str
    protocol: str
    ports: tuple[tuple[int, int], ...]
    via: Via | None = None

    def __str__(self) -> str:
        tail = f" via {self.via}" if self.via else ""
        if self.protocol in ("icmp", "dns"):
            return self.protocol + tail
        head = "in:" if self.inbound else ""
        if self.protocol == "any":
            return head + self.network + tail
        ports = ",".join(str(low) if low == high else f"{low}-{high}" for low, high in self.ports) or "*"
        return f"{head}{self.network}:{self.protocol}/{ports}{tail}"


def parse_rule(value: object) -> NetworkRule:
    """Raises ``Bad`` for anything that is not one of the forms above, or that could never match."""
    if not isinstance(value, str) or len(value) > RULE_MAX:
        raise Bad(f"expected a network rule, not {shown(value)}", rule_meant(value))
    text, led, way = value.strip().partition(" via ")
    text = text.strip()
    inbound = text.startswith("in:")
    text = text.removeprefix("in:")
    via = parse_via(way) if led else None
    if inbound and via is not None:
        raise Bad(f"{value!r}: 'via' is for what goes out", "answers take the machine's own routes: leave it away")
    if text in ("icmp", "dns"):
        if inbound:
            raise Bad(
                f"{value!r}: 'in:' is for listening sockets", "the kernel answers pings; in:any:udp/53 for a server"
            )
        return NetworkRule(inbound, "any", text, (), via)
    protocol = "any"
    ports: tuple[tuple[int, int], ...] = ()
    service = _SERVICE.search(text)
    if service is not None:
        text, protocol, ports = text[: service.start()], service[1], _ports(service[2])
    if text == "any":
        return NetworkRule(inbound, "any", protocol, ports, via)
    network = _network(text, value)
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_MAPPED):
        raise Bad(f"{value!r}: IPv4-mapped addresses never travel", "write the IPv4 prefix: it covers them")
    if via is not None and via.gateway and ipaddress.ip_address(via.gateway).version != network.version:
        raise Bad(f"{value!r}: the gateway is of the other IP version", f"an IPv{network.version} gateway")
    return NetworkRule(inbound, str(network), protocol, ports, via)


def _network(text: str, value: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """The prefix that a rule names.  Raises ``Bad``; ``value`` is the whole rule."""
    address, slash, length = text.partition("/")
    if "%" in text:
        fix = "leave '%' and what follows away; 'via dev DEVICE' says by which device packets leave"
        raise Bad(f"{shown(value)}: an address in a rule is for every interface", fix)
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        raise Bad(f"{shown(value)} is not a network rule", rule_meant(value)) from None
    if slash and length != "0" and not _NUMBER.fullmatch(length):  # 08, 255.255.0.0, 0.0.255.255
        raise Bad(f"{shown(value)}: {length[:40]!r} is not the length of a prefix", rule_meant(value))
    if network.num_addresses == 1 and network.network_address.is_unspecified:
        raise Bad(f"{shown(value)}: nobody has the address {address}", "'any' is everybody")
    return network


def parse_via(text: str) -> Via:
    """What follows ``via``.  Raises ``Bad``."""
    words = text.split()
    if len(words) == 2 and words[0] == "table":
        if not _NUMBER.fullmatch(words[1]) or int(words[1]) > _TABLE_MAX:
            raise Bad(f"via {text}: no number of a routing table", _VIA_HINT)
        table = int(words[1])
        if table == 255 or table in OUR_TABLES:
            raise Bad(f"via {text}: that table is not the operator's", f"not 255 (local), nor {OUR_TABLES[0]} and up")
        return Via(table=table)
    if len(words) == 2 and words[0] == "dev":
        return Via(device=_device(words[1]))
    if len(words) not in (1, 3) or (len(words) == 3 and words[1] != "dev"):
        raise Bad(f"via {text}: not understood", _VIA_HINT)
    try:
        gateway = ipaddress.ip_address(words[0])
    except ValueError:
        raise Bad(f"via {text}: {words[0]!r} is not an address", _VIA_HINT) from None
    if "%" in words[0]:
        address, _, device = words[0].partition("%")
        raise Bad(f"via {text}: a device is named apart from the gateway", f"via {address} dev {device or 'DEVICE'}")
    if gateway.is_multicast or gateway.is_unspecified or gateway.is_loopback:
        raise Bad(f"via {text}: {words[0]} can be no gateway", "the address of a router on one of this VM's networks")
    if gateway.is_link_local and len(words) == 1:
        raise Bad(f"via {text}: a link-local gateway needs its device", f"via {words[0]} dev DEVICE")
    return Via(str(gateway), _device(words[2]) if len(words) == 3 else "")


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text) or text == "lo":
        raise Bad(f"{text!r} is not a network device to go out by", _VIA_HINT)
    return text


def _ports(text: str) -> tuple[tuple[int, int], ...]:
    if text == "*":
        return ()
    ranges = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        if not _NUMBER.fullmatch(low) or (dash and not _NUMBER.fullmatch(high)):
            fix = "a number without leading zeros, like 443, or a range, like 8000-8080"
            raise Bad(f"{shown(part)} is not a port or a range of ports", fix)
        first, last = int(low), int(high or low)
        if not 0 < first <= last < 65536:
            raise Bad(f"{part!r}: ports go from 1 to 65535, the lower first")
        ranges.append((first, last))
    if len(ranges) > PORT_RANGES_MAX:
        raise Bad(f"{len(ranges)} ranges of ports, at most {PORT_RANGES_MAX}", "write more rules")
    return tuple(ranges)
