"""Plans: tuples of small frozen operations, logged (as data, for debugging) before they are applied, undone in reverse.

An operation touches one thing of one facility.  Nothing here knows which.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Protocol

from persona.problems import PersonaError, Reason

log = logging.getLogger("persona.enforce")


class Operation(Protocol):
    """One change, as a frozen value.  It may hold what was there before, so that it can be put back."""

    def describe(self) -> Mapping[str, object]:
        """What it will do, as a mapping that JSON can hold; ``op`` names the kind of change."""

    def apply(self) -> None:
        """Makes the change, whole or not at all.  Raises ``OSError`` or ``PersonaError``."""

    def undo(self) -> None:
        """Puts back what was before; of what is gone by itself, nothing.  Raises as ``apply`` does."""


Plan = tuple[Operation, ...]


class PlanError(PersonaError):
    """A plan that could not be carried out; the message names the operation and every failure."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.ENFORCEMENT_FAILED, message)


def describe(plan: Plan) -> list[dict[str, object]]:
    """The plan as JSON values, in order."""
    return [dict(operation.describe()) for operation in plan]


def apply(plan: Plan) -> None:
    """Applies a plan in order, whole or not at all: after a failure what was applied is undone.

    Raises ``PlanError``.
    """
    if not plan:
        return
    if log.isEnabledFor(logging.DEBUG):
        log.debug("plan: %s", json.dumps([_brief(operation) for operation in plan]))
    for index, operation in enumerate(plan):
        try:
            operation.apply()
        except Exception as error:  # a library's own errors too: what was applied must not stay half done
            failures = [_failure(operation, error), *_undo(reversed(plan[:index]))]
            raise PlanError("; undoing it: ".join(failures)) from error


def apply_each(plan: Plan) -> list[str]:
    """Applies every operation that can be, in order; returns what failed."""
    failures = []
    for operation in plan:
        try:
            apply((operation,))
        except PlanError as error:
            failures.append(error.message)
    return failures


def _brief(operation: Operation) -> dict[str, object]:
    """For one line of a log: what is within goes by its name; ``persona-agent plan`` shows all."""
    return {key: value for key, value in operation.describe().items() if not isinstance(value, dict)}


def undo(plan: Plan) -> None:
    """Takes back a plan that was applied: all operations in reverse, whatever fails.  Raises ``PlanError``."""
    failures = _undo(reversed(plan))
    if failures:
        raise PlanError("; ".join(failures))


def _undo(operations: Iterable[Operation]) -> list[str]:
    failures = []
    for operation in operations:
        try:
            operation.undo()
        except Exception as error:  # the next one is undone all the same
            failures.append(_failure(operation, error))
    return failures


def _failure(operation: Operation, error: Exception) -> str:
    """For a user's line too: what and where, without what is within."""
    return f"{' '.join(map(str, _brief(operation).values()))}: {error or type(error).__name__}"
