"""The ways of personas' rules (``via``): a mark, two routing rules a family, and a table where the kernel has none.

A packet with the mark of a way takes it or is refused: where its gateway, device or table is gone, the rule after it
says unreachable, so nothing leaks to the machine's own routes.  Through pyroute2, which is imported with the first way:
it costs 26 MB and 0.1 s, and most machines have none.  Needs CAP_NET_ADMIN.
"""

import contextlib
import errno
import ipaddress
import json
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persona.documents import Persona
from persona.network import OUR_TABLES, Via, parse_via
from persona.problems import PersonaError, Reason
from persona_guest import files
from persona_guest.core.persona_cgroups import PersonaCgroup
from persona_guest.core.ruleset import MARK_MASK, MARK_SHIFT, MARKS_MAX
from persona_guest.enforce.facility import Wanted
from persona_guest.enforce.network.table import Table
from persona_guest.enforce.plan import Operation, Plan

log = logging.getLogger("persona.enforce")

_PRIORITY = 21_000  # of the first way's first rule: before those of the main table (32766), after local's (0)
_PRIORITIES = range(_PRIORITY, _PRIORITY + 2 * MARKS_MAX + 2)


class EgressRoutes:
    """The number of each way, from which its mark comes; kept in a file before anything is made under it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.numbers: dict[Via, int] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # then all are made anew
            kept = json.loads(path.read_text())
            self.numbers = {parse_via(text): int(number) for text, number in kept.items()}
        self.made = set(self.numbers)
        self.left_over = path.exists()

    def number(self, via: Via) -> int:
        """The number of a way, from 1 on; a free one for a way that has none.

        Raises ``PersonaError`` where all are taken.
        """
        found = self.numbers.get(via)
        if found is None:
            free = set(range(1, MARKS_MAX + 1)) - set(self.numbers.values())
            if not free:
                raise PersonaError(Reason.ENFORCEMENT_FAILED, f"via {via}: {MARKS_MAX} ways are in use already")
            found = self.numbers[via] = min(free)
        return found

    def making(self, via: Via) -> None:
        """Writes into the file that this way is about to be made.  Raises ``OSError``."""
        self.made.add(via)
        self._save()

    def gone(self, via: Via) -> None:
        """Forgets a route that was removed, and frees its number."""
        self.made.discard(via)
        self.numbers.pop(via, None)
        try:
            self._save()
        except OSError as error:  # the next agent looks for one way too many, and finds nothing of it
            log.error("route via %s was removed, but %s still lists it: %s", via, self._path, error)

    def _save(self) -> None:
        if not self.made:
            self._path.unlink(missing_ok=True)
            self.left_over = False
            return
        files.write(self._path, json.dumps({str(via): self.numbers[via] for via in self.made}))


class Routing:
    """Routing rules and tables of one network namespace: that in which it is first used.  Raises ``OSError``."""

    def __init__(self) -> None:
        self._route: Any = None

    def open(self, via: Via, number: int) -> None:
        """Leads packets with the mark of ``number`` by the way ``via``; what cannot take it is unreachable.

        That holds also where this fails.  What is there of it already stays.
        """
        for family in _families():
            self._rule("add", family, number, 1, action="unreachable")
            self._rule("add", family, number, 0, table=via.table or OUR_TABLES[number])
        if via.table:
            return
        way: dict[str, Any] = {"table": OUR_TABLES[number], "dst": "default"}
        if via.device:
            way["oif"] = self._index(via.device)
        families = _families()
        if via.gateway:
            way["gateway"] = via.gateway
            version = ipaddress.ip_address(via.gateway).version
            families = [socket.AF_INET6 if version == 6 else socket.AF_INET]
        for family in families:
            self._call("route", "replace", family=family, **way)

    def hold(self, number: int) -> None:
        """Makes packets with the mark of ``number`` unreachable, then removes whatever else there is of the way."""
        for family in _families():
            self._rule("add", family, number, 1, action="unreachable")
            self._clear(family, number)

    def close(self, number: int) -> None:
        """Removes all that there is of the way: packets with its mark go as if they had none."""
        for family in _families():
            self._clear(family, number)
            with _ignoring(errno.ENOENT):
                self._rule("del", family, number, 1)

    def _clear(self, family: int, number: int) -> None:
        with _ignoring(errno.ENOENT):
            self._rule("del", family, number, 0)
        with _ignoring(errno.ENOENT, errno.ESRCH):
            self._call("flush_routes", family=family, table=OUR_TABLES[number])

    def found(self) -> set[int]:
        """The numbers under which there is any rule, whoever made it."""
        return {number for family in _families() for number in self._rules(family)}

    def whole(self, via: Via, number: int) -> bool:
        """Whether nothing of a way was lost: a device that went down takes its routes along."""
        families = _families()
        if any(self._rules(family).count(number) != 2 for family in families):
            return False
        table = OUR_TABLES[number]
        return bool(via.table) or any(self._call("get_routes", family=family, table=table) for family in families)

    def _rules(self, family: int) -> list[int]:
        rules = [
            rule.get_attr("FRA_PRIORITY") or 0
            for rule in self._call("get_rules", family=family)
            if rule.get_attr("FRA_FWMASK") == MARK_MASK
        ]
        return [(priority - _PRIORITY) // 2 for priority in rules if priority in _PRIORITIES]

    def _rule(self, command: str, family: int, number: int, which: int, **more: Any) -> None:
        with _ignoring(errno.EEXIST):
            self._call(
                "rule",
                command,
                family=family,
                priority=_PRIORITY + 2 * number + which,
                fwmark=number << MARK_SHIFT,
                fwmask=MARK_MASK,
                **more,
            )

    def _index(self, device: str) -> int:
        found = self._call("link_lookup", ifname=device)
        if not found:
            raise OSError(errno.ENODEV, f"there is no network device {device}")
        return int(found[0])

    def hang_up(self) -> None:
        """Closes the kernel's socket; the next use opens another one."""
        if self._route is not None:
            self._route.close()
            self._route = None

    def _call(self, name: str, *words: str, **fields: Any) -> Any:
        # not before the first way: it costs 26 MB; and a build machine may not have it
        from pyroute2 import IPRoute  # type: ignore[import-untyped,import-not-found,unused-ignore]  # it has none
        from pyroute2.netlink import exceptions  # type: ignore[import-untyped,import-not-found,unused-ignore]  # the same

        if self._route is None:
            self._route = IPRoute()
        try:
            return getattr(self._route, name)(*words, **fields)
        except exceptions.NetlinkError as error:
            raise OSError(error.code, os.strerror(error.code)) from error


def _families() -> list[int]:
    return [socket.AF_INET, socket.AF_INET6] if os.path.exists("/proc/sys/net/ipv6") else [socket.AF_INET]


@contextlib.contextmanager
def _ignoring(*numbers: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise


@dataclass(frozen=True, slots=True)
class Open:
    """Makes a way that no packet takes yet, whole or not at all."""

    via: Via
    number: int
    egress_routes: EgressRoutes = field(repr=False, compare=False)
    routing: Routing = field(repr=False, compare=False)

    def describe(self) -> Mapping[str, object]:
        return {"op": "routes.open", "via": str(self.via), "mark": self.number << MARK_SHIFT}

    def apply(self) -> None:
        try:
            self.egress_routes.making(self.via)
            self.routing.hold(self.number)  # and not what an agent before this one left half done
            self.routing.open(self.via, self.number)
        except Exception as error:  # a library's own too: one that counted as made would be bound without its rules
            self.undo()
            if isinstance(error, OSError):
                raise OSError(error.errno, f"via {self.via}: {error.strerror}") from error
            raise

    def undo(self) -> None:
        try:
            self.routing.close(self.number)
        finally:
            self.egress_routes.gone(self.via)


@dataclass(frozen=True, slots=True)
class Repair:
    """Mends a way that packets may be sent already.

    It never goes, so that they never take another; while it cannot be had they are refused, and nothing else fails.
    """

    via: Via
    number: int
    egress_routes: EgressRoutes = field(repr=False, compare=False)
    routing: Routing = field(repr=False, compare=False)

    def describe(self) -> Mapping[str, object]:
        return {"op": "routes.repair", "via": str(self.via), "mark": self.number << MARK_SHIFT}

    def apply(self) -> None:
        steps: list[Callable[[], None]] = [lambda: self.routing.open(self.via, self.number)]
        if self.via not in self.egress_routes.made:  # what is found under its number is another's
            steps = [lambda: self.egress_routes.making(self.via), lambda: self.routing.hold(self.number), *steps]
        for step in steps:
            try:
                step()
            except OSError as error:
                log.error("via %s: %s; what would go that way is refused until it is mended", self.via, error.strerror)

    def undo(self) -> None:
        """Nothing: what it made refuses more than what was before."""


@dataclass(frozen=True, slots=True)
class Close:
    """Removes what there is under a number; ``via`` where it is known which way that was."""

    via: Via | None
    number: int
    egress_routes: EgressRoutes = field(repr=False, compare=False)
    routing: Routing = field(repr=False, compare=False)

    def describe(self) -> Mapping[str, object]:
        return {"op": "routes.close", "via": str(self.via or ""), "mark": self.number << MARK_SHIFT}

    def apply(self) -> None:
        self.routing.close(self.number)
        if self.via is not None:
            self.egress_routes.gone(self.via)

    def undo(self) -> None:
        if self.via is not None:
            self.egress_routes.numbers[self.via] = self.number
            Open(self.via, self.number, self.egress_routes, self.routing).apply()


class Routes:
    """The facility.  It comes before the network's: nothing is marked for a way that is not there."""

    name = "routes"

    def __init__(
        self, egress_routes: EgressRoutes, routing: Routing, table: Table, user_rules: Mapping[int, Persona]
    ) -> None:
        self._egress_routes = egress_routes
        self._routing = routing
        self._table = table
        self._user_rules = user_rules

    def enter(self, place: PersonaCgroup, persona: Persona) -> Plan:
        return self.need(persona)

    def need(self, persona: Persona) -> Plan:
        """Makes the ways that a persona's rules name, where they are not there yet."""
        return tuple(self._open(via) for via in sorted(_egress_routes([persona]) - self._egress_routes.made, key=str))

    def leave(self, place: PersonaCgroup) -> Plan:
        return self.close_unused()

    def close_unused(self) -> Plan:
        """Takes back the ways that nothing bound by the table goes any more."""
        return tuple(self._close(via) for via in sorted(self._egress_routes.made - self._table.ways, key=str))

    def release(self) -> Plan:
        return self.reconcile({})

    def reconcile(self, wanted: Wanted) -> Plan:
        needed = _egress_routes([*wanted.values(), *self._user_rules.values()])
        if not needed and not self._egress_routes.left_over and not self._egress_routes.made:
            return ()
        numbers = {via: self._egress_routes.number(via) for via in sorted(needed, key=str)}
        steps: list[Operation] = [
            Repair(via, number, self._egress_routes, self._routing)
            for via, number in numbers.items()
            if via not in self._egress_routes.made or not self._routing.whole(via, number)
        ]
        if self._table.known:  # else an agent before this one may still send packets there
            unused = self._egress_routes.made - needed - self._table.ways
            steps += [self._close(via) for via in sorted(unused, key=str)]
            known = {self._egress_routes.numbers[via] for via in self._egress_routes.made | needed}
            strange = self._routing.found() - known
            steps += [Close(None, number, self._egress_routes, self._routing) for number in sorted(strange)]
        return tuple(steps)

    def _open(self, via: Via) -> Open:
        return Open(via, self._egress_routes.number(via), self._egress_routes, self._routing)

    def _close(self, via: Via) -> Close:
        return Close(via, self._egress_routes.numbers[via], self._egress_routes, self._routing)


def _egress_routes(personas: Iterable[Persona]) -> set[Via]:
    return {rule.via for persona in personas for rule in persona.network_access if rule.via is not None}
