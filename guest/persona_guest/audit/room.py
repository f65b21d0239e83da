"""Who may have how much of a spool.  Pure.

Granted starts, of which there may be any number, have at most three quarters of the whole; the rest is kept for
denials, admissions and all else.  Of either kind each user may take a quarter of what is still free: one who takes all
they can has a fifth of it and leaves four fifths, two leave sixteen twenty-fifths, and so on.
"""

from collections import Counter

_PART = 4  # of what is free, that is one user's at most


class Room:
    """``bound`` bytes.  One thread changes it at a time; ``has`` may be asked from any."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.used = 0
        self._grants = 0  # bytes of ``used``
        self._of: Counter[tuple[str, bool]] = Counter()

    def has(self, user: str, size: int, *, grant: bool, free: int | None = None) -> bool:
        """Whether a record of that many bytes may still be kept for ``user``, where no more than ``free`` are."""
        room = self.bound - self.used
        if grant:
            room = min(room, self.bound * 3 // 4 - self._grants)
        left = (room if free is None else min(room, free)) - size
        return self._of[user, grant] + size <= left // _PART

    def take(self, user: str, size: int, *, grant: bool) -> None:
        """It is kept; whether there is room is the caller's to ask."""
        self.used += size
        self._grants += size if grant else 0
        self._of[user, grant] += size

    def give_back(self, user: str, size: int, *, grant: bool) -> None:
        """It is not kept any more."""
        self.used -= size
        self._grants -= size if grant else 0
        self._of[user, grant] -= size
        if self._of[user, grant] <= 0:
            del self._of[user, grant]
