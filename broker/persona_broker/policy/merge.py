"""The applied set as it is after an ``apply``: what the files say, and what becomes of what they do not name."""

from collections.abc import Sequence
from dataclasses import dataclass

from persona.documents import CommandSet, Document, Persona, Policy
from persona.parsing import DocumentError
from persona.problems import Fault, PersonaError
from persona.sets import expand, used
from persona_broker.policy.order import arrange
from persona_broker.policy.unreadable import Unreadable

Stored = Document | Unreadable


@dataclass(frozen=True, slots=True)
class How:
    """By itself: documents are added and changed, and none is removed.

    ``prune``: what the files do not name is removed.  ``whole``: that too, and the files say the places
    of all policies without an ``order``.  ``before``, ``after``: the applied policy next to which new ones
    without an ``order`` go; at most one of the two.
    """

    prune: bool = False
    whole: bool = False
    before: str | None = None
    after: str | None = None


ADD = How()
WHOLE = How(whole=True)


def key_of(document: Stored) -> tuple[str, str]:
    """Kind and name."""
    kind = document.kind if isinstance(document, Unreadable) else type(document).__name__
    return kind, document.name


def merge(stored: Sequence[Stored], given: Sequence[Stored], how: How) -> list[Stored]:
    """All documents after it, policies last and in order, personas with the commands of their sets.

    What stays as it was is the same object.  Raises ``PersonaError`` where a new policy has no place, a policy
    would be left without its persona, or a persona without a command set.
    """
    if how.whole:
        merged = arrange(list[Stored](given))
    else:
        changed = {key_of(document): document for document in given}
        kept = [changed.get(key_of(item), item) for item in stored if not how.prune or key_of(item) in changed]
        merged = _with_new(kept, _new(kept, given), how)
    _refuse_without_persona(stored, given, merged)
    before = _sets(stored)
    after = _sets(merged)
    asked = set(map(key_of, given))
    return [_expanded(item, after, must=key_of(item) in asked, before=before) for item in merged]


def _sets(documents: Sequence[Stored]) -> dict[str, CommandSet]:
    return {document.name: document for document in documents if isinstance(document, CommandSet)}


def _expanded(item: Stored, sets: dict[str, CommandSet], *, must: bool, before: dict[str, CommandSet]) -> Stored:
    """A stored persona whose set cannot be read stays as it is, until it is applied itself."""
    if not isinstance(item, Persona):
        return item
    try:
        return expand(item, sets)
    except DocumentError as error:
        if must or before.keys() >= set(used(item)):
            raise _refused(f"persona {item.name}: {error.message}") from None
        return item


def unplaced(stored: Sequence[Stored], given: Sequence[Stored]) -> list[str]:
    """The policies that are new, have no ``order``, and come to others: ``before`` or ``after`` must say where."""
    if not any(key_of(item)[0] == "Policy" for item in stored):
        return []
    return [
        document.name for document in _new(stored, given) if isinstance(document, Policy) and document.order is None
    ]


def wrong_together(stored: Sequence[Stored], given: Sequence[Document]) -> str:
    """Why adding and changing these would be refused, whatever places new policies get; else an empty string."""
    waiting = set(unplaced(stored, given))
    placed = [document for document in given if not isinstance(document, Policy) or document.name not in waiting]
    try:
        merge(stored, placed, ADD)
    except PersonaError as error:
        return error.message.removeprefix("refused: ")
    return ""


def _new(stored: Sequence[Stored], given: Sequence[Stored]) -> list[Stored]:
    there = {key_of(item) for item in stored}
    return [document for document in given if key_of(document) not in there]


def _with_new(kept: list[Stored], new: list[Stored], how: How) -> list[Stored]:
    waiting = unplaced(kept, new)
    anchor = how.before or how.after
    if waiting and anchor is None:
        names = ", ".join(waiting)
        fix = "say --before NAME or --after NAME of an applied policy ('policies list' shows them), or give it an order"
        raise _refused(f"policy {names}: new and without an order, so its place among the others is not known; {fix}")
    if not waiting or anchor is None:
        return arrange([*kept, *new])
    at = next((index for index, item in enumerate(kept) if key_of(item) == ("Policy", anchor)), None)
    if at is None:
        known = ", ".join(item.name for item in kept if key_of(item)[0] == "Policy")
        raise _refused(
            f"{anchor!r} is not a policy that stays applied, so no other can be placed beside it; name one of: {known}"
        )
    names_waiting = {("Policy", name) for name in waiting}
    placed = [document for document in new if key_of(document) in names_waiting]
    rest = [document for document in new if key_of(document) not in names_waiting]
    at += how.after is not None
    merged = arrange([*kept[:at], *placed, *kept[at:], *rest])
    places = {key_of(item): index for index, item in enumerate(merged)}
    for document in placed:
        comes_after = places[key_of(document)] > places["Policy", anchor]
        if comes_after is not (how.after is not None):
            fix = f"give {document.name} an order instead"
            raise _refused(f"policy {anchor} has an order, and policies without one cannot go there; {fix}")
    return merged


def _refuse_without_persona(stored: Sequence[Stored], given: Sequence[Stored], merged: Sequence[Stored]) -> None:
    """Raises ``PersonaError`` where the change leaves a policy without its persona.

    A policy that lacked it before does not count: this change did not cause that.
    """
    before, after = ({name for kind, name in map(key_of, items) if kind == "Persona"} for items in (stored, merged))
    asked = set(map(key_of, given))
    for item in merged:
        policy = item.policy if isinstance(item, Unreadable) else item
        if not isinstance(policy, Policy) or policy.persona in after:
            continue
        if policy.persona in before or key_of(item) in asked:
            fix = "apply that persona too, or remove the policy with it"
            raise _refused(f"policy {policy.name} would be left without its persona {policy.persona!r}; {fix}")


def _refused(message: str) -> PersonaError:
    return PersonaError(Fault.BAD_DOCUMENT, f"refused: {message}")
