"""What the broker decided, for as long as the guest may reuse it.  No clock of its own, no I/O."""

from typing import NamedTuple

from persona.decisions import Decision, Granted, Program, Width

_SIZE_MAX = 16 << 20  # bytes of all leases, about; beyond it everything is asked again, which is slow and safe
_SHARE = _SIZE_MAX // 4  # of one holder: whoever runs ever other command lines loses their own leases, nobody else's
_ENTRY = 320  # bytes of a lease without its command line
_ARGUMENT = 48  # and of each argument, beside its text


class Question(NamedTuple):
    """One program start to decide, as the lease book keys it.

    ``holder`` is a number that stands for user, groups and VM; ``file`` one that stands for a file in one
    state (``Identified.version``), so that a decision ends with the state that it was made for; ``argv0``
    is the name by which a file that is several programs is called (of a script that of its path, which is
    not in ``argv``), and empty for any other.
    """

    holder: int
    file: int
    argv0: bytes
    argv: tuple[bytes, ...]
    complete: bool
    program: Program


_Narrow = tuple[int, int, bytes, tuple[bytes, ...], bool]


def _narrow(question: Question) -> _Narrow:
    return question.holder, question.file, question.argv0, question.argv, question.complete


class LeaseBook:
    """Decisions by program, and by program and exact command line.

    A decision made from an older generation than the newest event is never kept.
    """

    def __init__(self, grace_s: float = 0.0) -> None:
        self._grace_s = grace_s
        self._wide: dict[tuple[int, int, bytes], tuple[Decision, float]] = {}
        self._narrow: dict[_Narrow, tuple[Decision, float]] = {}
        self._sizes: dict[int, int] = {}  # by holder
        self.generation = 0

    def lookup(self, question: Question, now: float) -> Decision | None:
        """The decision that still holds at ``now`` (monotonic seconds), or ``None``: ask."""
        entry = self._wide.get((question.holder, question.file, question.argv0))
        if entry is None or entry[1] <= now:
            entry = self._narrow.get(_narrow(question))
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
        entry = (decision, now + decision.lease.seconds)
        if decision.lease.width is Width.PROGRAM:
            wide = (question.holder, question.file, question.argv0)
            if wide not in self._wide:
                self._take(question.holder, len(question.argv0))
            self._wide[wide] = entry
        else:
            narrow = _narrow(question)
            if narrow not in self._narrow:
                texts = len(question.argv0) + sum(map(len, question.argv))
                self._take(question.holder, texts + _ARGUMENT * len(question.argv))
            self._narrow[narrow] = entry

    def _take(self, holder: int, size: int) -> None:
        """Makes room for one more lease of a holder, of about ``size`` bytes beside what each takes."""
        size += _ENTRY
        if self._sizes.get(holder, 0) + size > _SHARE:
            self._forget(holder)
        if sum(self._sizes.values()) + size > _SIZE_MAX:
            self.drop()
        self._sizes[holder] = self._sizes.get(holder, 0) + size

    def _forget(self, holder: int) -> None:
        self._wide = {key: entry for key, entry in self._wide.items() if key[0] != holder}
        self._narrow = {key: entry for key, entry in self._narrow.items() if key[0] != holder}
        self._sizes.pop(holder, None)

    def advance(self, generation: int) -> None:
        """The broker has a new generation: every lease is forgotten."""
        if generation != self.generation:
            self.generation = generation
            self.drop()

    def drop(self) -> None:
        """Forgets every lease."""
        self._wide.clear()
        self._narrow.clear()
        self._sizes.clear()

    def remaining(self, holder: int, now: float) -> float | None:
        """Seconds until the longest-lived grant of a holder runs out; ``None`` without one."""
        ends = [
            end
            for book in (self._wide, self._narrow)
            for key, (decision, end) in book.items()
            if key[0] == holder and end > now and isinstance(decision, Granted)
        ]
        return max(ends) - now if ends else None
