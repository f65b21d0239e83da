"""Who is gated at all, before any policy is asked; and an admission that need not be asked for twice.

The exemptions come first: they are asked before anything that can fail, overflow or wait.
"""

from enum import StrEnum
from typing import Generic, TypeVar

from persona.decisions import Subject
from persona_guest.core.accounts import is_root_or_system
from persona_guest.settings import Gate

_FRESH_S = 10.0  # from PAM's account stage to its session stage: a moment, unless somebody stopped in between
_KEPT_MAX = 1024

Answer = TypeVar("Answer")


class Exemption(StrEnum):
    """Why a login is never gated."""

    ROOT = "root"
    SYSTEM_USER = "system_user"
    BREAK_GLASS = "break_glass"


def exemption(uid: int, groups: tuple[str, ...], gate: Gate) -> Exemption | None:
    """root's own logins, system accounts and the break-glass group; ``None`` = gated like anyone."""
    return exemption_of_account(uid, gate) or (Exemption.BREAK_GLASS if gate.break_glass_group in groups else None)


def exemption_of_account(uid: int, gate: Gate) -> Exemption | None:
    """The exemption that follows from the uid alone, for callers whose groups are not known."""
    if not gate.never_gate_root:  # a trial: whoever starts it is gated, root and system accounts too
        return None
    if uid == 0:
        return Exemption.ROOT
    return Exemption.SYSTEM_USER if is_root_or_system(uid, gate.uid_min) else None


class Recent(Generic[Answer]):
    """What the broker answered in PAM's account stage, for the session stage of the same process.

    Used once, for a few seconds, and only while no event has come in between: then asking again
    would give the same answer, and a login would wait for it twice.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, Subject], tuple[Answer, int, float]] = {}

    def keep(self, pid: int, subject: Subject, answer: Answer, generation: int, now: float) -> None:
        """Remembers an answer; ``generation`` is that of the newest event, ``now`` monotonic seconds."""
        if len(self._kept) >= _KEPT_MAX:
            self._kept.clear()  # an account stage without a session stage: password changes, failed logins
        self._kept[pid, subject] = (answer, generation, now)

    def take(self, pid: int, subject: Subject, generation: int, now: float) -> Answer | None:
        """Returns the answer if it still holds, and forgets it: it is used once."""
        kept = self._kept.pop((pid, subject), None)
        if kept is None or kept[1] != generation or now - kept[2] > _FRESH_S:
            return None
        return kept[0]
