"""``persona-agent release``: every gated session goes on ungated and unbound, and the agent ends with the last."""

import logging
import threading

from persona_guest.agent import state_file
from persona_guest.broker.client import BrokerClient
from persona_guest.enforce.enforcer import Enforcer
from persona_guest.enforce.network.build import Net
from persona_guest.gate.supervisor import Supervisor
from persona_guest.loop import Loop
from persona_guest.reassign.reevaluate import Reevaluator
from persona_guest.session.registry import Registry
from persona_guest.settings import Settings

log = logging.getLogger("persona.agent")


class Release:
    """Called once, when root runs ``persona-agent release`` or the package is removed."""

    def __init__(
        self,
        settings: Settings,
        loop: Loop,
        registry: Registry,
        supervisor: Supervisor,
        reevaluator: Reevaluator,
        enforcer: Enforcer,
        net: Net | None,
        broker_client: BrokerClient,
        released: threading.Event,
    ) -> None:
        self._settings = settings
        self._loop = loop
        self._registry = registry
        self._supervisor = supervisor
        self._reevaluator = reevaluator
        self._enforcer = enforcer
        self._net = net
        self._broker_client = broker_client
        self._released = released

    def __call__(self) -> None:
        """Releases, once and for all."""
        sessions = self._registry.gated()
        log.warning("released: %d sessions go on ungated", len(sessions))
        self._supervisor.released = True
        self._reevaluator.release()
        self._released.set()
        self.unbind()
        # nothing is decided for them any more, and by the end of the last of them nobody may be left to say so
        for login in sessions:
            self._broker_client.closed(login.session)
        state_file.remove(self._settings)
        self._loop.call_every(1.0, lambda: None if self._registry.gated() else self._loop.stop())

    def unbind(self) -> None:
        """Removes all network rules and limits that personas bound."""
        if self._net is not None:
            self._net.user_rules.release()
        self._enforcer.release()
