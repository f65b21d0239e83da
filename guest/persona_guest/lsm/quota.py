"""What each user has of the kernel layer's maps, so that no one of them can fill what all of them need.

An approval is used up by the exec that it is for, and its pages of arguments by the comparison.  An exec
that fails in between leaves them; a user can make as many of those as they like.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

SHARE = 1024  # of 8192 approvals, and of as many pages; nobody has as many execs under way


@dataclass(slots=True)
class _Share:
    given: dict[int, tuple[int, int]] = field(default_factory=dict)  # by thread: pages, and until when (monotonic ns)
    pages: int = 0


class Quota:
    """``used`` tells whether the kernel took a thread's approval and pages, ``forget`` removes them from the maps."""

    def __init__(self, used: Callable[[int, int], bool], forget: Callable[[int, int], None], most: int = SHARE) -> None:
        self._used = used
        self._forget = forget
        self._most = most
        self._quota: dict[int, _Share] = {}

    def take(self, uid: int, tid: int, pages: int, until: int, now: int) -> None:
        """Counts one more approval of a user's, with so many pages.

        Raises ``ValueError`` where it exceeds their share.
        """
        share = self._quota.setdefault(uid, _Share())
        earlier = share.given.get(tid)
        if earlier is not None:
            self._drop(share, tid)
            if earlier[0] > pages:
                self._forget(tid, earlier[0])
        if len(share.given) >= self._most or share.pages + pages > self._most:
            self._tidy(share, now)
            if len(share.given) >= self._most or share.pages + pages > self._most:
                raise ValueError(f"uid {uid} has {len(share.given)} approvals that were not used")
        share.given[tid] = (pages, until)
        share.pages += pages

    def tidy(self, now: int) -> None:
        """Gives back what was used, and removes what was not used in its time.  Call it every few seconds."""
        for uid, share in list(self._quota.items()):
            self._tidy(share, now)
            if not share.given:
                del self._quota[uid]

    def _tidy(self, share: _Share, now: int) -> None:
        for tid, (pages, until) in list(share.given.items()):
            if until <= now:
                self._forget(tid, pages)
            elif not self._used(tid, pages):
                continue
            self._drop(share, tid)

    @staticmethod
    def _drop(share: _Share, tid: int) -> None:
        share.pages -= share.given.pop(tid)[0]
