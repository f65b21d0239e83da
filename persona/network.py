"""Network rules.

``10.20.0.0/16:tcp/5432``, ``any:tcp/443``, ``2001:db8::/32``, ``icmp``, ``dns``, ``in:any:tcp/22``.
"""

import ipaddress
import re
from dataclasses import dataclass

from persona.parsing import Bad

_SERVICE = re.compile(r":(tcp|udp)/([0-9,-]+|\*)$", re.ASCII)


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

    def __str__(self) -> str:
        head = "in:" if self.inbound else ""
        if self.protocol in ("icmp", "dns"):
            return head + self.protocol
        if self.protocol == "any":
            return head + self.network
        ports = ",".join(str(low) if low == high else f"{low}-{high}" for low, high in self.ports) or "*"
        return f"{head}{self.network}:{self.protocol}/{ports}"


def parse_rule(value: object) -> NetworkRule:
    """Raises ``Bad`` for anything that is not one of the forms above."""
    if not isinstance(value, str):
        raise Bad(f"expected a network rule, not {value!r}", "put it in quotes")
    text = value.strip()
    inbound = text.startswith("in:")
    text = text.removeprefix("in:")
    if text in ("icmp", "dns"):
        return NetworkRule(inbound, "any", text, ())
    protocol = "any"
    ports: tuple[tuple[int, int], ...] = ()
    service = _SERVICE.search(text)
    if service is not None:
        text, protocol, ports = text[: service.start()], service[1], _ports(service[2])
    if text == "any":
        return NetworkRule(inbound, "any", protocol, ports)
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise Bad(f"{value!r}: {error}", "like 10.20.0.0/16:tcp/5432, any:tcp/443, icmp or dns") from None
    return NetworkRule(inbound, str(network), protocol, ports)


def _ports(text: str) -> tuple[tuple[int, int], ...]:
    if text == "*":
        return ()
    ranges = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise Bad(f"{part!r} is no port or range of ports")
        first, last = int(low), int(high or low)
        if not 0 < first <= last < 65536:
            raise Bad(f"{part!r}: ports go from 1 to 65535, the lower first")
        ranges.append((first, last))
    return tuple(ranges)
