"""Picks the persona: an immutable snapshot of all policies, indexed so that cost does not grow with their number.

First by who asks (user, groups, VM: a view), then by program (a row): the few policies that can say
anything about the program, in order.  What a row answers is built once a condition state, so that a request
costs a lookup and, where arguments matter, a test of the patterns that look at them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from persona import wire
from persona.canonical import to_mapping
from persona.codec import GroupsInUse
from persona.conditions import When
from persona.decisions import Decision, Denied, Granted, Lease, PersonaRef, Program, Request, Subject, Width
from persona.documents import Persona, Policy
from persona.health import VmHealth
from persona.patterns import Pattern, is_loader
from persona.problems import Reason
from persona.wildcards import matches
from persona_broker.policy.conditions import ConditionState, Unmet
from persona_broker.policy.unreadable import Unreadable

LEASE_S = 30.0  # a lost event stream closes a session after this
_VIEWS_MAX = 4096
_VMS_MAX = 4096
_ROWS_MAX = 65_536
_KEYS_MAX = 32 << 20  # bytes of all views, and of all rows, about: what a guest invents may be long
_TEXT = 64  # bytes of a text, beside its characters


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
class Source:
    """Which version of a policy decides, and where that is written; neither is known of what is not stored."""

    version: int | None = None
    origin: str = ""


_NOT_STORED = Source()


@dataclass(frozen=True, slots=True)
class Flaw:
    """Why a policy can grant nothing: it, or its persona, cannot be read.  ``detail`` is for the refused user."""

    reason: Reason
    detail: str
    conditions_unknown: bool  # its ``when`` is what cannot be read: it does not hold, and hides nothing


@dataclass(frozen=True, slots=True)
class Entry:
    """A policy that names a subject, and why it does not hold, if so.

    It has a persona, or a ``flaw``.
    """

    policy: Policy
    versioned: Versioned | None
    unmet: Unmet | None
    flaw: Flaw | None

    @property
    def holds(self) -> bool:
        """Whether it hands out its persona now."""
        return self.unmet is None and self.flaw is None

    @property
    def hides(self) -> bool:
        """Whether its flaw keeps later policies from speaking: it would hold now, could it be read."""
        return _hides(self.flaw, self.unmet)


def _of(source: Source) -> tuple[int | None, str]:
    return source.version, source.origin


def _hides(flaw: Flaw | None, unmet: Unmet | None) -> bool:
    return flaw is not None and unmet is None and not flaw.conditions_unknown


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether a user may log in; ``entry`` is the first policy that holds right now, if any."""

    admitted: bool
    entry: Entry | None


_Patterns = tuple[Pattern, ...]
_View = tuple[tuple[Policy, Versioned | None, Flaw | None], ...]  # one of the last two


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
    """What a row answers under one condition state."""

    __slots__ = ("condition_state", "options", "refused", "too_long", "whole")

    condition_state: ConditionState | None
    # by candidate, in order; true = after this one no other is asked
    options: tuple[tuple[_Patterns | None, _Patterns | None, Decision, bool], ...]
    refused: Denied  # no candidate allows the arguments
    too_long: Denied  # the same, where the arguments are not all known
    whole: Decision | None  # for any arguments, where they do not matter

    def decide(self, argv: tuple[str, ...], complete: bool) -> Decision:
        best: Decision | None = None
        for commands, whitelist, decision, last in self.options:
            if _allow(commands, argv, complete) and _allow(whitelist, argv, complete):
                if last:
                    return decision
                best = best or decision
        return best or (self.refused if complete else self.too_long)


_UNJUDGED = _Judged()
_UNJUDGED.condition_state = None


class _Row:
    """One program of one subject: the policies that speak of it and whose persona does, in order."""

    __slots__ = ("home", "judged", "loader", "policies", "said", "sources", "spoken_for", "subject", "width")

    def __init__(self, subject: Subject, policies: _View, program: Program, sources: Mapping[str, Source]) -> None:
        self.subject = subject
        self.sources = sources
        self.policies = policies
        self.loader = is_loader(program)
        self.home = bool(program.home)
        self.judged = _UNJUDGED
        self.spoken_for = False  # some policy's commands have the program, with some arguments
        self.said: list[tuple[Policy, Versioned | Flaw, _Patterns, _Patterns | None]] = []
        looks = False
        for policy, versioned, flaw in policies:
            commands = policy.commands.about(program)
            if not commands:
                continue
            if not any(pattern.negative and not pattern.looks_at_arguments for pattern in commands):
                self.spoken_for = self.spoken_for or any(not pattern.negative for pattern in commands)
            if versioned is None:
                if flaw is not None:
                    looks = looks or any(pattern.looks_at_arguments for pattern in commands)
                    self.said.append((policy, flaw, commands, None))
                continue
            if program.home:  # its whitelist has no say
                if versioned.persona.allows_in_home(program):
                    looks = looks or any(pattern.looks_at_arguments for pattern in commands)
                    self.said.append((policy, versioned, commands, None))
                continue
            whitelist = versioned.persona.command_whitelist.counting(program)
            if whitelist:
                looks = looks or any(pattern.looks_at_arguments for pattern in (*commands, *whitelist))
                self.said.append((policy, versioned, commands, whitelist))
        self.width = Width.ARGV if looks else Width.PROGRAM

    def judge(self, condition_state: ConditionState) -> _Judged:
        """Everything that can be answered as long as the condition state does not change."""
        judged = _Judged()
        lease, now = Lease(LEASE_S, self.width), condition_state.generation_for(self.subject.vm)
        options = []
        for policy, versioned, commands, whitelist in self.said:
            unmet = condition_state.unmet_of(policy, self.subject.vm)
            source = self.sources.get(policy.name, _NOT_STORED)
            decision: Decision
            if isinstance(versioned, Flaw):
                last = _hides(versioned, unmet)
                decision = Denied(
                    versioned.reason, policy.name, policy.persona, versioned.detail, lease, now, None, *_of(source)
                )
            elif unmet is None:
                last = True
                decision = Granted(versioned.ref, policy.name, lease, now, *_of(source))
            else:
                last = False
                ref = versioned.ref
                decision = Denied(
                    unmet.reason, policy.name, ref.name, unmet.detail, lease, now, ref.version, *_of(source)
                )
            options.append((_relevant(commands), None if whitelist is None else _relevant(whitelist), decision, last))
        judged.condition_state = condition_state
        judged.options = tuple(options)
        judged.refused = self._refused(condition_state, lease)
        judged.too_long = judged.refused
        if judged.refused.reason is Reason.NO_MATCHING_POLICY and options:
            nearest = judged.refused
            detail = "its arguments are too many to check"
            judged.too_long = replace(nearest, reason=Reason.ARGV_TOO_LONG, help=detail)
        judged.whole = judged.decide((), True) if self.width is Width.PROGRAM else None
        self.judged = judged
        return judged

    def _refused(self, condition_state: ConditionState, lease: Lease) -> Denied:
        now = condition_state.generation_for(self.subject.vm)
        if not self.policies:
            detail = f"no policy names {self.subject.user} on {self.subject.vm}"
            return Denied(Reason.NO_MATCHING_POLICY, None, None, detail, lease, now)
        vm = self.subject.vm
        holding = (
            (policy, versioned)
            for policy, versioned, flaw in self.policies
            if flaw is None and not condition_state.unmet_of(policy, vm)
        )
        nearest, versioned = next(holding, self.policies[0][:2])
        version, source = versioned.version if versioned else None, self.sources.get(nearest.name, _NOT_STORED)
        denied = Denied(Reason.NO_MATCHING_POLICY, nearest.name, nearest.persona, "", lease, now, version, *_of(source))
        arguments = "with these arguments " if self.said and self.width is Width.ARGV else ""
        detail = f"not {arguments}in its whitelist; 'persona list' shows what is"
        if self.home and not self.said:
            detail = "it is the user's own file, which no whitelist vouches for; no home_programs of theirs names it"
            return replace(denied, reason=Reason.PROGRAM_NOT_TRUSTED, help=detail)
        if self.loader and not self.said:
            detail = "it is a loader, which runs any program: a whitelist allows it only by its own name"
        if not self.spoken_for:
            detail = f"no policy that names {self.subject.user} on {vm} has it among its commands"
        return replace(denied, help=detail)


_SubjectKey = tuple[str, tuple[str, ...], str]
_RowKey = tuple[str, tuple[str, ...], str, str, tuple[str, ...], tuple[str, ...], bool, str]


class Snapshot:
    """All documents of one generation.  Immutable but for its caches, which are bounded.

    ``policies`` has, at its place, what is known of each policy that cannot be read and is ``unreadable``;
    ``sources`` are by a policy's name.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        personas: Mapping[str, Versioned],
        unreadable: Sequence[Unreadable] = (),
        sources: Mapping[str, Source] = MappingProxyType({}),
    ) -> None:
        self.sources = sources
        self.policies = tuple(policies)
        self.personas = dict(personas)
        self.unreadable = tuple(unreadable)
        self._no_policy = {item.name: item for item in unreadable if item.kind == "Policy"}
        self._no_persona = {item.name: item for item in unreadable if item.kind == "Persona"}
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
        self._by_wire: dict[int, Snapshot] = {}
        # plain tuples as keys: a dataclass would be hashed and compared by interpreted code, a request at a time
        self._groups_in_use: dict[str, GroupsInUse] = {}
        self._views: dict[_SubjectKey, _View] = {}
        self._rows: dict[_RowKey, _Row] = {}
        self._views_size = self._rows_size = 0

    def for_wire(self, version: int) -> "Snapshot":
        """As an agent of this version of the protocol can keep it: personas that it cannot are unreadable in it."""
        found = self._by_wire.get(version)
        if found is None:
            found = self._by_wire[version] = self._suited(version)
        return found

    def _suited(self, version: int) -> "Snapshot":
        unsuited = []
        for name, versioned in self.personas.items() if version < wire.CURRENT else ():
            told = wire.persona_for(to_mapping(versioned.persona), version)
            if isinstance(told, wire.Unsuited):
                unsuited.append(Unreadable("Persona", name, versioned.version, told.problem))
        if not unsuited:
            return self
        names = {item.name for item in unsuited}
        personas = {name: versioned for name, versioned in self.personas.items() if name not in names}
        return Snapshot(self.policies, personas, (*self.unreadable, *unsuited), self.sources)

    def groups_in_use(self, vm: str) -> GroupsInUse:
        """The groups that policies for this VM name: no others can make a difference to a decision there."""
        found = self._groups_in_use.get(vm)
        if found is None:
            here = (policy for policy in self.policies if any(matches(vm, glob) for glob in policy.vms))
            names = frozenset(group for policy in here for group in policy.groups) - {"*"}
            digest = hashlib.sha256("\0".join(sorted(names)).encode()).hexdigest()
            if len(self._groups_in_use) >= _VMS_MAX:
                self._groups_in_use.clear()
            found = self._groups_in_use[vm] = GroupsInUse(digest[:32], names)
        return found

    def decide(self, request: Request, condition_state: ConditionState) -> Decision:
        """The decision on one program start.  Pure; raises nothing."""
        who, what = request.subject, request.program
        key = (who.user, who.groups, who.vm, what.path, what.names, what.paths, what.loader, what.home)
        row = self._rows.get(key) or self._row(key, who, what)
        judged = row.judged
        if judged.condition_state is not condition_state:
            judged = row.judge(condition_state)
        return judged.whole or judged.decide(request.argv, request.argv_complete)

    def admit(self, subject: Subject, condition_state: ConditionState) -> Admission:
        """Whether any policy names the user on this VM, holding or not, and which holds first."""
        entries = self.entries(subject, condition_state)
        first = next((entry for entry in entries if entry.holds or entry.hides), None)
        return Admission(bool(entries), first if first is not None and first.holds else None)

    def entries(self, subject: Subject, condition_state: ConditionState) -> list[Entry]:
        """Every policy that names the subject, in order."""
        return [
            Entry(policy, versioned, condition_state.unmet_of(policy, subject.vm), flaw)
            for policy, versioned, flaw in self._view(subject)
        ]

    def _flaw(self, policy: Policy) -> Flaw | None:
        broken = self._no_policy.get(policy.name)
        if broken is not None:
            detail = f"policy {policy.name} cannot be read: {broken.problem}"
            return Flaw(Reason.INVALID_POLICY, detail, broken.conditions_unknown)
        persona = self._no_persona.get(policy.persona)
        if persona is not None:
            detail = f"persona {policy.persona} of policy {policy.name} cannot be read: {persona.problem}"
            return Flaw(Reason.INVALID_PERSONA, detail, conditions_unknown=False)
        if policy.persona not in self.personas:
            detail = f"policy {policy.name} names persona {policy.persona}, which does not exist"
            return Flaw(Reason.INVALID_PERSONA, detail, conditions_unknown=False)
        return None

    def _view(self, subject: Subject) -> _View:
        key = (subject.user, subject.groups, subject.vm)
        view = self._views.get(key)
        if view is None:
            indexes: set[int] = {*self._by_user.get(subject.user, ()), *self._by_user.get("*", ())}
            for group in (*subject.groups, "*"):
                indexes.update(self._by_group.get(group, ()))
            policies = (self.policies[index] for index in sorted(indexes))
            here = (p for p in policies if any(matches(subject.vm, glob) for glob in p.vms))
            view = tuple(self._with_persona(policy) for policy in here)
            size = _size_of(subject)
            if len(self._views) >= _VIEWS_MAX or self._views_size + size > _KEYS_MAX:
                self._views.clear()
                self._views_size = 0
            self._views_size += size
            self._views[key] = view
        return view

    def _with_persona(self, policy: Policy) -> tuple[Policy, Versioned | None, Flaw | None]:
        flaw = self._flaw(policy)
        return policy, self.personas[policy.persona] if flaw is None else None, flaw

    def _row(self, key: _RowKey, subject: Subject, program: Program) -> _Row:
        row = _Row(subject, self._view(subject), program, self.sources)
        size = _size_of(subject, program)
        if len(self._rows) >= _ROWS_MAX or self._rows_size + size > _KEYS_MAX:
            self._rows.clear()
            self._rows_size = 0
        self._rows_size += size
        self._rows[key] = row
        return row


def _size_of(subject: Subject, program: Program | None = None) -> int:
    """How many bytes the texts of a subject, and of a program, take, about."""
    texts = [subject.user, subject.vm, *subject.groups]
    if program is not None:
        texts += [program.path, program.home, *program.names, *program.paths]
    return sum(map(len, texts)) + _TEXT * len(texts)
