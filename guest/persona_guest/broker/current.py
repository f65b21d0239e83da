"""What the broker says of running sessions: which personas are for each now, and what an operator said of it."""

import logging
from dataclasses import dataclass
from typing import Any

from persona.decisions import PersonaRef
from persona.parsing import Bad
from persona.patterns import Whitelist, parse_pattern
from persona_guest.core.reassignment import Applicable, Revocation

log = logging.getLogger("persona.enforce")

_UNREADABLE = (TypeError, KeyError, ValueError, AttributeError, OverflowError)  # int() of a JSON 1e999


@dataclass(frozen=True, slots=True)
class Current:
    """What applies to one session.

    ``holding`` are the policies that hold, in order; ``others`` personas that may be for the session later.
    """

    session_id: str
    holding: tuple[Applicable, ...]
    others: tuple[PersonaRef, ...]
    revocation: Revocation


def read(answer: Any) -> tuple[Current, ...]:
    """Reads the broker's answer.  What cannot be read of it is left out and logged.  Raises nothing.

    So what is said of one session and cannot be read does not keep the others from being followed.
    """
    try:
        sessions = dict(answer["sessions"])
    except _UNREADABLE as error:
        log.error("what the broker says of running sessions cannot be read: %r", error)
        return ()
    found = []
    for session_id, value in sessions.items():
        try:
            holding, others = _holding(session_id, value["personas"]), tuple(map(_ref, value["others"]))
            found.append(Current(session_id, holding, others, _revocation(value)))
        except _UNREADABLE as error:
            log.error("what the broker says of session %s cannot be read: %r", session_id, error)
    return tuple(found)


def _revocation(value: Any) -> Revocation:
    if value["revoked"] is not True:
        return Revocation.NONE
    return Revocation.END if value.get("end") is True else Revocation.REVOKED


def _holding(session_id: str, items: Any) -> tuple[Applicable, ...]:
    """The policies that hold, in order, up to the first whose commands this agent cannot read.

    Those after it may be meant for what it does not speak for, and which that is, is not known.
    """
    found: list[Applicable] = []
    for item in items:
        try:
            commands = Whitelist(tuple(map(parse_pattern, item["commands"])))
        except Bad as error:
            log.error("session %s: policy %s and those after it do not hold: %s", session_id, item["policy"], error)
            break
        found.append(Applicable(_ref(item), str(item["policy"]), commands))
    return tuple(found)


def _ref(item: Any) -> PersonaRef:
    return PersonaRef(str(item["name"]), int(item["version"]))
