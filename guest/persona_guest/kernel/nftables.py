"""nf_tables over netlink: tables, chains, rules and elements as messages; linux/netfilter/nf_tables.h.

Not through libnftables: its JSON cannot say ``socket cgroupv2``, it can neither add nor delete an element of
a cgroup by number (so none whose cgroup is gone), and with a thousand personas it reads 140 ms of
state before each change (docs/decisions/0012-nftables-by-netlink.md).  What is written here reads the
same in nft(8).
"""

import functools
import ipaddress
import sys
from collections.abc import Iterable
from typing import assert_never

from persona_guest.core import ruleset as r
from persona_guest.kernel.netlink import (
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    attribute,
    nested,
    text,
    u32,
    u64,
)

SUBSYSTEM = 10
CHANGES = 7  # NFNLGRP_NFTABLES: every change of every table
_NEW_TABLE, _DEL_TABLE, _NEW_CHAIN, _GET_CHAIN, _DEL_CHAIN, _NEW_RULE = 0, 2, 3, 4, 5, 6
_NEW_SET, _NEW_ELEMENT, _DEL_ELEMENT = 9, 12, 14
_NEW_OBJECT, _GET_OBJECT, _DEL_OBJECT = 18, 19, 20
_GET_TABLE = 1
_INET = 1  # NFPROTO_INET
_LOCAL_IN, _LOCAL_OUT, _POSTROUTING = 1, 3, 4  # enum nf_inet_hooks
_HOOKS = {"input": _LOCAL_IN, "output": _LOCAL_OUT, "postrouting": _POSTROUTING}
_FAMILIES = {4: 2, 6: 10}  # NFPROTO_IPV4, NFPROTO_IPV6
_REGISTER = 1  # NFT_REG_1: one value at a time is all that is needed
_EQ, _NEQ, _LTE, _GTE = 0, 1, 3, 5  # enum nft_cmp_ops
_NETWORK, _TRANSPORT = 1, 2  # enum nft_payload_bases
_META_MARK, _META_IIF, _META_OIF, _META_SKUID, _META_NFPROTO, _META_L4PROTO = 3, 4, 5, 10, 15, 16
_SOCKET_CGROUPV2 = 3
_CT_DIRECTION, _CT_REPLY = 1, 1
_JUMP = -3 & 0xFFFFFFFF
_GOTO = -4 & 0xFFFFFFFF
_ACCEPT = 1
_REJECT_TCP_RST, _REJECT_ICMPX, _ADMIN_PROHIBITED = 1, 2, 3
_MAP, _VERDICT_TYPE, _VERDICT_SIZE = 0x8, 0xFFFFFF00, 16
_COUNTER = 1  # NFT_OBJECT_COUNTER
# types of keys, which only nft(8) looks at, and that they are in the order of this machine
_TYPE_UID, _TYPE_CGROUP, _TYPE_IPV4, _TYPE_IPV6 = 24, 46, 7, 8
_HOST_ORDER = bytes((0, 4, 1, 0, 0, 0))
_TCP_FLAGS_AT, _SYN, _ACK = 13, 0x02, 0x10
_OURS = text(1, r.TABLE)
_LOOPBACK_INDEX = 1  # LOOPBACK_IFINDEX, in every network namespace


# --- objects ----------------------------------------------------------------------------------------


def _message(kind: int, flags: int, *body: bytes) -> Message:
    return Message(SUBSYSTEM << 8 | kind, flags, _INET, b"".join(body))


def add_table() -> Message:
    """Makes our table, where it is not there."""
    return _message(_NEW_TABLE, NLM_F_CREATE, _OURS)


def delete_table() -> Message:
    """Deletes our table with all that is in it."""
    return _message(_DEL_TABLE, 0, _OURS)


def get_table() -> Message:
    """Asks for our table; answered with ENOENT where there is none."""
    return _message(_GET_TABLE, 0, _OURS)


def add_map(name: str, *, owner: bool, ident: int) -> Message:
    """Makes a map from cgroups, or from owners, to verdicts."""
    kind, size = (_TYPE_UID, 4) if owner else (_TYPE_CGROUP, 8)
    data = u32(6, _VERDICT_TYPE) + u32(7, _VERDICT_SIZE)
    return _set(name, ident, kind, size, u32(3, _MAP) + data + attribute(13, _HOST_ORDER))


def add_addresses(name: str, version: int, ident: int) -> Message:
    """Makes a set of addresses of one IP version."""
    kind, size = (_TYPE_IPV6, 16) if version == 6 else (_TYPE_IPV4, 4)
    return _set(name, ident, kind, size, b"")


def _set(name: str, ident: int, kind: int, size: int, more: bytes) -> Message:
    head = _OURS + text(2, name) + u32(10, ident) + u32(4, kind) + u32(5, size)
    return _message(_NEW_SET, NLM_F_CREATE | NLM_F_EXCL, head, more)


def add_element(name: str, key: bytes, chain: str | None = None) -> Message:
    """Adds an element to a set or, with the chain that it goes to, to a map."""
    data = nested(2, _verdict(_GOTO, chain)) if chain is not None else b""
    return _element(_NEW_ELEMENT, NLM_F_CREATE | NLM_F_EXCL, name, nested(1, attribute(1, key)) + data)


def delete_element(name: str, key: bytes) -> Message:
    """Deletes the element with that key."""
    return _element(_DEL_ELEMENT, 0, name, nested(1, attribute(1, key)))


def _element(kind: int, flags: int, name: str, element: bytes) -> Message:
    return _message(kind, flags, _OURS, text(2, name), nested(3, nested(1, element)))


def cgroup_key(ident: int) -> bytes:
    """The key of a cgroup by its number, which is the inode number of its directory."""
    return ident.to_bytes(8, sys.byteorder)


def owner_key(uid: int) -> bytes:
    """The key of a user by their number."""
    return uid.to_bytes(4, sys.byteorder)


def address_key(address: str) -> bytes:
    """The key of an IP address: its bytes in network order."""
    return ipaddress.ip_address(address).packed


def add_chain(chain: r.Chain) -> list[Message]:
    """Makes a chain with its rules."""
    return [declare_chain(chain), *(_rule(chain.name, rule) for rule in chain.rules)]


def declare_chain(chain: r.Chain) -> Message:
    """Makes a chain without its rules."""
    hook = b""
    if chain.hook is not None:
        priority = chain.hook.priority & 0xFFFFFFFF
        hook = nested(4, u32(1, _HOOKS[chain.hook.name]), u32(2, priority)) + u32(5, _ACCEPT) + text(7, chain.hook.type)
    return _message(_NEW_CHAIN, NLM_F_CREATE | NLM_F_EXCL, _OURS, text(3, chain.name), hook)


def delete_chain(name: str) -> Message:
    """Deletes a chain with its rules; refused with EBUSY while anything leads to it."""
    return _message(_DEL_CHAIN, 0, _OURS, text(3, name))


def add_counter(name: str) -> Message:
    """Makes a counter of packets and bytes."""
    return _message(_NEW_OBJECT, NLM_F_CREATE, _OURS, text(2, name), u32(3, _COUNTER), nested(4, u64(2, 0)))


def delete_counter(name: str) -> Message:
    """Deletes a counter; refused with EBUSY while a rule counts in it."""
    return _message(_DEL_OBJECT, 0, _OURS, text(2, name), u32(3, _COUNTER))


def get_counters() -> Message:
    """Lists our counters."""
    return _message(_GET_OBJECT, 0, _OURS, u32(3, _COUNTER))


# --- rules ------------------------------------------------------------------------------------------


def _rule(chain: str, rule: r.Rule) -> Message:
    expressions = b"".join(map(_encoded, rule))
    return _message(_NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, _OURS, text(2, chain), nested(4, expressions))


@functools.lru_cache(8192)  # most rules are made of the same few
def _encoded(item: r.Expression) -> bytes:
    return b"".join(nested(1, text(1, name), nested(2, data)) for name, data in _expression(item))


def _expression(item: r.Expression) -> Iterable[tuple[str, bytes]]:
    match item:
        case r.Protocol(number):
            return [_meta(_META_L4PROTO), _compare(_EQ, bytes((number,)))]
        case r.Family(version):
            return [_meta(_META_NFPROTO), _compare(_EQ, bytes((_FAMILIES[version],)))]
        case r.Address(side, network):
            return _address(side, ipaddress.ip_network(network))
        case r.Resolver(side, version):
            return [*_load_address(side, version), ("lookup", text(1, f"resolvers{version}") + u32(2, _REGISTER))]
        case r.Port(side, low, high):
            if low == high:
                return [_port(side), _compare(_EQ, low.to_bytes(2, "big"))]
            return [_port(side), _compare(_GTE, low.to_bytes(2, "big")), _compare(_LTE, high.to_bytes(2, "big"))]
        case r.Not(what):
            if isinstance(what, r.Protocol):
                return [_meta(_META_L4PROTO), _compare(_NEQ, bytes((what.number,)))]
            return [_port(what.side), _compare(_NEQ, what.low.to_bytes(2, "big"))]
        case r.NotOpening():
            mask = bytes((_SYN | _ACK,))
            return [_payload(_TRANSPORT, _TCP_FLAGS_AT, 1), _mask(mask, b"\0"), _compare(_NEQ, bytes((_SYN,)))]
        case r.ReplyDirection():
            return [("ct", u32(1, _REGISTER) + u32(2, _CT_DIRECTION)), _compare(_EQ, bytes((_CT_REPLY,)))]
        case r.Loopback(side):
            index = _LOOPBACK_INDEX.to_bytes(4, sys.byteorder)
            return [_meta(_META_OIF if side == "oif" else _META_IIF), _compare(_EQ, index)]
        case r.ByCgroup(level, name):
            load_cgroup = u32(1, _SOCKET_CGROUPV2) + u32(2, _REGISTER) + u32(3, level)
            return [("socket", load_cgroup), _look_up(name)]
        case r.ByOwner(name):
            return [_meta(_META_SKUID), _look_up(name)]
        case r.Marked(index):
            masked = _mask(_mark(r.MARK_MASK), _mark(0))
            return [_meta(_META_MARK), masked, _compare(_EQ, _mark(index << r.MARK_SHIFT))]
        case r.Mark(index):
            changed = _mask(_mark(r.MARK_MASK ^ 0xFFFFFFFF), _mark(index << r.MARK_SHIFT))
            return [_meta(_META_MARK), changed, ("meta", u32(2, _META_MARK) + u32(3, _REGISTER))]
        case r.Count(name):
            return [("objref", text(2, name) + u32(1, _COUNTER))]
        case r.Log(prefix):
            limit = u64(1, r.LOG_RATE) + u64(2, 1) + u32(3, r.LOG_BURST)
            group = attribute(1, r.LOG_GROUP.to_bytes(2, "big"))
            return [("limit", limit), ("log", group + text(2, prefix) + u32(3, r.LOG_BYTES))]
        case r.NftVerdict(what):
            return [_final(what)]
    assert_never(item)


def _final(what: str) -> tuple[str, bytes]:
    if what == "accept":
        return "immediate", u32(1, 0) + nested(2, _verdict(_ACCEPT))
    if what.startswith("jump "):
        return "immediate", u32(1, 0) + nested(2, _verdict(_JUMP, what.removeprefix("jump ")))
    if what == "reset":
        return "reject", u32(1, _REJECT_TCP_RST)
    if what == "refuse":
        return "reject", u32(1, _REJECT_ICMPX) + attribute(2, bytes((_ADMIN_PROHIBITED,)))
    if what == "masquerade":
        return "masq", b""
    raise ValueError(what)


def _verdict(code: int, chain: str | None = None) -> bytes:
    return nested(2, u32(1, code), text(2, chain) if chain is not None else b"")


def _look_up(name: str) -> tuple[str, bytes]:
    return "lookup", text(1, name) + u32(2, _REGISTER) + u32(3, 0)  # the verdict register


def _meta(key: int) -> tuple[str, bytes]:
    return "meta", u32(2, key) + u32(1, _REGISTER)


def _compare(operator: int, value: bytes) -> tuple[str, bytes]:
    return "cmp", u32(1, _REGISTER) + u32(2, operator) + nested(3, attribute(1, value))


def _mask(mask: bytes, xor: bytes) -> tuple[str, bytes]:
    head = u32(1, _REGISTER) + u32(2, _REGISTER) + u32(3, len(mask))
    return "bitwise", head + nested(4, attribute(1, mask)) + nested(5, attribute(1, xor))


def _mark(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


def _payload(base: int, offset: int, size: int) -> tuple[str, bytes]:
    return "payload", u32(1, _REGISTER) + u32(2, base) + u32(3, offset) + u32(4, size)


def _port(side: str) -> tuple[str, bytes]:
    return _payload(_TRANSPORT, 0 if side == "sport" else 2, 2)


def _load_address(side: str, version: int) -> list[tuple[str, bytes]]:
    size, source, destination = (16, 8, 24) if version == 6 else (4, 12, 16)
    offset = source if side == "saddr" else destination
    return [_meta(_META_NFPROTO), _compare(_EQ, bytes((_FAMILIES[version],))), _payload(_NETWORK, offset, size)]


def _address(side: str, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> list[tuple[str, bytes]]:
    found = _load_address(side, network.version)
    if network.prefixlen < network.max_prefixlen:
        mask = network.netmask.packed
        found.append(_mask(mask, bytes(len(mask))))
    return [*found, _compare(_EQ, network.network_address.packed)]
