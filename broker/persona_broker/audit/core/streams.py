"""Which numbers of a stream were received: the newest, and the gaps before it.

A guest counts its records from 1, and tells by a marker which numbers it dropped.  A number that neither came nor
was told of is a gap, and proves that something was lost.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Gap:
    """Numbers ``first`` to ``last`` did not come; ``why`` is what the guest's marker says, empty where none does."""

    first: int
    last: int
    why: str = ""

    @property
    def count(self) -> int:
        """How many numbers."""
        return self.last - self.first + 1


@dataclass(slots=True)
class Received:
    """The numbers of one stream that came.  ``gaps`` are in order and do not overlap."""

    last: int = 0
    gaps: list[Gap] = field(default_factory=list)

    def has(self, number: int) -> bool:
        """Whether it came before."""
        return number <= self.last and self._gap(number) is None

    def add(self, number: int) -> bool:
        """Notes that a number came; whether it is new."""
        if number == self.last + 1:
            self.last = number
            return True
        if number > self.last:
            self.gaps.append(Gap(self.last + 1, number - 1))
            self.last = number
            return True
        index = self._gap(number)
        if index is None:
            return False
        gap = self.gaps[index]
        halves = (replace(gap, last=number - 1), replace(gap, first=number + 1))
        self.gaps[index : index + 1] = [half for half in halves if half.first <= half.last]
        return True

    def explain(self, first: int, last: int, why: str) -> None:
        """Notes what a marker says: of numbers ``first`` to ``last`` those that did not come were dropped."""
        if first > self.last + 1:  # nobody said what became of those between
            self.gaps.append(Gap(self.last + 1, first - 1))
        if last > self.last:
            self.gaps.append(Gap(max(first, self.last + 1), last, why))
            self.last = last
        self.gaps = [part for gap in self.gaps for part in _explained(gap, first, last, why)]

    def _gap(self, number: int) -> int | None:
        """The place of the gap that a number is in."""
        index = bisect_right(self.gaps, number, key=lambda gap: gap.first) - 1
        return index if index >= 0 and number <= self.gaps[index].last else None


def _explained(gap: Gap, first: int, last: int, why: str) -> Iterator[Gap]:
    """A gap in the parts before, within and after what a marker explains; what was explained before stays so."""
    low, high = max(gap.first, first), min(gap.last, last)
    if low > high or gap.why:
        yield gap
        return
    if gap.first < low:
        yield replace(gap, last=low - 1)
    yield Gap(low, high, why or "not said")
    if gap.last > high:
        yield replace(gap, first=high + 1)


def unexplained(gaps: Iterable[Gap]) -> int:
    """How many numbers are missing without a word."""
    return sum(gap.count for gap in gaps if not gap.why)
