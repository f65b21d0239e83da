"""The parts that the gate works with, by subject: what it decides with, who waits, what is done to what may start."""

from collections.abc import Callable
from dataclasses import dataclass

from persona.decisions import Decision, Denied, Request
from persona_guest.core.leases import LeaseBook
from persona_guest.gate.hang_watchdog import HangWatchdog
from persona_guest.gate.inflight import InFlight
from persona_guest.gate.notes import Notes
from persona_guest.gate.placing import Placing
from persona_guest.gate.waiting import Waiting
from persona_guest.lsm.layer import KernelLayer
from persona_guest.program.identity import Identifier

AskBroker = Callable[[Request, Callable[[Decision], None]], None]


@dataclass(frozen=True, slots=True)
class DecisionParts:
    """What a program start is decided with.

    ``ask`` puts a question to the broker and calls back in the loop's thread; ``home_of`` says where a uid has its
    home (empty = not known).
    """

    identifier: Identifier
    leases: LeaseBook
    ask: AskBroker
    home_of: Callable[[int], str] = lambda _uid: ""


@dataclass(frozen=True, slots=True)
class WaitingParts:
    """What holds the program starts that have no answer yet, and what notices that one of them makes the agent wait."""

    inflight: InFlight
    waiting: Waiting
    hang_watchdog: HangWatchdog


@dataclass(frozen=True, slots=True)
class StartParts:
    """What is done to a task before it may go on: it is moved to its place, and approved for the kernel layer."""

    placing: Placing
    kernel_layer: KernelLayer


@dataclass(frozen=True, slots=True)
class RecordParts:
    """Where a decision is noted; ``refusal`` says why a user's start must not be, for there is no room to record it."""

    notes: Notes
    refusal: Callable[[str], Denied | None] = lambda _user: None
