"""The network part of a persona: what is bound under which rules in our nftables table.

What other tables refuse stays refused.  Each operation is one transaction; ``reconcile`` replaces the whole
table in one step, so that no packet meets a state in between.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from persona.documents import Persona
from persona_guest.core import ruleset
from persona_guest.core.places import Place
from persona_guest.core.ruleset import Access
from persona_guest.enforce.interface import Wanted
from persona_guest.enforce.plan import Plan
from persona_guest.enforce.table import Bound, Key, Number, Table

_KNOWN_MAX = 2048  # what was worked out once, for when everything is looked at again


@dataclass(frozen=True, slots=True)
class Bind:
    """Brings one cgroup, or one owner with his slice, under an access in one transaction."""

    where: str
    access: Access | None
    before: Bound | None
    table: Table = field(repr=False, compare=False)
    keys: Callable[[], tuple[Key, ...]] = field(repr=False, compare=False)

    def describe(self) -> Mapping[str, object]:
        if self.access is None:
            return {"op": "network.unbind", "where": self.where}
        return {"op": "network.bind", "where": self.where, "under": self.access.name, "rules": self.access.texts}

    def apply(self) -> None:
        bound = Bound(self.keys(), self.access) if self.access is not None else None
        self.table.bind(self.where, bound)

    def undo(self) -> None:
        self.table.bind(self.where, self.before)


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Makes the whole table anew in one transaction, or removes it.  It is not undone: what should be, should be."""

    bound: Mapping[str, Bound]
    table: Table = field(repr=False, compare=False)

    def describe(self) -> Mapping[str, object]:
        under = {where: item.access.name for where, item in self.bound.items()}
        return {"op": "network.rebuild" if under else "network.remove", "under": under}

    def apply(self) -> None:
        self.table.rebuild(self.bound)

    def undo(self) -> None:
        """Nothing."""


class Network:
    """The facility.  ``bases`` says what each user is under outside of every place: its owner keeps it up to date."""

    name = "network"

    def __init__(self, table: Table, number: Number, cgroups: str, bases: Mapping[int, Persona]) -> None:
        self._table = table
        self._number = number
        self._cgroups = cgroups
        self._bases = bases
        self._known: dict[object, Access] = {}

    def enter(self, place: Place, persona: Persona) -> Plan:
        return self._bind(place.cgroup, persona, lambda: (self._cgroup(place.cgroup),))

    def leave(self, place: Place) -> Plan:
        return self._unbind(place.cgroup)

    def base(self, uid: int) -> Plan:
        """Binds, or lets go, a user's slice of cgroups and whatever else is his, as ``bases`` has it.

        To be asked again at each login: the slice may be another by then.
        """
        persona = self._bases.get(uid)
        if persona is None:
            return self._unbind(_owner(uid))
        return self._bind(_owner(uid), persona, lambda: self._owner_keys(uid))

    def reconcile(self, wanted: Wanted) -> Plan:
        bound = {}
        for place, persona in wanted.items():
            with contextlib.suppress(FileNotFoundError):  # nobody is there any more
                bound[place.cgroup] = Bound((self._cgroup(place.cgroup),), self._access(persona))
        for uid, base in self._bases.items():
            bound[_owner(uid)] = Bound(self._owner_keys(uid), self._access(base))
        there = self._table.exists()
        if there == bool(bound) and bound == self._table.bound and not self._table.disturbed:
            return ()
        return (Rebuild(bound, self._table),)

    def _access(self, persona: Persona) -> Access:
        marks = {rule.via: self._number(rule.via) for rule in persona.network_access if rule.via is not None}
        key = (persona.name, persona.network_access, tuple(marks.items()))
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            found = self._known[key] = ruleset.access(persona, marks)
        return found

    def _bind(self, where: str, persona: Persona, keys: Callable[[], tuple[Key, ...]]) -> Plan:
        access = self._access(persona)
        before = self._table.bound.get(where)
        if before is not None and before.access == access:
            with contextlib.suppress(FileNotFoundError):  # made anew by the facility before this one
                if before.keys == keys():
                    return ()
        return (Bind(where, access, before, self._table, keys),)

    def _unbind(self, where: str) -> Plan:
        before = self._table.bound.get(where)
        return () if before is None else (Bind(where, None, before, self._table, tuple),)

    def _cgroup(self, cgroup: str) -> Key:
        return Key(cgroup.count("/") + 1, os.stat(f"{self._cgroups}/{cgroup}").st_ino)

    def _owner_keys(self, uid: int) -> tuple[Key, ...]:
        try:
            return (Key(0, uid), self._cgroup(f"user.slice/user-{uid}.slice"))
        except FileNotFoundError:
            return (Key(0, uid),)


def _owner(uid: int) -> str:
    return f"uid {uid}"
