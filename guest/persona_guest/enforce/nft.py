"""The network part of a persona: what is bound under which rules in our nftables table.

What other tables refuse stays refused.  Each operation is one transaction; ``reconcile`` replaces the whole
table in one step, so that no packet meets a state in between.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from persona.documents import Persona
from persona_guest.core import ruleset
from persona_guest.core.places import Place
from persona_guest.core.ruleset import Access
from persona_guest.enforce.interface import Wanted
from persona_guest.enforce.plan import Plan
from persona_guest.enforce.table import Bound, Key, Number, Table

log = logging.getLogger("persona.enforce")

_KNOWN_MAX = 2048  # what was worked out once, for when everything is looked at again
_ENDED_MAX = 256  # cgroups of ended sessions, from which a socket may have been handed on


class Outside:
    """The cgroups of places outside of their user's slice, by number, past their end and that of an agent.

    A socket is known by the cgroup that it was made in as long as it lives, and the kernel gives no number twice.
    Kept are all of sessions that are ``alive``, and the newest others, until the user has no session.
    """

    def __init__(self, path: Path | None = None, alive: Callable[[str], bool] = lambda _session: True) -> None:
        self._path = path
        self._alive = alive
        self._known: dict[int, tuple[int, str, str]] = {}
        try:
            kept = json.loads(path.read_text()) if path is not None else {}
            self._known = {int(n): (int(uid), str(session), str(cgroup)) for n, (uid, session, cgroup) in kept.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.error("%s: %s; sockets of others' that users' programs left open are not known any more", path, error)

    def of(self, uid: int) -> list[tuple[int, str]]:
        """Number and path of each that is a user's."""
        return [(number, cgroup) for number, (owner, _, cgroup) in self._known.items() if owner == uid]

    def add(self, places: Mapping[int, Place]) -> None:
        """Places are about to be bound, by the numbers of their cgroups.  Raises ``OSError`` where that is not kept."""
        new = {n: place for n, place in places.items() if place.outside and n not in self._known}
        if not new:
            return
        known = {**self._known, **{n: (place.uid, place.session, place.cgroup) for n, place in new.items()}}
        ended = [n for n, (_, session, _) in known.items() if not self._alive(session)]
        for old in ended[:-_ENDED_MAX]:
            del known[old]
        self._keep(known)

    def forget(self, uid: int | None = None) -> None:
        """None is needed any more, of one user or of all.  Raises ``OSError``."""
        known = {number: item for number, item in self._known.items() if uid is not None and item[0] != uid}
        if known != self._known:
            self._keep(known)

    def _keep(self, known: dict[int, tuple[int, str, str]]) -> None:
        if self._path is not None:
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps(known))
            new.replace(self._path)
        self._known = known


@dataclass(frozen=True, slots=True)
class Bind:
    """Brings one cgroup, or one owner with what else is his, under an access in one transaction."""

    where: str
    access: Access | None
    before: Mapping[str, Bound | None]
    place: Place | None  # what ``where`` is the cgroup of
    table: Table = field(repr=False, compare=False)
    outside: Outside = field(repr=False, compare=False)
    changes: Callable[[], Mapping[str, Bound | None]] = field(repr=False, compare=False)

    def describe(self) -> Mapping[str, object]:
        if self.access is None:
            return {"op": "network.unbind", "where": self.where}
        return {"op": "network.bind", "where": self.where, "under": self.access.name, "rules": self.access.texts}

    def apply(self) -> None:
        changes = self.changes()
        bound = changes[self.where]
        if self.place is not None and bound is not None:
            self.outside.add({key.number: self.place for key in bound.keys})
        self.table.bind(changes)

    def undo(self) -> None:
        self.table.bind(self.before)


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Makes the whole table anew in one transaction, or removes it.  It is not undone: what should be, should be."""

    bound: Mapping[str, Bound]
    places: Mapping[int, Place]  # those of them that are, by the numbers of their cgroups
    table: Table = field(repr=False, compare=False)
    outside: Outside = field(repr=False, compare=False)

    def describe(self) -> Mapping[str, object]:
        under = {where: item.access.name for where, item in self.bound.items()}
        return {"op": "network.rebuild" if under else "network.remove", "under": under}

    def apply(self) -> None:
        self.outside.add(self.places)
        self.table.rebuild(self.bound)
        if not self.bound:
            self.outside.forget()

    def undo(self) -> None:
        """Nothing."""


class Network:
    """The facility.  ``bases`` says what each user is under outside of every place: its owner keeps it up to date."""

    name = "network"

    def __init__(
        self,
        table: Table,
        number: Number,
        cgroups: str,
        bases: Mapping[int, Persona],
        outside: Outside | None = None,
    ) -> None:
        self._outside = outside or Outside()
        self._table = table
        self._number = number
        self._cgroups = cgroups
        self._bases = bases
        self._known: dict[object, Access] = {}

    def enter(self, place: Place, persona: Persona) -> Plan:
        access = self._access(persona)
        names = (place.cgroup, _owner(place.uid))

        def changes() -> Mapping[str, Bound | None]:
            return self._with_owner(place, Bound((self._cgroup(place.cgroup),), access))

        return self._bind(names, access, changes, place)

    def leave(self, place: Place) -> Plan:
        if place.cgroup not in self._table.bound:
            return ()
        return self._bind((place.cgroup, _owner(place.uid)), None, lambda: self._with_owner(place, None))

    def base(self, uid: int) -> Plan:
        """Binds, or lets go, a user's slice of cgroups and whatever else is his, as ``bases`` has it.

        To be asked again at each login: the slice may be another by then.
        """
        where, persona = _owner(uid), self._bases.get(uid)
        if persona is None:
            return self._bind((where,), None, lambda: self._without_owner(uid)) if where in self._table.bound else ()
        access = self._access(persona)
        return self._bind((where,), access, lambda: {where: Bound(self._owner_keys(uid, self._table.bound), access)})

    def reconcile(self, wanted: Wanted) -> Plan:
        bound: dict[str, Bound] = {}
        places: dict[int, Place] = {}
        for place, persona in wanted.items():
            with contextlib.suppress(FileNotFoundError):  # nobody is there any more
                key = self._cgroup(place.cgroup)
                bound[place.cgroup], places[key.number] = Bound((key,), self._access(persona)), place
        for uid, base in self._bases.items():
            bound[_owner(uid)] = Bound(self._owner_keys(uid, bound), self._access(base))
        there = self._table.exists()
        if there == bool(bound) and bound == self._table.bound and not self._table.disturbed:
            return ()
        return (Rebuild(bound, places, self._table, self._outside),)

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
        place: Place | None = None,
    ) -> Plan:
        """``names`` are all that ``changes`` is about, the first of them what comes under ``access``."""
        before = {where: self._table.bound.get(where) for where in names}
        first = before[names[0]]
        if first is not None and first.access == access:
            with contextlib.suppress(FileNotFoundError):  # made anew by the facility before this one
                if all(self._table.bound.get(where) == bound for where, bound in changes().items()):
                    return ()
        return (Bind(names[0], access, before, place, self._table, self._outside, changes),)

    def _cgroup(self, cgroup: str) -> Key:
        return Key(_level(cgroup), os.stat(f"{self._cgroups}/{cgroup}").st_ino)

    def _with_owner(self, place: Place, bound: Bound | None) -> Mapping[str, Bound | None]:
        """A place, and what that changes of its user's: what no place outside of his slice has any more is his."""
        changes: dict[str, Bound | None] = {place.cgroup: bound}
        owner = self._table.bound.get(_owner(place.uid))
        if place.outside and owner is not None:
            own = (key for key in owner.keys if key.level < place.level)
            strays = self._strays(place.uid, {**self._table.bound, **changes})
            changes[_owner(place.uid)] = Bound((*own, *strays), owner.access)
        return changes

    def _without_owner(self, uid: int) -> Mapping[str, Bound | None]:
        self._outside.forget(uid)
        return {_owner(uid): None}

    def _owner_keys(self, uid: int, bound: Mapping[str, Bound]) -> tuple[Key, ...]:
        keys = [Key(0, uid)]
        with contextlib.suppress(FileNotFoundError):
            keys.append(self._cgroup(f"user.slice/user-{uid}.slice"))
        return (*keys, *self._strays(uid, bound))

    def _strays(self, uid: int, bound: Mapping[str, Bound | None]) -> Iterator[Key]:
        for number, cgroup in self._outside.of(uid):
            key, there = Key(_level(cgroup), number), bound.get(cgroup)
            if there is None or key not in there.keys:
                yield key


def _level(cgroup: str) -> int:
    return cgroup.count("/") + 1


def _owner(uid: int) -> str:
    return f"uid {uid}"
