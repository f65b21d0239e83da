"""The nftables table ``inet persona``, and the transactions that change it.

No other table is touched.  What is bound where is mirrored here, so that nothing is read before a change.  Needs
CAP_NET_ADMIN.
"""

import errno
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass

from persona.network import Via
from persona_guest.core import ruleset
from persona_guest.core.ruleset import Access
from persona_guest.kernel import netlink, nftables
from persona_guest.kernel.netlink import Message, Netlink

Number = Callable[[Via], int]


@dataclass(frozen=True, slots=True)
class Key:
    """What a packet is recognised by: a cgroup (``level`` 2 to 4) or an owner (``level`` 0), by number."""

    level: int
    number: int

    def packed(self) -> bytes:
        """The key in the form of the table's maps."""
        return nftables.cgroup_key(self.number) if self.level else nftables.owner_key(self.number)

    def maps(self, access: Access) -> list[tuple[str, str]]:
        """(map, chain) of each element that leads to ``access``."""
        if not self.level:
            return [("owner", access.out.name)]
        return [(f"out{self.level}", access.out.name), (f"in{self.level}", access.into.name)]


@dataclass(frozen=True, slots=True)
class Bound:
    """The rules that some cgroups, or an owner with theirs, are under."""

    keys: tuple[Key, ...]
    access: Access


class Table:
    """The table as this agent made it, and the transactions that change it."""

    def __init__(self, number: Number) -> None:
        self._netlink = Netlink()
        self._number = number
        self._there = False
        self.known = False  # whether nothing is there but what ``bound`` says
        self.disturbed = False  # whether somebody else changed it
        self._used: Counter[str] = Counter()
        self.ways: frozenset[Via] = frozenset()  # every way that something bound here may go
        self._resolvers: tuple[str, ...] = ()
        self.bound: dict[str, Bound] = {}

    @property
    def port(self) -> int:
        """The netlink port of the socket that changes the table: others are told of changes as from there."""
        return self._netlink.port

    def close(self) -> None:
        """Closes the socket; the table stays as it is."""
        self._netlink.close()

    def warm(self, access: Access) -> None:
        """Has the kernel load what a table with this needs: seconds, once a boot, for which a login would wait.

        Leaves no table behind.  Raises ``OSError``.
        """
        if not self.exists():
            messages = [*self._skeleton(), *_add_access(access)]
            for chain in ruleset.way_chains(range(1, len(access.ways) + 1)):
                messages += nftables.add_chain(chain)
            messages.append(nftables.delete_table())
            self._netlink.batch(nftables.SUBSYSTEM, messages)

    def bind(self, changes: Mapping[str, Bound | None]) -> None:
        """Brings names under their access, or under none, at once.  Raises ``OSError``; then nothing has changed."""
        new = [bound for bound in changes.values() if bound is not None]
        old = [self.bound[where] for where in changes if where in self.bound]
        messages: list[Message] = [] if self._there else self._skeleton()
        used = self._used.copy()
        for bound in new:
            used[bound.access.name] += 1
            if used[bound.access.name] == 1:
                messages += _add_access(bound.access)
        used.subtract(bound.access.name for bound in old)
        ways = self._ways_with(changes, old, new)
        messages += self._lead_ways(self.ways, ways)
        messages += _elements(old, new)
        for name in {bound.access.name for bound in old}:
            if not used[name]:
                del used[name]
                messages += _delete_access(name)
        self._netlink.batch(nftables.SUBSYSTEM, messages)
        self._there, self._used, self.ways = True, used, ways
        for where, after in changes.items():
            if after is None:
                self.bound.pop(where, None)
            else:
                self.bound[where] = after

    def rebuild(self, bound: Mapping[str, Bound]) -> None:
        """Replaces whatever table of ours there is; nothing bound, no table.  Raises ``OSError``."""
        messages = [nftables.add_table(), nftables.delete_table()]
        ways = _ways(bound.values())
        if bound:
            messages += self._skeleton()
            for access in {item.access.name: item.access for item in bound.values()}.values():
                messages += _add_access(access)
            messages += self._lead_ways(frozenset(), ways)
            messages += _elements((), bound.values())
        self._netlink.batch(nftables.SUBSYSTEM, messages)
        self.bound, self.ways = dict(bound), ways
        self._used = Counter(item.access.name for item in bound.values())
        self._there, self.known, self.disturbed = bool(bound), True, False

    def resolve(self, addresses: tuple[str, ...]) -> None:
        """Sets the addresses of the resolvers that ``dns`` means from now on.  Raises ``OSError``."""
        if addresses != self._resolvers and self._there:
            old, new = set(self._resolvers), set(addresses)
            messages = [nftables.delete_element(_family(a), nftables.address_key(a)) for a in sorted(old - new)]
            messages += [nftables.add_element(_family(a), nftables.address_key(a)) for a in sorted(new - old)]
            self._netlink.batch(nftables.SUBSYSTEM, messages)
        self._resolvers = addresses

    def refused(self) -> dict[str, int]:
        """How many packets were refused, by the name of the access."""
        found = {}
        for body in self._netlink.dump(nftables.get_counters()):
            values = dict(netlink.attributes(body))
            counts = dict(netlink.attributes(values.get(4, b"")))
            found[netlink.string(values.get(2, b""))] = int.from_bytes(counts.get(2, b""), "big")
        return found

    def exists(self) -> bool:
        """Whether there is a table of ours, this agent's or one before it.  Raises ``OSError``."""
        try:
            self._netlink.request(nftables.get_table())
        except OSError as error:
            if error.errno == errno.ENOENT:
                self._there, self.known = False, True
                return False
            raise
        return True

    def _ways_with(self, names: Container[str], old: list[Bound], new: list[Bound]) -> frozenset[Via]:
        if not _ways([*old, *new]):
            return self.ways
        return _ways([*(item for name, item in self.bound.items() if name not in names), *new])

    def _skeleton(self) -> list[Message]:
        messages = [nftables.add_table()]
        names = ["owner", *(f"{way}{level}" for level in ruleset.LEVELS for way in ("out", "in"))]
        messages += [nftables.add_map(name, owner=name == "owner", ident=index) for index, name in enumerate(names, 1)]
        messages += [nftables.add_addresses(f"resolvers{v}", v, len(names) + v) for v in (4, 6)]
        messages += [nftables.add_element(_family(a), nftables.address_key(a)) for a in self._resolvers]
        for chain in ruleset.base_chains():
            messages += nftables.add_chain(chain)
        return messages

    def _lead_ways(self, before: frozenset[Via], after: frozenset[Via]) -> list[Message]:
        """The chain that gives packets on a way the address of its device."""
        if after == before:
            return []
        messages = [nftables.delete_chain(ruleset.WAYS)] if before else []
        for chain in ruleset.way_chains(sorted(map(self._number, after))):
            messages += nftables.add_chain(chain)
        return messages


def _ways(bound: Iterable[Bound]) -> frozenset[Via]:
    return frozenset(via for item in bound for via in item.access.ways)


def _family(address: str) -> str:
    return "resolvers6" if ":" in address else "resolvers4"


def _add_access(access: Access) -> list[Message]:
    return [
        nftables.add_counter(access.counter),
        *nftables.add_chain(access.out),
        *nftables.add_chain(access.into),
    ]


def _delete_access(name: str) -> list[Message]:
    return [nftables.delete_chain(f"{name}/out"), nftables.delete_chain(f"{name}/in"), nftables.delete_counter(name)]


def _elements(old: Iterable[Bound], new: Iterable[Bound]) -> list[Message]:
    gone, come = _places(old), _places(new)
    stay = gone.keys() & come.keys()
    return [
        *(nftables.delete_element(name, key.packed()) for key, name, chain in gone if (key, name, chain) not in stay),
        *(
            nftables.add_element(name, key.packed(), chain)
            for key, name, chain in come
            if (key, name, chain) not in stay
        ),
    ]


def _places(items: Iterable[Bound]) -> dict[tuple[Key, str, str], None]:
    """(key, map, chain) of each element, in order."""
    return {(key, *leads): None for item in items for key in item.keys for leads in key.maps(item.access)}
