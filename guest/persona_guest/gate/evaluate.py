"""The gate's walk over the stages of an exec request: what runs, what is refused, and when the broker is asked first.

The gate and ``persona explain`` both use it, so that what is explained is what happens.  It reads nothing of the
machine: the caller passes what is known, and which programs a session starts by itself.
"""

from collections.abc import Callable
from typing import NamedTuple

from persona.decisions import Decision, Denied, Granted
from persona_guest.gate.implicit_allow import Own
from persona_guest.program.exec_request import ExecRequest


class Ask(NamedTuple):
    """The broker must say something about this stage; ``denials`` are those of the stages before it."""

    stage: int
    denials: tuple[Denied, ...]


class Runs(NamedTuple):
    """The program may start: because this stage is granted, or because the session starts it by itself (``own``)."""

    stage: int
    granted: Granted | None
    own: Own | None
    denials: tuple[Denied, ...]


class Refused(NamedTuple):
    """No stage is granted; ``denied`` is what the user is told, ``stage`` the one that it is about."""

    stage: int
    denied: Denied
    denials: tuple[Denied, ...]


Judgement = Ask | Runs | Refused


def judge(
    exec_request: ExecRequest,
    stage: int,
    denials: tuple[Denied, ...],
    known: Callable[[int], Decision | None],
    own: Callable[[tuple[Denied, ...]], Own | None],
) -> Judgement:
    """Goes on from ``stage``, the stages before it having been denied.

    The first stage that is granted wins.  ``known`` returns the decision on a stage, or ``None`` where the broker has
    to be asked.  ``own`` is asked once all are denied: which rule lets the session start this by itself, if any.
    """
    while stage < len(exec_request.stages):
        decision = exec_request.obstacles[stage] or known(stage)
        if decision is None:
            return Ask(stage, denials)
        if isinstance(decision, Granted):
            return Runs(stage, decision, None, denials)
        denials += (decision,)
        stage += 1
    rule = own(denials)
    if rule is not None:
        return Runs(0, None, rule, denials)
    told = exec_request.told_stage
    return Refused(told, denials[told], denials)
