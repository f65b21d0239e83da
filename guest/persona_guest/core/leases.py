"""What the broker decided, for as long as the guest may reuse it.  No clock of its own, no I/O."""

from typing import NamedTuple

from persona.decisions import Decision, Granted, Program, Width

_ENTRIES_MAX = 16384  # some 5 MB; beyond it everything is asked again, which is slow and safe


class Question(NamedTuple):
    """One program start to decide, as the lease book keys it.

    ``holder`` is a number that stands for user, groups and VM; ``image`` is (device, inode);
    ``argv0`` is empty unless the file is a multi-call program.
    """

    holder: int
    image: tuple[int, int]
    argv0: bytes
    argv: tuple[bytes, ...]
    complete: bool
    program: Program


class LeaseBook:
    """Decisions by program, and by program and exact command line.

    A decision made from an older generation than the newest event is never kept.
    """

    def __init__(self, grace_s: float = 0.0) -> None:
        self._grace_s = grace_s
        self._wide: dict[tuple[int, tuple[int, int], bytes], tuple[Decision, float]] = {}
        self._narrow: dict[tuple[int, tuple[int, int], tuple[bytes, ...], bool], tuple[Decision, float]] = {}
        self.generation = 0

    def lookup(self, question: Question, now: float) -> Decision | None:
        """The decision that still holds at ``now`` (monotonic seconds), or ``None``: ask."""
        entry = self._wide.get((question.holder, question.image, question.argv0))
        if entry is None or entry[1] <= now:
            entry = self._narrow.get((question.holder, question.image, question.argv, question.complete))
            if entry is None or entry[1] <= now:
                return None
        return entry[0]

    def within_grace(self, question: Question, now: float) -> Granted | None:
        """A grant whose lease has run out by less than the operator's grace, for when nobody can be asked."""
        decision = self.lookup(question, now - self._grace_s)
        return decision if isinstance(decision, Granted) else None

    def keep(self, question: Question, decision: Decision, now: float) -> None:
        """Remembers a decision for its lease, unless an event has overtaken it."""
        if decision.lease.seconds <= 0 or decision.generation < self.generation:
            return
        if len(self._wide) + len(self._narrow) >= _ENTRIES_MAX:
            self.drop()
        entry = (decision, now + decision.lease.seconds)
        if decision.lease.width is Width.PROGRAM:
            self._wide[question.holder, question.image, question.argv0] = entry
        else:
            self._narrow[question.holder, question.image, question.argv, question.complete] = entry

    def advance(self, generation: int) -> None:
        """An event: everything decided before ``generation`` is forgotten."""
        if generation != self.generation:
            self.generation = generation
            self.drop()

    def drop(self) -> None:
        """Forgets every lease."""
        self._wide.clear()
        self._narrow.clear()

    def remaining(self, holder: int, now: float) -> float | None:
        """Seconds until the longest-lived grant of a holder runs out; ``None`` without one."""
        ends = [
            end
            for book in (self._wide, self._narrow)
            for key, (decision, end) in book.items()
            if key[0] == holder and end > now and isinstance(decision, Granted)
        ]
        return max(ends) - now if ends else None
