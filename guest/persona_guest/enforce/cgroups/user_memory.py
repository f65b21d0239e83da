"""Memory that outlives its session: what a user leaves in memory counts against what they may use afterwards.

A file in a tmpfs, or shared memory, stays counted where it was first used.  When that cgroup goes, the kernel
goes on counting it in the cgroup above.  So all that is one user's has one cgroup that does not go between two
logins: their slice (a drop-in for user-.slice keeps it), and for sessions without a scope ``fallback_slice_of(uid)``.

- A place gets its persona's limit less what its user left there (``room``), never less than a shell needs.
- The cgroup above gets a bound (``bound_of``), for what several places leave at once and what is in no place.

Both are planned here and are no more than numbers in files; ``MEMORY_NOTE`` keeps what the files do not tell, but for
a user's service manager: its cgroup is a directory of the user's, and so would be the note.
"""

import contextlib
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass

from persona.documents import Persona
from persona_guest.core.persona_cgroups import FALLBACK_ROOT, LOGIN, PersonaCgroup, fallback_slice_of, slice_of
from persona_guest.enforce.cgroups.limits import LEFT_ROUGHLY, NOTHING_LEFT, PAGE, Setting, bound_of, room
from persona_guest.enforce.cgroups.operations import MEMORY_NOTE, NoteMemory, Set
from persona_guest.enforce.plan import Operation, Plan
from persona_guest.kernel.cgroup import Hierarchy

_MAX = "max"
_NUMBER = re.compile(r"[0-9]{1,20}")
_LASTING = ("shmem", "slab_unreclaimable")

Limits = Mapping[str, int | None]
"""Cgroups that hold a place, and the limits that their personas give them; ``None`` = no limit."""


@dataclass(frozen=True, slots=True)
class _Bound:
    """``ours``: the bound of a cgroup as we would have it.  The others: what systemd, for an operator, wrote there."""

    ours: int | None = None
    theirs: str = _MAX
    their_swap: str = _MAX

    @property
    def limit(self) -> str:
        """What is to be in memory.max: the lower of the two."""
        if self.ours is None:
            return self.theirs
        return str(self.ours if self.theirs == _MAX else min(self.ours, int(self.theirs)))

    @property
    def swap(self) -> str:
        """What is to be in memory.swap.max: what is bounded must not leave for the swap."""
        return self.their_swap if self.ours is None else "0"

    @property
    def text(self) -> str:
        """As it is kept with the cgroup; empty where there is nothing of ours."""
        return "" if self.ours is None else f"{self.ours} {self.theirs} {self.their_swap}"


class UserMemory:
    """Plans what bounds a user's memory.  It keeps nothing: everything is read from the hierarchy."""

    def __init__(self, tree: Hierarchy) -> None:
        self._tree = tree

    # --- one place --------------------------------------------------------------------------------

    def room(self, place: PersonaCgroup, limit: int | None, left: Callable[[int], int]) -> int | None:
        """What a place may use now, where its persona says ``limit``; what it has already is not taken from it.

        ``left`` is the method below, or what remembers its answers.
        """
        if limit is None or place.shared:  # those who share a limit share what they left, in a cgroup that stays
            return limit
        has = self._number(place.cgroup, "memory.max") or 0
        if not place.managed and self._limit(place.cgroup) != limit:
            has = 0  # under another version
        return limit if has >= limit else max(has, room(limit, left(place.uid)))

    def noted(self, place: PersonaCgroup, limit: int | None, now: int | None) -> Iterator[Operation]:
        """Keeps with a place what its persona says, where ``now`` it has less."""
        if place.managed or place.shared:
            return
        text, before = "" if limit is None or limit == now else str(limit), self._tree.noted(place.cgroup, MEMORY_NOTE)
        if text != before:
            yield NoteMemory(self._tree, place.cgroup, text, before)

    def left(self, uid: int) -> int:
        """Bytes that are counted as a user's, and in no session, job or service of theirs that goes on."""
        return sum(map(self._left, (slice_of(uid), fallback_slice_of(uid))))

    def _left(self, above: str) -> int:
        living, lasting = 0, self._lasting(above)
        if lasting < LEFT_ROUGHLY:  # mostly so
            return 0
        for cgroup in self._units(above):
            below = self._tree.children(cgroup) if cgroup.endswith(".scope") else []
            living += sum(self._lasting(f"{cgroup}/{name}") for name in below) if below else self._lasting(cgroup)
        return max(0, lasting - living)

    # --- what is above the places -------------------------------------------------------------------

    def settle(self, above: str, changed: Limits, gone: Container[str] = ()) -> Plan:
        """The bound of a cgroup of all that is one user's.

        ``changed`` are places that are about to have these limits; ``gone``, cgroups that are about to go.
        """
        found = {**dict(self._places(above, gone)), **changed}
        known = self._known(above)
        if known.ours is None and not found:
            return ()
        sessions = (
            len(found)
            if above.startswith(FALLBACK_ROOT)
            else sum(unit.endswith(".scope") for unit in self._units(above))
        )
        ours = bound_of(found.values(), sessions, known.ours, lambda: self._counted(above))
        if not found and self._lasting(above) <= NOTHING_LEFT:
            ours = None
        return tuple(self._write(above, known, _Bound(ours, known.theirs, known.their_swap)))

    def lift(self, above: str) -> Plan:
        """Takes our bound off a cgroup of all that is one user's; what an operator wrote there comes back."""
        known = self._known(above)
        return tuple(self._write(above, known, _Bound(None, known.theirs, known.their_swap)))

    def _write(self, above: str, known: _Bound, new: _Bound) -> Iterator[Operation]:
        for file, value in (("memory.max", new.limit), ("memory.swap.max", new.swap)):
            before = self._read(above, file)
            if value != (before or _MAX):
                yield Set(self._tree, above, Setting(file, value, optional=True), before)  # it may go at this moment
        kept = self._tree.noted(above, MEMORY_NOTE)
        if new.text != kept:
            yield NoteMemory(self._tree, above, new.text, kept)

    def _known(self, above: str) -> _Bound:
        """What was ours until now.  A value that is not ours was written by others since then."""
        kept = _parsed(self._tree.noted(above, MEMORY_NOTE))
        limit, swap = self._read(above, "memory.max") or _MAX, self._read(above, "memory.swap.max") or _MAX
        return _Bound(
            kept.ours,
            kept.theirs if kept.ours is not None and limit == kept.limit else limit,
            kept.their_swap if kept.ours is not None and swap == kept.swap else swap,
        )

    def _units(self, above: str) -> list[str]:
        return [f"{above}/{name}" for name in self._tree.children(above)]

    def _places(self, above: str, gone: Container[str]) -> Iterator[tuple[str, int | None]]:
        for unit in self._units(above):
            if unit.endswith(".scope"):
                for name in self._tree.children(unit):
                    if name != LOGIN and (cgroup := f"{unit}/{name}") not in gone:
                        yield cgroup, self._limit(cgroup)
            elif unit in gone:
                continue
            elif above.startswith(FALLBACK_ROOT):
                yield unit, self._limit(unit)
            elif self._tree.noted(unit):
                yield unit, self._number(unit, "memory.max")
            elif self._tree.populated(unit):  # a service manager from before: what it has is not taken away from it
                yield unit, self._counted(unit)

    def _limit(self, place: str) -> int | None:
        """What the persona of a place says; of none that is a service manager."""
        noted = _number(self._tree.noted(place, MEMORY_NOTE))
        return self._number(place, "memory.max") if noted is None else noted

    # --- files --------------------------------------------------------------------------------------

    def _read(self, cgroup: str, file: str) -> str | None:
        """Without its newline; ``None`` where it is gone, or this kernel has it not."""
        try:
            return self._tree.read(cgroup, file).strip()
        except OSError:
            return None

    def _counted(self, cgroup: str) -> int:
        """Bytes of all kinds.  A limit that is not below this is written without waiting for the kernel to free any."""
        return self._number(cgroup, "memory.current") or 0

    def _number(self, cgroup: str, file: str) -> int | None:
        return _number(self._read(cgroup, file) or _MAX)

    def _lasting(self, cgroup: str) -> int:
        """Bytes that need no process to stay: files in a tmpfs, shared memory, what the kernel keeps of such."""
        lines = (line.partition(" ") for line in (self._read(cgroup, "memory.stat") or "").split("\n"))
        return sum(_number(value) or 0 for key, _, value in lines if key in _LASTING)


def _parsed(text: str) -> _Bound:
    words = text.split()
    ours = _number(words[0]) if len(words) == 3 else None
    if ours is None or not all(word == _MAX or _number(word) is not None for word in words[1:]):
        return _Bound()
    return _Bound(ours, words[1], words[2])


def _number(text: str) -> int | None:
    """Bytes as the kernel writes them; ``None`` = no number, or no limit."""
    return int(text) if _NUMBER.fullmatch(text) else None


def lacking(tree: Hierarchy, place: PersonaCgroup, persona: Persona) -> int:
    """How many bytes of its memory limit a place lacks for what earlier sessions of its user left."""
    limit = persona.resource_limits.memory_bytes
    if limit is None or place.shared:
        return 0
    with contextlib.suppress(OSError, ValueError):  # it went away, or somebody else set it to no limit
        return max(0, limit - limit % PAGE - int(tree.read(place.cgroup, "memory.max")))
    return 0
