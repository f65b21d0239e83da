"""The network part of a persona: what is bound under which rules in our nftables table.

What other tables refuse stays refused.  Each operation is one transaction; ``reconcile`` replaces the whole
table in one step, so that no packet meets a state in between.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from persona.documents import Persona
from persona_guest import files
from persona_guest.core import ruleset
from persona_guest.core.persona_cgroups import PersonaCgroup, slice_of
from persona_guest.core.reassignment import NO_PERSONA_DOCUMENT
from persona_guest.core.ruleset import Access
from persona_guest.enforce.facility import Wanted
from persona_guest.enforce.network.table import Bound, Key, Number, Table
from persona_guest.enforce.plan import Plan

log = logging.getLogger("persona.enforce")

_KNOWN_MAX = 2048  # what was worked out once, for when everything is looked at again
_ENDED_MAX = 256  # cgroups of ended sessions, and slices, from which a socket may have been handed on
_EXEMPT = -1  # stands for who is not looked at
_ORPHANS = "nobody"  # the name under which those of users are bound who have no session any more


class Kept(NamedTuple):
    """Whose a cgroup is: a place of a session's, or, with no session, the user's slice."""

    uid: int
    session: str
    cgroup: str


class Outside:
    """Users' slices, and their places outside of those, by number, past their end and that of an agent.

    A socket is known by the cgroup that it was made in as long as it lives, and the kernel gives no number twice.
    Kept are all of sessions that are ``alive``, and of slices and of other places the newest, until nobody is bound.
    """

    def __init__(self, path: Path | None = None, alive: Callable[[str], bool] = lambda _session: True) -> None:
        self._path = path
        self._alive = alive
        self._known: dict[int, Kept] = {}
        try:
            kept = json.loads(path.read_text()) if path is not None else {}
            self._known = {
                int(n): Kept(int(uid), str(session), str(cgroup)) for n, (uid, session, cgroup) in kept.items()
            }
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.error("%s: %s; sockets that users' programs handed on are not known any more", path, error)

    def of(self, uid: int) -> list[tuple[int, str]]:
        """Number and path of each that is a user's."""
        return [(number, kept.cgroup) for number, kept in self._known.items() if kept.uid == uid]

    def of_others(self, uids: Container[int]) -> list[tuple[int, str]]:
        """The same of all but these users'."""
        return [(number, kept.cgroup) for number, kept in self._known.items() if kept.uid not in uids]

    def add(self, new: Mapping[int, Kept]) -> None:
        """Keeps, before they are bound, what tells whose they are.  Raises ``OSError`` where that cannot be kept."""
        if new.keys() <= self._known.keys():
            return
        known = {**self._known, **{n: kept for n, kept in new.items() if n not in self._known}}
        slices = [number for number, kept in known.items() if not kept.session]
        ended = [number for number, kept in known.items() if kept.session and not self._alive(kept.session)]
        for old in (*slices[:-_ENDED_MAX], *ended[:-_ENDED_MAX]):
            del known[old]
        self._keep(known)

    def spare(self, number: int, cgroup: str) -> None:
        """Somebody lives there who is not looked at: it is never nobody's.  Raises ``OSError``."""
        self._keep({**self._known, number: Kept(_EXEMPT, "", cgroup)})

    def forget(self) -> None:
        """Nobody is bound any more.  Raises ``OSError``."""
        if self._known:
            self._keep({})

    def _keep(self, known: dict[int, Kept]) -> None:
        if self._path is not None:
            files.write(self._path, json.dumps(known))
        self._known = known


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
    kept: Mapping[int, Kept]  # of them what stays known
    table: Table = field(repr=False, compare=False)
    outside: Outside = field(repr=False, compare=False)

    def describe(self) -> Mapping[str, object]:
        under = {where: item.access.name for where, item in self.bound.items()}
        return {"op": "network.rebuild" if under else "network.remove", "under": under}

    def apply(self) -> None:
        self.outside.add(self.kept)
        self.table.rebuild(self.bound)
        if not self.bound:
            self.outside.forget()

    def undo(self) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Spare:
    """A user's slice is nobody's neither now nor later: they are in it by a login that is not looked at."""

    cgroup: str
    number: int
    table: Table = field(repr=False, compare=False)
    outside: Outside = field(repr=False, compare=False)
    nobody: Callable[[], Bound | None] = field(repr=False, compare=False)

    def describe(self) -> Mapping[str, object]:
        return {"op": "network.spare", "where": self.cgroup}

    def apply(self) -> None:
        self.outside.spare(self.number, self.cgroup)
        if _ORPHANS in self.table.bound:
            self.table.bind({_ORPHANS: self.nobody()})

    def undo(self) -> None:
        """Nothing."""


class Network:
    """The facility.  ``user_rules`` says what each user is under outside of every place; its owner keeps it so."""

    name = "network"

    def __init__(
        self,
        table: Table,
        number: Number,
        cgroups: str,
        user_rules: Mapping[int, Persona],
        outside: Outside | None = None,
    ) -> None:
        self._outside = outside or Outside()
        self._table = table
        self._number = number
        self._cgroups = cgroups
        self._user_rules = user_rules
        self._known: dict[object, Access] = {}

    def enter(self, place: PersonaCgroup, persona: Persona) -> Plan:
        access = self._access(persona)
        names = (place.cgroup, _owner(place.uid), _ORPHANS)

        def changes() -> Mapping[str, Bound | None]:
            return self._with_owner(place, Bound((self._cgroup(place.cgroup),), access))

        return self._bind(names, access, changes, lambda bound: self._outside.add(_kept_of(place, bound)))

    def leave(self, place: PersonaCgroup) -> Plan:
        if place.cgroup not in self._table.bound:
            return ()
        return self._bind((place.cgroup, _owner(place.uid), _ORPHANS), None, lambda: self._with_owner(place, None))

    def base(self, uid: int) -> Plan:
        """Binds, or lets go, a user's slice of cgroups and whatever else is theirs, as ``user_rules`` has it.

        To be asked again at each login: the slice may be another by then.
        """
        where, persona = _owner(uid), self._user_rules.get(uid)
        names = (where, _ORPHANS)
        if persona is None:
            return self._bind(names, None, lambda: self._without_owner(uid)) if where in self._table.bound else ()
        access = self._access(persona)

        def changes() -> Mapping[str, Bound | None]:
            return self._with_nobody({where: Bound(self._owner_keys(uid, self._table.bound), access)})

        return self._bind(names, access, changes, lambda bound: self._outside.add(_slice_of(uid, bound)))

    def spare(self, uid: int) -> Plan:
        """To be asked at each login that is not looked at."""
        with contextlib.suppress(FileNotFoundError):
            cgroup = slice_of(uid)
            number = self._cgroup(cgroup).number
            return (Spare(cgroup, number, self._table, self._outside, lambda: self._orphans(self._table.bound)),)
        return ()

    def release(self) -> Plan:
        return self.reconcile({})

    def reconcile(self, wanted: Wanted) -> Plan:
        bound: dict[str, Bound] = {}
        kept: dict[int, Kept] = {}
        for place, persona in wanted.items():
            with contextlib.suppress(FileNotFoundError):  # nobody is there any more
                here = bound[place.cgroup] = Bound((self._cgroup(place.cgroup),), self._access(persona))
                kept |= _kept_of(place, here)
        for uid, base in self._user_rules.items():
            owner = bound[_owner(uid)] = Bound(self._owner_keys(uid, bound), self._access(base))
            kept |= _slice_of(uid, owner)
        if (nobody := self._orphans(bound)) is not None:
            bound[_ORPHANS] = nobody
        there = self._table.exists()
        if there == bool(bound) and bound == self._table.bound and not self._table.disturbed:
            return ()
        return (Rebuild(bound, kept, self._table, self._outside),)

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
        return Key(_level(cgroup), os.stat(f"{self._cgroups}/{cgroup}").st_ino)

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
            self._outside.forget()
        return self._with_nobody({_owner(uid): None})

    def _with_nobody(self, changes: Mapping[str, Bound | None]) -> Mapping[str, Bound | None]:
        """Changes, and what they make of what is nobody's."""
        nobody = self._orphans({**self._table.bound, **changes})
        return changes if nobody == self._table.bound.get(_ORPHANS) else {**changes, _ORPHANS: nobody}

    def _orphans(self, bound: Mapping[str, Bound | None]) -> Bound | None:
        """What users without a session any more may have handed on to others reaches nothing."""
        if not self._user_rules:  # nobody to hand on to
            return None
        others = self._outside.of_others({*self._user_rules, _EXEMPT})
        if not others:
            return None
        taken = {key for name, item in bound.items() if item is not None and name != _ORPHANS for key in item.keys}
        keys = tuple(key for number, cgroup in others if (key := Key(_level(cgroup), number)) not in taken)
        return Bound(keys, self._access(NO_PERSONA_DOCUMENT)) if keys else None

    def _owner_keys(self, uid: int, bound: Mapping[str, Bound]) -> tuple[Key, ...]:
        keys = [Key(0, uid)]
        with contextlib.suppress(FileNotFoundError):
            keys.append(self._cgroup(slice_of(uid)))
        return _once(*keys, *self._strays(uid, bound))

    def _strays(self, uid: int, bound: Mapping[str, Bound | None]) -> Iterator[Key]:
        for number, cgroup in self._outside.of(uid):
            key, there = Key(_level(cgroup), number), bound.get(cgroup)
            if there is None or key not in there.keys:
                yield key


def _kept_of(place: PersonaCgroup, bound: Bound) -> dict[int, Kept]:
    return {key.number: Kept(place.uid, place.session, place.cgroup) for key in bound.keys if place.outside}


def _slice_of(uid: int, owner: Bound) -> dict[int, Kept]:
    level = _level(slice_of(uid))
    return {key.number: Kept(uid, "", slice_of(uid)) for key in owner.keys if key.level == level}


def _once(*keys: Key) -> tuple[Key, ...]:
    return tuple(dict.fromkeys(keys))


def _level(cgroup: str) -> int:
    return cgroup.count("/") + 1


def _owner(uid: int) -> str:
    return f"uid {uid}"
