"""How one program start is decided where no lease holds: the broker is asked, then its answer is made good here.

A grant counts once the persona's document is here (its limits and network come from it) and what the persona depends
on is there, which may take an installation.
"""

from collections.abc import Callable
from functools import partial

from persona.decisions import Decision, Request
from persona_guest.broker.client import BrokerClient
from persona_guest.broker.documents import Personas
from persona_guest.core import tasks
from persona_guest.core.tasks import FromCallback
from persona_guest.dependencies.resolve import Dependencies, Installed
from persona_guest.settings import Gate


class Decider:
    """Everything in the loop's thread; each ``done`` is called once."""

    def __init__(self, broker: BrokerClient, documents: Personas, dependencies: Dependencies, gate: Gate) -> None:
        self._broker = broker
        self._documents = documents
        self._dependencies = dependencies
        self._gate = gate

    def decide(self, request: Request, done: Callable[[Decision], None]) -> None:
        """The decision on a program start that waits."""
        tasks.run(self._decide(request), done)

    def explain(self, request: Request, done: Callable[[Decision], None]) -> None:
        """What the decision would be; nothing is installed, and the broker is told that nothing will be run."""
        tasks.run(self._explain(request), done)

    async def _decide(self, request: Request) -> Decision:
        decision = await self._ask(request)
        # a plumbing program (gate.plumbing) starts before there is a terminal: nobody could be told what it waits for
        if not self._gate.is_plumbing(request.program.path):
            found = await FromCallback[Decision | Installed](partial(self._dependencies.installed, decision, request))
            if not isinstance(found, Installed):
                return found
            decision = await self._ask(request)
        return await FromCallback[Decision](partial(self._dependencies.backed, decision))

    async def _explain(self, request: Request) -> Decision:
        decision = await self._ask(request, explain=True)
        return await FromCallback[Decision](
            lambda done: self._dependencies.backed(decision, done, "would first have installed:")
        )

    async def _ask(self, request: Request, *, explain: bool = False) -> Decision:
        """The broker's decision, a grant with its persona's document here."""
        decision = await FromCallback[Decision](partial(self._broker.decide, request, explain=explain))
        return await FromCallback[Decision](partial(self._documents.backed, decision))
