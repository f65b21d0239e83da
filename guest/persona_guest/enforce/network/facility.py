"""The network part of a persona: what is bound under which rules in our nftables table.

What other tables refuse stays refused.  Each operation is one transaction; ``reconcile`` replaces the whole
table in one step, so that no packet meets a state in between.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from persona.documents import Persona
from persona_guest.core import ruleset
from persona_guest.core.persona_cgroups import PersonaCgroup, level_of, slice_of
from persona_guest.core.reassignment import NO_PERSONA_DOCUMENT
from persona_guest.core.ruleset import Access
from persona_guest.enforce.facility import Wanted
from persona_guest.enforce.network.orphan_sockets import (
    EXEMPT,
    ORPHANS,
    ExemptSlice,
    OwnedCgroup,
    SocketOwners,
    owned_place,
    owned_slice,
)
from persona_guest.enforce.network.table import Bound, Key, Number, Table
from persona_guest.enforce.plan import Plan

log = logging.getLogger("persona.enforce")

_KNOWN_MAX = 2048  # rules that were worked out once, for when everything is compared again


@dataclass(frozen=True, slots=True)
class Bind:
    """Brings one cgroup, or one owner with what else is theirs, under an access in one transaction."""

    where: str
    access: Access | None
    before: Mapping[str, Bound | None]
    table: Table = field(repr=False, compare=False)
    changes: Callable[[], Mapping[str, Bound | None]] = field(repr=False, compare=False)
    keep: Callable[[Bound], None] = field(repr=False, compare=False)  # called before ``where`` is bound

    def describe(self) -> Mapping[str, object]:
        if self.access is None:
            return {"op": "network.unbind", "where": self.where}
        return {"op": "network.bind", "where": self.where, "under": self.access.name, "rules": self.access.texts}

    def apply(self) -> None:
        changes = self.changes()
        if (bound := changes[self.where]) is not None:
            self.keep(bound)
        self.table.bind(changes)

    def undo(self) -> None:
        self.table.bind(self.before)


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Makes the whole table anew in one transaction, or removes it.  It is not undone: what should be, should be."""

    bound: Mapping[str, Bound]
    owned: Mapping[int, OwnedCgroup]  # of them what stays known
    table: Table = field(repr=False, compare=False)
    owners: SocketOwners = field(repr=False, compare=False)

    def describe(self) -> Mapping[str, object]:
        under = {where: item.access.name for where, item in self.bound.items()}
        return {"op": "network.rebuild" if under else "network.remove", "under": under}

    def apply(self) -> None:
        self.owners.add(self.owned)
        self.table.rebuild(self.bound)
        if not self.bound:
            self.owners.forget()

    def undo(self) -> None:
        """Does nothing: the table is as it should be."""


class Network:
    """The facility.  ``user_rules`` says what each user is under outside of every place; its owner keeps it so."""

    name = "network"

    def __init__(
        self,
        table: Table,
        number: Number,
        cgroups: str,
        user_rules: Mapping[int, Persona],
        owners: SocketOwners | None = None,
    ) -> None:
        self._owners = owners or SocketOwners()
        self._table = table
        self._number = number
        self._cgroups = cgroups
        self._user_rules = user_rules
        self._known: dict[object, Access] = {}

    def enter(self, place: PersonaCgroup, persona: Persona) -> Plan:
        access = self._access(persona)
        names = (place.cgroup, _owner(place.uid), ORPHANS)

        def changes() -> Mapping[str, Bound | None]:
            return self._with_owner(place, Bound((self._cgroup(place.cgroup),), access))

        return self._bind(names, access, changes, lambda bound: self._owners.add(owned_place(place, bound)))

    def leave(self, place: PersonaCgroup) -> Plan:
        if place.cgroup not in self._table.bound:
            return ()
        return self._bind((place.cgroup, _owner(place.uid), ORPHANS), None, lambda: self._with_owner(place, None))

    def bind_user(self, uid: int) -> Plan:
        """Binds, or lets go, a user's slice of cgroups and whatever else is theirs, as ``user_rules`` has it.

        To be asked again at each login: the slice may be another by then.
        """
        where, persona = _owner(uid), self._user_rules.get(uid)
        names = (where, ORPHANS)
        if persona is None:
            return self._bind(names, None, lambda: self._without_owner(uid)) if where in self._table.bound else ()
        access = self._access(persona)

        def changes() -> Mapping[str, Bound | None]:
            return self._with_nobody({where: Bound(self._owner_keys(uid, self._table.bound), access)})

        return self._bind(names, access, changes, lambda bound: self._owners.add(owned_slice(uid, bound)))

    def exempt(self, uid: int) -> Plan:
        """The user is not gated: their slice is no orphans' any more.  To be asked at each such login."""
        with contextlib.suppress(FileNotFoundError):
            cgroup = slice_of(uid)
            number = self._cgroup(cgroup).number
            return (ExemptSlice(cgroup, number, self._table, self._owners, lambda: self._orphans(self._table.bound)),)
        return ()

    def release(self) -> Plan:
        return self.reconcile({})

    def reconcile(self, wanted: Wanted) -> Plan:
        bound: dict[str, Bound] = {}
        owned: dict[int, OwnedCgroup] = {}
        for place, persona in wanted.items():
            with contextlib.suppress(FileNotFoundError):  # nobody is there any more
                here = bound[place.cgroup] = Bound((self._cgroup(place.cgroup),), self._access(persona))
                owned |= owned_place(place, here)
        for uid, persona in self._user_rules.items():
            owner = bound[_owner(uid)] = Bound(self._owner_keys(uid, bound), self._access(persona))
            owned |= owned_slice(uid, owner)
        if (nobody := self._orphans(bound)) is not None:
            bound[ORPHANS] = nobody
        there = self._table.exists()
        if there == bool(bound) and bound == self._table.bound and not self._table.disturbed:
            return ()
        return (Rebuild(bound, owned, self._table, self._owners),)

    def _access(self, persona: Persona) -> Access:
        marks = {rule.via: self._number(rule.via) for rule in persona.network_access if rule.via is not None}
        key = (persona.name, persona.network_access, tuple(marks.items()))
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            found = self._known[key] = ruleset.access(persona, marks)
        return found

    def _bind(
        self,
        names: tuple[str, ...],
        access: Access | None,
        changes: Callable[[], Mapping[str, Bound | None]],
        keep: Callable[[Bound], None] = lambda _bound: None,
    ) -> Plan:
        """``names`` are all that ``changes`` is about, the first of them what comes under ``access``."""
        before = {where: self._table.bound.get(where) for where in names}
        first = before[names[0]]
        if first is not None and first.access == access:
            with contextlib.suppress(FileNotFoundError):  # made anew by the facility before this one
                if all(self._table.bound.get(where) == bound for where, bound in changes().items()):
                    return ()
        return (Bind(names[0], access, before, self._table, changes, keep),)

    def _cgroup(self, cgroup: str) -> Key:
        return Key(level_of(cgroup), os.stat(f"{self._cgroups}/{cgroup}").st_ino)

    def _with_owner(self, place: PersonaCgroup, bound: Bound | None) -> Mapping[str, Bound | None]:
        """A place, and what that changes of its user's: what no place outside of their slice has any more is theirs."""
        changes: dict[str, Bound | None] = {place.cgroup: bound}
        owner = self._table.bound.get(_owner(place.uid))
        if place.outside and owner is not None:
            own = (key for key in owner.keys if key.level < place.level)
            strays = self._strays(place.uid, {**self._table.bound, **changes})
            changes[_owner(place.uid)] = Bound(_once(*own, *strays), owner.access)
        return changes if owner is not None else self._with_nobody(changes)

    def _without_owner(self, uid: int) -> Mapping[str, Bound | None]:
        if not self._user_rules:
            self._owners.forget()
        return self._with_nobody({_owner(uid): None})

    def _with_nobody(self, changes: Mapping[str, Bound | None]) -> Mapping[str, Bound | None]:
        """Changes, and what they make of what is nobody's."""
        nobody = self._orphans({**self._table.bound, **changes})
        return changes if nobody == self._table.bound.get(ORPHANS) else {**changes, ORPHANS: nobody}

    def _orphans(self, bound: Mapping[str, Bound | None]) -> Bound | None:
        """What users without a session any more may have handed on to others reaches nothing."""
        if not self._user_rules:  # nobody to hand on to
            return None
        others = self._owners.of_others({*self._user_rules, EXEMPT})
        if not others:
            return None
        taken = {key for name, item in bound.items() if item is not None and name != ORPHANS for key in item.keys}
        keys = tuple(key for number, cgroup in others if (key := Key(level_of(cgroup), number)) not in taken)
        return Bound(keys, self._access(NO_PERSONA_DOCUMENT)) if keys else None

    def _owner_keys(self, uid: int, bound: Mapping[str, Bound]) -> tuple[Key, ...]:
        keys = [Key(0, uid)]
        with contextlib.suppress(FileNotFoundError):
            keys.append(self._cgroup(slice_of(uid)))
        return _once(*keys, *self._strays(uid, bound))

    def _strays(self, uid: int, bound: Mapping[str, Bound | None]) -> Iterator[Key]:
        for number, cgroup in self._owners.of(uid):
            key, there = Key(level_of(cgroup), number), bound.get(cgroup)
            if there is None or key not in there.keys:
                yield key


def _once(*keys: Key) -> tuple[Key, ...]:
    return tuple(dict.fromkeys(keys))


def _owner(uid: int) -> str:
    return f"uid {uid}"
