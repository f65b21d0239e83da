"""The agent's own state: whether the event stream is up, which layers are active, the greeting."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from persona_guest.audit.spool import Status as SpoolStatus
from persona_guest.broker.client import BrokerClient
from persona_guest.broker.events import Changed, Connected, Event, Lost
from persona_guest.core.denials import Book
from persona_guest.core.leases import LeaseBook
from persona_guest.gate.supervisor import Supervisor
from persona_guest.ipc.standby import Keeping
from persona_guest.lsm.landlock_fallback import Fallback
from persona_guest.lsm.layer import KernelLayer
from persona_guest.session.model import Session
from persona_guest.session.registry import Registry
from persona_guest.settings import Mode, Settings

log = logging.getLogger("persona.agent")

_LATELY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Binds:
    """What personas bind on this machine: their limits, their network."""

    limits: bool
    network: bool


class Agent:
    """The parts that ``persona status`` is about."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        supervisor: Supervisor,
        denials: Book,
        kernel_layer: KernelLayer,
        fallback: Fallback,
        leases: LeaseBook,
        broker_client: BrokerClient,
        keeping: Keeping,
        binds: Binds,
        records: Callable[[], SpoolStatus],
    ) -> None:
        self.settings = settings
        self.supervisor = supervisor
        self.registry = registry
        self.denials = denials
        self.binds = binds
        self.kernel_layer = kernel_layer
        self._fallback = fallback
        self.leases = leases
        self.broker_client = broker_client
        self.keeping = keeping
        self.records = records
        self.connection = "connecting"

    def event(self, event: Event) -> None:
        """The event stream came, went or said something."""
        if isinstance(event, Connected):
            self.broker_client.streaming = True
            self.connection = "connected"
            log.info("the broker's event stream is up")
        elif isinstance(event, Lost):
            if self.broker_client.streaming:
                log.warning("the broker's event stream is lost: %s; leases run out", event.detail)
            self.broker_client.streaming = False
            self.connection = "unreachable"
        elif isinstance(event, Changed):
            self.leases.advance(event.generation)

    def layers(self) -> dict[str, bool]:
        """The parts of the gate by name, and whether each is active.  Safe to call from any thread."""
        active = self.kernel_layer.layer.active
        found = {"seccomp": True, "bpf": active, "verify": not active}
        found |= {"limits": self.binds.limits, "network": self.binds.network}
        return found | self._fallback.layers()

    def greeting(self, session: Session, reader: int) -> str | None:
        """One line for an interactive login; ``None`` where the operator switched it off.

        What was denied is told to the session's own user only: ``reader`` is the uid of who reads it.
        """
        if not self.settings.gate.greeting:
            return None
        login = self.registry.get(session.id)
        persona = login.persona if login is not None else None
        now = f"{persona.name} v{persona.version}" if persona else "none right now"
        mode = "" if self.settings.mode is Mode.ENFORCE else " (complain mode: nothing is stopped)"
        denied = self.denials.since(reader, time.time() - _LATELY_S) if reader == session.uid else 0
        lately = f" ({denied} in the last day)" if denied else ""
        return (
            f"persona: {now} on {self.settings.vm.name}{mode}; 'persona list' shows what you may run, "
            f"'persona denials' what was refused{lately}"
        )
