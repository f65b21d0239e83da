"""How a change of documents spreads: which guests have it, and whether more is denied since.  Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

SPAN_MAX_S = 86_400.0  # denials of a day at most are compared: longer ago something else has changed, too
_MORE = 10  # denials of one reason beyond what was expected: fewer are somebody's mistake
_TIMES = 2.0


class Taken(StrEnum):
    """What is known of a guest and a generation."""

    TAKEN = "taken"  # it has asked since, and said that it knows this generation or a later one
    TOLD = "told"  # it was written to the guest's event stream; the guest has asked nothing since
    BEHIND = "behind"  # what it was told last is older
    NEVER = "never"  # it was never connected


@dataclass(frozen=True, slots=True)
class Seen:
    """The newest generations that a guest was told, and has said that it knows, each with the time (Unix seconds)."""

    told: int = 0
    told_at: float | None = None
    asked: int = 0
    asked_at: float | None = None


def taken(seen: Seen | None, generation: int) -> Taken:
    """Whether a guest has what holds since a generation."""
    if seen is None:
        return Taken.NEVER
    if seen.asked >= generation:
        return Taken.TAKEN
    return Taken.TOLD if seen.told >= generation else Taken.BEHIND


@dataclass(frozen=True, slots=True)
class Denials:
    """Denials by reason in a span of so many seconds."""

    seconds: float
    by_reason: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Moved:
    """How often a reason was denied since, and ``expected`` at the rate of before."""

    reason: str
    expected: float
    since: int

    @property
    def surge(self) -> bool:
        """Whether that is more than chance, or one user's mistake, explains."""
        return self.since - self.expected >= _MORE and self.since >= _TIMES * self.expected


def moved(before: Denials, since: Denials) -> list[Moved]:
    """By reason, the one with most denials since first.  Nothing is expected where nothing is known of before."""
    scale = since.seconds / before.seconds if before.seconds > 0 else 0.0
    reasons = sorted({*before.by_reason, *since.by_reason}, key=lambda name: (-since.by_reason.get(name, 0), name))
    return [
        Moved(name, round(before.by_reason.get(name, 0) * scale, 1), since.by_reason.get(name, 0)) for name in reasons
    ]
