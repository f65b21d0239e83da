"""What would be decided, and why each policy does or does not apply: the operator's dry run, without a guest."""

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from persona.decisions import Decision, Denied, Program, Request, Subject
from persona.home_programs import is_below
from persona.patterns import SECURE_PATH, usr_merged
from persona.program_facts import BUILTINS
from persona_broker.policy.conditions import ConditionInputs, Placed, Sample, Unhealthy, latch, look, thresholds
from persona_broker.policy.snapshot import Entry, Snapshot, Source

# What may be somebody's login shell, which no broker knows; ``persona explain`` in the guest does.
_SHELLS = frozenset({"sh", "bash", "rbash", "dash", "ash", "zsh", "ksh", "mksh", "fish", "tcsh", "csh"})
_NAMED_MAX = 20  # groups in a note
_NOT_PLACED: Placed = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Considered:
    """One policy of the user, where it is written, and what it says.

    That is ``applies``, or the first thing that keeps it from applying.
    """

    policy: str
    origin: str
    persona: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """The decision and the way to it."""

    decision: Decision
    considered: tuple[Considered, ...]
    notes: tuple[str, ...] = ()  # what a guest does beside it


def program_named(word: str, user: str) -> Program:
    """A program as a guest would identify it, were it where its name says; usr-merge as in Debian 12.

    It has a name only in the directories where guests look for names.  One below ``/home/USER`` is taken for the
    user's own, in their home.
    """
    home = word.removeprefix(f"/home/{user}/")
    if home != word and is_below(home):
        return Program(word, (), (word,), home=home)
    if word.startswith("/"):
        word = usr_merged(word)
        directory, name = posixpath.split(word)
        return Program(word, (name,) if directory in SECURE_PATH else (), (word,))
    return Program(f"/usr/bin/{word}", (word,), (f"/usr/bin/{word}",))


def world_of(snapshot: Snapshot, load: Mapping[str, float], now: float) -> ConditionInputs:
    """A world of this load and time, with no threshold exceeded from before."""
    sample = Sample(now, load, "explain")
    return ConditionInputs(sample, latch(frozenset(), thresholds(snapshot.conditions), sample), now, 1.0)


def explain(
    snapshot: Snapshot,
    subject: Subject,
    argv: tuple[str, ...],
    world: ConditionInputs,
    unhealthy: Unhealthy,
    placed: Placed = _NOT_PLACED,
) -> Explanation:
    """Pure: the same engine as for guests."""
    condition_state = look(snapshot.conditions, world, 0, unhealthy, placed)
    program = program_named(argv[0], subject.user)
    decision = snapshot.decide(Request(subject, "", program, argv, "/"), condition_state)
    considered = tuple(
        _consider(entry, snapshot.sources.get(entry.policy.name, Source()).origin, program, argv)
        for entry in snapshot.entries(subject, condition_state)
    )
    notes = _notes(decision, program, argv)
    groups = snapshot.groups_in_use(subject.vm).names
    if isinstance(decision, Denied) and groups and not subject.groups:
        notes = (*notes, f"no --group was given; policies for {subject.vm} name {_few(sorted(groups))}")
    return Explanation(decision, considered, notes)


def _few(names: Sequence[str]) -> str:
    return ", ".join((*names[:_NAMED_MAX], *(["..."] if len(names) > _NAMED_MAX else [])))


def _notes(decision: Decision, program: Program, argv: tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(decision, Denied):
        return ()
    if not _SHELLS.isdisjoint(program.names):
        return ("a guest starts it all the same where it is the login shell of an admitted user",)
    if argv[0] in BUILTINS:
        return (f"a shell does '{argv[0]}' itself: no program starts for it, and nothing is decided",)
    if len(argv) == 1 and len(argv[0].split()) > 1:
        return ("this is one program whose name has blanks; for a command with arguments leave the quotes out",)
    return ()


def _consider(entry: Entry, origin: str, program: Program, argv: tuple[str, ...]) -> Considered:
    if not entry.policy.commands.speaks_for(program, argv):
        verdict = "does not speak for this command"
    elif entry.flaw is not None or entry.versioned is None:
        ending = "; it keeps the policies after it from being asked" if entry.hides else ""
        verdict = (entry.flaw.detail if entry.flaw is not None else "its persona does not exist") + ending
    elif not entry.versioned.persona.allows(program, argv):
        verdict = "its persona does not allow this command"
    elif entry.unmet is not None:
        verdict = f"does not hold: {entry.unmet.detail}"
    else:
        verdict = "applies"
    return Considered(entry.policy.name, origin, entry.policy.persona, verdict)
