"""Who may not log in any more, and whose open sessions are denied everything, once a set of documents is applied.

The decision engine itself is asked, with the documents before and after.  It knows the groups of users of
open sessions only, so groups are asked about as such: who is in another group too may still be admitted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from persona.decisions import Subject
from persona.documents import Policy
from persona.wildcards import matches
from persona_broker.policy.conditions import ConditionState
from persona_broker.policy.snapshot import Snapshot

_ASKED_MAX = 50_000  # some seconds
_ANYWHEN = ConditionState(0, {})  # who is admitted does not depend on what holds now
EVERYONE = "*"


@dataclass(frozen=True, slots=True)
class Losses:
    """Open sessions by id; users and groups (``*`` is everyone) with the VMs; ``complete`` = all were asked about.

    A VM is a guest that is registered, or the pattern of a policy that no guest fits.
    """

    sessions: tuple[str, ...]
    users: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, tuple[str, ...]]
    complete: bool

    def __bool__(self) -> bool:
        return bool(self.sessions or self.users or self.groups or not self.complete)


def losses(before: Snapshot, after: Snapshot, sessions: Mapping[str, Subject], guests: Iterable[str]) -> Losses:
    """What the change from one set to the other takes away."""

    def loses(subject: Subject) -> bool:
        return before.admit(subject, _ANYWHEN).admitted and not after.admit(subject, _ANYWHEN).admitted

    now = {policy.name: policy for policy in after.policies}
    touched = [policy for policy in before.policies if now.get(policy.name) != policy]
    cut = tuple(ident for ident, subject in sessions.items() if touched and loses(subject))
    users: dict[str, list[str]] = {}
    groups: dict[str, list[str]] = {}
    asked: set[Subject] = set()
    guests = sorted(guests)
    for policy in touched:  # the others name whom they named
        for vm in _vms(policy, guests):
            for subject, name, found in _named(policy, vm, users, groups):
                if subject in asked:
                    continue
                if len(asked) >= _ASKED_MAX:
                    return Losses(cut, _tuples(users), _tuples(groups), complete=False)
                asked.add(subject)
                if loses(subject):
                    found.setdefault(name, []).append(vm)
    return Losses(cut, _tuples(users), _tuples(groups), complete=True)


def _named(
    policy: Policy, vm: str, users: dict[str, list[str]], groups: dict[str, list[str]]
) -> Iterable[tuple[Subject, str, dict[str, list[str]]]]:
    """Whom a policy names: as the engine is asked, as they are called, and where a loss is noted."""
    if EVERYONE in (*policy.users, *policy.groups):
        yield Subject("", (), vm), EVERYONE, users  # nobody has that name
    for user in policy.users:
        if user != EVERYONE:
            yield Subject(user, (), vm), user, users
    for group in policy.groups:
        if group != EVERYONE:
            yield Subject("", (group,), vm), group, groups


def _vms(policy: Policy, guests: Sequence[str]) -> Iterable[str]:
    """A pattern that no guest fits stands for the guests that may come: it fits what would fit all of them."""
    for glob in policy.vms:
        here = [guest for guest in guests if matches(guest, glob)]
        yield from here or [glob]


def _tuples(found: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(vms) for name, vms in sorted(found.items())}
