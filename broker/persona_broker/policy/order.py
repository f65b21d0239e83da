"""The order in which policies are asked: a property of the documents, and of the database where they say nothing.

A policy with an ``order`` has its place by that number, the same number by name.  Those without one stay
together, in the places that the database has for them, after each ``order`` below ``WITHOUT`` and before
the rest.
"""

from collections.abc import Sequence
from typing import TypeVar

from persona.documents import Document, Policy
from persona_broker.policy.unreadable import Unreadable

Item = TypeVar("Item", bound=Document | Unreadable)
WITHOUT = 5000  # where the policies without an ``order`` are


def arrange(documents: Sequence[Item]) -> list[Item]:
    """The documents with the policies last, in the order in which they are asked.

    A stored policy whose ``order`` cannot be read stays behind the policy before it: it may have been
    there to narrow what later ones grant.
    """
    others: list[Item] = []
    policies: list[tuple[tuple[int, int, str], Item]] = []
    for document in documents:
        if isinstance(document, Policy):
            policies.append((_place(document.name, document.order), document))
        elif isinstance(document, Unreadable) and document.kind == "Policy":
            before = policies[-1][0] if policies else (-1, 0, "")
            place = _place(document.name, document.order) if document.order_known else before
            policies.append((place, document))
        else:
            others.append(document)
    return others + [document for _, document in sorted(policies, key=lambda item: item[0])]


def _place(name: str, order: int | None) -> tuple[int, int, str]:
    return (WITHOUT, 0, "") if order is None else (order, 1, name)
