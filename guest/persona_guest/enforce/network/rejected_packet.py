"""What a refused packet was about, in the words of network rules, from its first bytes."""

import ipaddress

_LOCAL_OUT = 3  # enum nf_inet_hooks
_PORTED = {6: "tcp", 17: "udp"}
_NAMES = {1: "icmp", 58: "icmp"}


def target(hook: int, data: bytes) -> str:
    """``192.0.2.7:tcp/443``, or ``in:192.0.2.7:udp/53``; of a packet that makes no sense, ``?``."""
    outgoing = hook == _LOCAL_OUT
    version = data[0] >> 4 if data else 0
    if version == 4 and len(data) >= 20:
        head, protocol, source, destination = (data[0] & 15) * 4, data[9], data[12:16], data[16:20]
    elif version == 6 and len(data) >= 40:
        head, protocol, source, destination = 40, data[6], data[8:24], data[24:40]
    else:
        return "?"
    peer = str(ipaddress.ip_address(destination if outgoing else source))
    named = _PORTED.get(protocol)
    ports = data[head + 2 : head + 4]
    if named is not None and len(ports) == 2:
        service = f":{named}/{int.from_bytes(ports, 'big')}"
    else:
        service = f" {_NAMES.get(protocol, f'protocol {protocol}')}"
    return ("" if outgoing else "in:") + peer + service
