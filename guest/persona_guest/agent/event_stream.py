"""Whether the broker's event stream is up, and what follows from that for decisions that may be reused."""

import logging

from persona_guest.broker.client import BrokerClient
from persona_guest.broker.events import Changed, Connected, Event, Lost
from persona_guest.core.leases import LeaseBook

log = logging.getLogger("persona.agent")


class EventStreamState:
    """``connection`` is what ``persona status`` shows: ``connecting``, ``connected`` or ``unreachable``."""

    def __init__(self, leases: LeaseBook, broker_client: BrokerClient) -> None:
        self._leases = leases
        self._broker_client = broker_client
        self.connection = "connecting"

    def heard(self, event: Event) -> None:
        """The event stream came, went, or told of a new generation, which ends all leases; in the loop's thread."""
        if isinstance(event, Connected):
            self._broker_client.streaming = True
            self.connection = "connected"
            log.info("the broker's event stream is up")
        elif isinstance(event, Lost):
            if self._broker_client.streaming:
                log.warning("the broker's event stream is lost: %s; leases run out", event.detail)
            self._broker_client.streaming = False
            self.connection = "unreachable"
        elif isinstance(event, Changed):
            self._leases.advance(event.generation)
