"""A request to run a program, and the two answers that there are: granted or denied.

A decision is never a bare boolean: it names the persona and policy that it came from, so that
whoever is refused can be told why and whoever audits can tell from what: versions of policy and persona, where the
broker said them, are those of its store, which keeps every one.  A policy's origin (``10-analysts.yaml:3``) is where
its operator finds it.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from persona.problems import AnyReason


class Width(StrEnum):
    """How far a lease reaches."""

    PROGRAM = "program"  # any arguments: no policy of this user looks at this program's arguments
    ARGV = "argv"  # this exact command line only


@dataclass(frozen=True, slots=True)
class Program:
    """A program file, as the guest's agent identified it by inode (never by the caller's path).

    ``path`` is the canonical absolute path in the agent's mount namespace; ``names`` are the bare
    names and ``paths`` all absolute paths under which the agent's secure path leads to this very
    file (``path`` included).  Of a file that is several programs, only the one that it is called as.
    ``loader``: the agent found that this file is an ELF loader (``ld.so``), which runs any program that
    it is given; no wildcard of a whitelist allows it (``persona.patterns.is_loader``).
    ``home``: the path below the home of the session's user, of a program that is this user's own and lies
    there; else empty.  No whitelist allows such a program, only ``home_programs`` of a persona does.
    """

    path: str
    names: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    loader: bool = False
    home: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """Who asks, and where: login user name, names of all groups, the VM's name."""

    user: str
    groups: tuple[str, ...]
    vm: str


@dataclass(frozen=True, slots=True)
class Request:
    """One program start to decide.

    ``argv_complete`` is false where the command line was longer than the agent reads: ``argv``
    then holds its beginning, a pattern with arguments never matches it and a carve-out always does.
    """

    subject: Subject
    session: str
    program: Program
    argv: tuple[str, ...]
    cwd: str
    argv_complete: bool = True


@dataclass(frozen=True, slots=True)
class PersonaRef:
    """One immutable version of a persona."""

    name: str
    version: int


@dataclass(frozen=True, slots=True)
class Lease:
    """How long (seconds) and how widely a guest may reuse a decision without asking again."""

    seconds: float
    width: Width


@dataclass(frozen=True, slots=True)
class Granted:
    """Allowed: under this persona version, because of this policy."""

    persona: PersonaRef
    policy: str
    lease: Lease
    generation: int = field(default=0, compare=False)
    policy_version: int | None = field(default=None, compare=False)
    policy_origin: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Denied:
    """Refused: the reason of the best candidate, and what would help.

    ``policy`` and ``persona`` name that candidate, where there was one.  ``generation`` is the
    state of policies and conditions that the answer was made from.
    """

    reason: AnyReason
    policy: str | None = None
    persona: str | None = None
    help: str = ""
    lease: Lease = Lease(seconds=0.0, width=Width.ARGV)
    generation: int = field(default=0, compare=False)
    persona_version: int | None = field(default=None, compare=False)
    policy_version: int | None = field(default=None, compare=False)
    policy_origin: str = field(default="", compare=False)


Decision = Granted | Denied
