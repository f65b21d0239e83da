"""What would be decided, and why each policy does or does not apply: the operator's dry run, without a guest."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from persona.decisions import Decision, Program, Request, Subject
from persona.patterns import SECURE_PATH
from persona_broker.policy.engine import Entry, Snapshot
from persona_broker.policy.outlook import Sample, Unhealthy, World, latch, look, thresholds


@dataclass(frozen=True, slots=True)
class Considered:
    """One policy of the user, and what it says: ``applies``, or the first thing that keeps it from it."""

    policy: str
    persona: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """The decision and the way to it."""

    decision: Decision
    considered: tuple[Considered, ...]


def program_named(word: str) -> Program:
    """A program as a guest would identify it, were it where its name says; usr-merge as in Debian 12.

    It has a name only in the directories where guests look for names.
    """
    if word.startswith("/"):
        for old in ("/bin/", "/sbin/", "/lib/"):
            word = "/usr" + word if word.startswith(old) else word
        directory, name = os.path.split(word)
        return Program(word, (name,) if directory in SECURE_PATH else (), (word,))
    return Program(f"/usr/bin/{word}", (word,), (f"/usr/bin/{word}",))


def world_of(snapshot: Snapshot, load: Mapping[str, float], now: float) -> World:
    """A world of this load and time, with no threshold exceeded from before."""
    sample = Sample(now, load, "explain")
    return World(sample, latch(frozenset(), thresholds(snapshot.conditions), sample), now, 1.0)


def explain(
    snapshot: Snapshot, subject: Subject, argv: tuple[str, ...], world: World, unhealthy: Unhealthy
) -> Explanation:
    """Pure: the same engine as for guests."""
    outlook = look(snapshot.conditions, world, 0, unhealthy)
    program = program_named(argv[0])
    decision = snapshot.decide(Request(subject, "", program, argv, "/"), outlook)
    considered = tuple(_consider(entry, program, argv) for entry in snapshot.entries(subject, outlook))
    return Explanation(decision, considered)


def _consider(entry: Entry, program: Program, argv: tuple[str, ...]) -> Considered:
    if entry.versioned is None:
        verdict = "its persona does not exist"
    elif not entry.policy.commands.allows(program, argv):
        verdict = "does not speak for this command"
    elif not entry.versioned.persona.command_whitelist.allows(program, argv):
        verdict = "its persona does not allow this command"
    elif entry.unmet is not None:
        verdict = f"does not hold: {entry.unmet.detail}"
    else:
        verdict = "applies"
    return Considered(entry.policy.name, entry.policy.persona, verdict)
