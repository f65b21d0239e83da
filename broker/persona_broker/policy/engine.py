"""Picks the persona: an immutable snapshot of all policies, indexed so that cost does not grow with their number.

First by who asks (user, groups, VM: a view), then by program (a row): the few policies that can say
anything about the program, in order.  What a row answers is built once an outlook, so that a request
costs a lookup and, where arguments matter, a test of the patterns that look at them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from persona.conditions import When
from persona.decisions import Decision, Denied, Granted, Lease, PersonaRef, Program, Request, Subject, Width
from persona.documents import Persona, Policy
from persona.health import VmHealth
from persona.patterns import Pattern
from persona.problems import Reason
from persona_broker.policy.outlook import Outlook, Unmet

LEASE_S = 30.0  # a lost event stream closes a session after this
_VIEWS_MAX = 4096
_ROWS_MAX = 65_536  # about 100 MB at worst, whatever programs and users a guest invents


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


_Patterns = tuple[Pattern, ...]
_Pairs = tuple[tuple[Policy, Versioned | None], ...]


def _relevant(patterns: _Patterns) -> _Patterns | None:
    """The patterns to test arguments against; ``None`` where every command line is allowed."""
    free = all(not p.negative for p in patterns) and any(not p.looks_at_arguments for p in patterns)
    return None if free else patterns


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


class _Judged:
    """What a row answers under one outlook."""

    __slots__ = ("options", "outlook", "refused", "too_long", "whole")

    outlook: Outlook | None
    options: tuple[tuple[_Patterns | None, _Patterns | None, Decision], ...]  # by candidate, in order
    refused: Denied  # no candidate allows the arguments
    too_long: Denied  # the same, where the arguments are not all known
    whole: Decision | None  # for any arguments, where they do not matter

    def decide(self, argv: tuple[str, ...], complete: bool) -> Decision:
        best: Decision | None = None
        for commands, whitelist, decision in self.options:
            if _allow(commands, argv, complete) and _allow(whitelist, argv, complete):
                if type(decision) is Granted:
                    return decision
                best = best or decision
        return best or (self.refused if complete else self.too_long)


_UNJUDGED = _Judged()
_UNJUDGED.outlook = None


class _Row:
    """One program of one subject: the policies that speak of it and whose persona does, in order."""

    __slots__ = ("invalid", "judged", "policies", "said", "subject", "width")

    def __init__(self, subject: Subject, policies: _Pairs, program: Program) -> None:
        self.subject = subject
        self.policies = policies
        self.judged = _UNJUDGED
        self.invalid: Policy | None = None
        self.said: list[tuple[Policy, Versioned, _Patterns, _Patterns]] = []
        looks = False
        for policy, versioned in policies:
            commands = policy.commands.about(program)
            if not commands:
                continue
            if versioned is None:
                self.invalid = self.invalid or policy
                looks = looks or any(pattern.looks_at_arguments for pattern in commands)
                continue
            whitelist = versioned.persona.command_whitelist.about(program)
            if whitelist:
                looks = looks or any(pattern.looks_at_arguments for pattern in (*commands, *whitelist))
                self.said.append((policy, versioned, commands, whitelist))
        self.width = Width.ARGV if looks else Width.PROGRAM

    def judge(self, outlook: Outlook) -> _Judged:
        """Everything that can be answered as long as the outlook does not change."""
        judged = _Judged()
        lease, now = Lease(LEASE_S, self.width), outlook.generation
        options = []
        for policy, versioned, commands, whitelist in self.said:
            unmet = outlook.unmet_of(policy, self.subject.vm)
            decision: Decision
            if unmet is None:
                decision = Granted(versioned.ref, policy.name, lease, now)
            else:
                decision = Denied(unmet.reason, policy.name, versioned.persona.name, unmet.detail, lease, now)
            options.append((_relevant(commands), _relevant(whitelist), decision))
        judged.outlook = outlook
        judged.options = tuple(options)
        judged.refused = self._refused(outlook, lease)
        judged.too_long = judged.refused
        if judged.refused.reason is Reason.NO_MATCHING_POLICY and options:
            nearest = judged.refused
            detail = "its arguments are too many to check"
            judged.too_long = Denied(Reason.ARGV_TOO_LONG, nearest.policy, nearest.persona, detail, lease, now)
        judged.whole = judged.decide((), True) if self.width is Width.PROGRAM else None
        self.judged = judged
        return judged

    def _refused(self, outlook: Outlook, lease: Lease) -> Denied:
        now = outlook.generation
        if self.invalid is not None:
            name, ghost = self.invalid.name, self.invalid.persona
            detail = f"policy {name} names persona {ghost}, which does not exist"
            return Denied(Reason.INVALID_PERSONA, name, ghost, detail, lease, now)
        if not self.policies:
            detail = f"no policy names {self.subject.user} on {self.subject.vm}"
            return Denied(Reason.NO_MATCHING_POLICY, None, None, detail, lease, now)
        vm = self.subject.vm
        holding = (p for p, versioned in self.policies if versioned is not None and not outlook.unmet_of(p, vm))
        nearest = next(holding, self.policies[0][0])
        arguments = "with these arguments " if self.said and self.width is Width.ARGV else ""
        detail = f"not {arguments}in its whitelist; 'persona list' shows what is"
        return Denied(Reason.NO_MATCHING_POLICY, nearest.name, nearest.persona, detail, lease, now)


_SubjectKey = tuple[str, tuple[str, ...], str]
_RowKey = tuple[str, tuple[str, ...], str, str, tuple[str, ...], tuple[str, ...]]


class Snapshot:
    """All documents of one generation.  Immutable but for its caches, which are bounded."""

    def __init__(self, policies: Sequence[Policy], personas: Mapping[str, Versioned]) -> None:
        self.policies = tuple(policies)
        self.personas = dict(personas)
        grouped: dict[When, list[str]] = {}
        globs: dict[VmHealth, set[str]] = {}
        self._by_user: dict[str, list[int]] = {}
        self._by_group: dict[str, list[int]] = {}
        for index, policy in enumerate(self.policies):
            if policy.when.host_load or policy.when.hours:
                grouped.setdefault(policy.when, []).append(policy.name)
            for user in policy.users:
                self._by_user.setdefault(user, []).append(index)
            for group in policy.groups:
                self._by_group.setdefault(group, []).append(index)
            if policy.when.vm_health is not None:
                globs.setdefault(policy.when.vm_health, set()).update(policy.vms)
        self.conditions: dict[When, tuple[str, ...]] = {when: tuple(names) for when, names in grouped.items()}
        self.vm_conditions: dict[VmHealth, frozenset[str]] = {health: frozenset(vms) for health, vms in globs.items()}
        # plain tuples as keys: a dataclass would be hashed and compared by interpreted code, a request at a time
        self._views: dict[_SubjectKey, _Pairs] = {}
        self._rows: dict[_RowKey, _Row] = {}

    def decide(self, request: Request, outlook: Outlook) -> Decision:
        """The decision on one program start.  Pure; raises nothing."""
        who, what = request.subject, request.program
        key = (who.user, who.groups, who.vm, what.path, what.names, what.paths)
        row = self._rows.get(key) or self._row(key, who, what)
        judged = row.judged
        if judged.outlook is not outlook:
            judged = row.judge(outlook)
        return judged.whole or judged.decide(request.argv, request.argv_complete)

    def admit(self, subject: Subject, outlook: Outlook) -> Admission:
        """Whether any policy names the user on this VM, holding or not, and which holds first."""
        entries = self.entries(subject, outlook)
        holding = (entry for entry in entries if entry.unmet is None and entry.versioned is not None)
        return Admission(bool(entries), next(holding, None))

    def entries(self, subject: Subject, outlook: Outlook) -> list[Entry]:
        """Every policy that names the subject, in order."""
        pairs = self._view(subject)
        return [Entry(policy, versioned, outlook.unmet_of(policy, subject.vm)) for policy, versioned in pairs]

    def _view(self, subject: Subject) -> _Pairs:
        key = (subject.user, subject.groups, subject.vm)
        view = self._views.get(key)
        if view is None:
            indexes: set[int] = {*self._by_user.get(subject.user, ()), *self._by_user.get("*", ())}
            for group in (*subject.groups, "*"):
                indexes.update(self._by_group.get(group, ()))
            policies = (self.policies[index] for index in sorted(indexes))
            here = (p for p in policies if any(fnmatchcase(subject.vm, glob) for glob in p.vms))
            view = tuple((policy, self.personas.get(policy.persona)) for policy in here)
            if len(self._views) >= _VIEWS_MAX:
                self._views.clear()
            self._views[key] = view
        return view

    def _row(self, key: _RowKey, subject: Subject, program: Program) -> _Row:
        row = _Row(subject, self._view(subject), program)
        if len(self._rows) >= _ROWS_MAX:
            self._rows.clear()
        self._rows[key] = row
        return row
