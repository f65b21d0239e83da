"""Picks the persona: an immutable snapshot of all policies, indexed so that cost does not grow with their number.

First by who asks (user, groups, VM: a view, made once and kept), then by program (a row of the view,
made once and kept).  A row holds the few policies that can say anything about the program, in order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from persona.conditions import When
from persona.decisions import Decision, Denied, Granted, Lease, PersonaRef, Program, Request, Subject, Width
from persona.documents import Persona, Policy
from persona.patterns import Pattern
from persona.problems import Reason
from persona_broker.policy.outlook import Outlook, Unmet

LEASE_S = 30.0  # a lost event stream closes a session after this
_VIEWS_MAX = 4096
_ROWS_MAX = 4096  # rows of one view


@dataclass(frozen=True, slots=True)
class Versioned:
    """A persona and the number of its version."""

    persona: Persona
    version: int

    @property
    def ref(self) -> PersonaRef:
        """Name and version."""
        return PersonaRef(self.persona.name, self.version)


@dataclass(frozen=True, slots=True)
class Entry:
    """A policy that names a subject, with its persona (``None`` = missing) and why it does not hold, if so."""

    policy: Policy
    versioned: Versioned | None
    unmet: Unmet | None


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether a user may log in; ``entry`` is the first policy that holds right now, if any."""

    admitted: bool
    entry: Entry | None


class _Candidate:
    """What one policy says about one program."""

    __slots__ = ("commands", "granted", "name", "unmet_as", "whitelist")

    def __init__(self, policy: Policy, versioned: Versioned, program: Program, width: Width) -> None:
        self.name = policy.name
        self.commands = _relevant(policy.commands.about(program))
        self.whitelist = _relevant(versioned.persona.command_whitelist.about(program))
        self.granted = Granted(versioned.ref, policy.name, Lease(LEASE_S, width))
        self.unmet_as = versioned.persona.name


_Patterns = tuple[Pattern, ...]


def _relevant(patterns: _Patterns) -> _Patterns | None:
    """The patterns to test arguments against; ``None`` where every command line is allowed."""
    return (
        None if all(not p.negative for p in patterns) and any(not p.looks_at_arguments for p in patterns) else patterns
    )


def _allow(patterns: _Patterns | None, argv: tuple[str, ...], complete: bool) -> bool:
    if patterns is None:
        return True
    allowed = False
    for pattern in patterns:
        if pattern.fits(argv, complete):
            if pattern.negative:
                return False
            allowed = True
    return allowed


class _Row:
    """One program in one view: candidates in order, what is denied at once, and the lease's width."""

    __slots__ = ("candidates", "invalid", "nearest", "only", "width")

    def __init__(self, policies: Sequence[tuple[Policy, Versioned | None]], program: Program) -> None:
        said = [
            (policy, versioned)
            for policy, versioned in policies
            if policy.commands.about(program)
            and (versioned is None or versioned.persona.command_whitelist.about(program))
        ]
        looks = any(
            pattern.looks_at_arguments
            for policy, versioned in said
            for whitelist in (
                policy.commands,
                versioned.persona.command_whitelist if versioned else policy.commands,
            )
            for pattern in whitelist.about(program)
        )
        self.width = Width.ARGV if looks else Width.PROGRAM
        self.invalid = next((policy for policy, versioned in said if versioned is None), None)
        self.candidates = tuple(
            _Candidate(policy, versioned, program, self.width) for policy, versioned in said if versioned is not None
        )
        self.nearest = policies[0] if policies else None
        # the common case, decided without a loop: one policy speaks, and arguments do not matter
        first = self.candidates[0] if self.candidates else None
        self.only = first if first is not None and first.commands is None and first.whitelist is None else None


class _View:
    """What one subject can get: the policies that name it, in order, and its rows so far."""

    __slots__ = ("policies", "rows")

    def __init__(self, policies: Sequence[tuple[Policy, Versioned | None]]) -> None:
        self.policies = tuple(policies)
        self.rows: dict[Program, _Row] = {}


class Snapshot:
    """All documents of one generation.  Immutable but for its caches, which are bounded."""

    def __init__(self, policies: Sequence[Policy], personas: Mapping[str, Versioned]) -> None:
        self.policies = tuple(policies)
        self.personas = dict(personas)
        self.conditions: dict[str, When] = {policy.name: policy.when for policy in self.policies}
        self._by_user: dict[str, list[int]] = {}
        self._by_group: dict[str, list[int]] = {}
        for index, policy in enumerate(self.policies):
            for user in policy.users:
                self._by_user.setdefault(user, []).append(index)
            for group in policy.groups:
                self._by_group.setdefault(group, []).append(index)
        self._views: dict[Subject, _View] = {}

    def decide(self, request: Request, outlook: Outlook) -> Decision:
        """The decision on one program start, without its generation.  Pure; raises nothing."""
        view = self._views.get(request.subject) or self._view(request.subject)
        row = view.rows.get(request.program) or self._row(view, request.program)
        unmet_of = outlook.unmet
        only = row.only
        if only is not None and only.name not in unmet_of:
            return only.granted
        best: tuple[_Candidate, Unmet] | None = None
        argv, complete = request.argv, request.argv_complete
        for candidate in row.candidates:
            if _allow(candidate.commands, argv, complete) and _allow(candidate.whitelist, argv, complete):
                unmet = unmet_of.get(candidate.name)
                if unmet is None:
                    return candidate.granted
                best = best or (candidate, unmet)
        lease = Lease(LEASE_S, row.width)
        if best is not None:
            return Denied(best[1].reason, best[0].name, best[0].unmet_as, best[1].detail, lease)
        return self._no_match(request, row, outlook, lease)

    def _no_match(self, request: Request, row: _Row, outlook: Outlook, lease: Lease) -> Denied:
        if row.invalid is not None:
            detail = f"policy {row.invalid.name} names persona {row.invalid.persona}, which does not exist"
            return Denied(Reason.INVALID_PERSONA, row.invalid.name, row.invalid.persona, detail, lease)
        if row.nearest is None:
            user, vm = request.subject.user, request.subject.vm
            return Denied(Reason.NO_MATCHING_POLICY, help=f"no policy names {user} on {vm}", lease=lease)
        current = self.admit(request.subject, outlook).entry
        policy = current.policy if current else row.nearest[0]
        if not request.argv_complete and row.candidates:
            return Denied(
                Reason.ARGV_TOO_LONG,
                policy.name,
                policy.persona,
                "its arguments are too many to check",
                lease,
            )
        arguments = "with these arguments " if row.candidates and row.width is Width.ARGV else ""
        detail = f"not {arguments}in its whitelist; 'persona list' shows what is"
        return Denied(Reason.NO_MATCHING_POLICY, policy.name, policy.persona, detail, lease)

    def admit(self, subject: Subject, outlook: Outlook) -> Admission:
        """Whether any policy names the user on this VM, holding or not, and which holds first."""
        entries = self.entries(subject, outlook)
        holding = (entry for entry in entries if entry.unmet is None and entry.versioned is not None)
        return Admission(bool(entries), next(holding, None))

    def entries(self, subject: Subject, outlook: Outlook) -> list[Entry]:
        """Every policy that names the subject, in order."""
        view = self._views.get(subject) or self._view(subject)
        return [Entry(policy, versioned, outlook.unmet.get(policy.name)) for policy, versioned in view.policies]

    def _view(self, subject: Subject) -> _View:
        indexes: set[int] = {*self._by_user.get(subject.user, ()), *self._by_user.get("*", ())}
        for group in (*subject.groups, "*"):
            indexes.update(self._by_group.get(group, ()))
        policies = (self.policies[index] for index in sorted(indexes))
        view = _View(
            [
                (policy, self.personas.get(policy.persona))
                for policy in policies
                if any(fnmatchcase(subject.vm, glob) for glob in policy.vms)
            ]
        )
        if len(self._views) >= _VIEWS_MAX:
            self._views.clear()
        self._views[subject] = view
        return view

    def _row(self, view: _View, program: Program) -> _Row:
        row = _Row(view.policies, program)
        if len(view.rows) >= _ROWS_MAX:
            view.rows.clear()
        view.rows[program] = row
        return row
