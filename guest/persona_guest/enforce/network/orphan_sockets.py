"""Sockets that outlive what they were made in: whose they are, once their place or its session is gone.

A socket is known to nftables by the cgroup that it was made in, as long as it lives.  A user may hand one on to another
process, of another user too, and end the session.  So the numbers of the cgroups that were a user's are remembered, and
what is of a user without any session reaches nothing.
"""

import json
import logging
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from persona_guest import files
from persona_guest.core.persona_cgroups import PersonaCgroup, level_of, slice_of
from persona_guest.enforce.network.table import Bound, Table

log = logging.getLogger("persona.enforce")

_ENDED_MAX = 256  # cgroups of ended sessions, and slices, from which a socket may have been handed on
EXEMPT = -1  # as a uid: stands for who is not gated
ORPHANS = "nobody"  # the name under which sockets of users are bound who have no session any more


class OwnedCgroup(NamedTuple):
    """Whose a cgroup is: a place of a session's, or, with no session, the user's slice."""

    uid: int
    session_id: str
    cgroup: str


class SocketOwners:
    """Remembers which user's a cgroup was, by its number (inode), past its end and that of an agent.

    The kernel gives no number twice.  Remembered are users' slices and their places outside of those: all of sessions
    that are ``alive``, and of slices and of other places the newest, until nobody is bound.  ``path`` is the file that
    the next agent reads; without one they are in memory only.
    """

    def __init__(self, path: Path | None = None, alive: Callable[[str], bool] = lambda _session: True) -> None:
        self._path = path
        self._alive = alive
        self._known: dict[int, OwnedCgroup] = {}
        try:
            kept = json.loads(path.read_text()) if path is not None else {}
            self._known = {
                int(n): OwnedCgroup(int(uid), str(session), str(cgroup)) for n, (uid, session, cgroup) in kept.items()
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

    def add(self, new: Mapping[int, OwnedCgroup]) -> None:
        """Keeps, before they are bound, what tells whose they are.  Raises ``OSError`` where that cannot be kept."""
        if new.keys() <= self._known.keys():
            return
        known = {**self._known, **{n: kept for n, kept in new.items() if n not in self._known}}
        slices = [number for number, kept in known.items() if not kept.session_id]
        ended = [number for number, kept in known.items() if kept.session_id and not self._alive(kept.session_id)]
        for old in (*slices[:-_ENDED_MAX], *ended[:-_ENDED_MAX]):
            del known[old]
        self._keep(known)

    def exempt(self, number: int, cgroup: str) -> None:
        """Somebody lives there who is not gated: its sockets are never bound as orphans.  Raises ``OSError``."""
        self._keep({**self._known, number: OwnedCgroup(EXEMPT, "", cgroup)})

    def forget(self) -> None:
        """Nobody is bound any more.  Raises ``OSError``."""
        if self._known:
            self._keep({})

    def _keep(self, known: dict[int, OwnedCgroup]) -> None:
        if self._path is not None:
            files.write(self._path, json.dumps(known))
        self._known = known


@dataclass(frozen=True, slots=True)
class ExemptSlice:
    """Keeps a user's slice out of ``ORPHANS``, now and later: they are in it by a login that is not gated."""

    cgroup: str
    number: int
    table: Table = field(repr=False, compare=False)
    owners: SocketOwners = field(repr=False, compare=False)
    nobody: Callable[[], Bound | None] = field(repr=False, compare=False)

    def describe(self) -> Mapping[str, object]:
        return {"op": "network.exempt", "where": self.cgroup}

    def apply(self) -> None:
        self.owners.exempt(self.number, self.cgroup)
        if ORPHANS in self.table.bound:
            self.table.bind({ORPHANS: self.nobody()})

    def undo(self) -> None:
        """Does nothing: that they are exempt stays true."""


def owned_place(place: PersonaCgroup, bound: Bound) -> dict[int, OwnedCgroup]:
    """What ``SocketOwners`` has to remember of a place that is bound; nothing where it lies in its user's slice."""
    return {key.number: OwnedCgroup(place.uid, place.session_id, place.cgroup) for key in bound.keys if place.outside}


def owned_slice(uid: int, owner: Bound) -> dict[int, OwnedCgroup]:
    """What ``SocketOwners`` has to remember of a user's own rules: their slice."""
    level = level_of(slice_of(uid))
    return {key.number: OwnedCgroup(uid, "", slice_of(uid)) for key in owner.keys if key.level == level}
