"""The network of personas, put together: the table, the ways (routes that rules name), and the rules of users."""

import logging
from collections.abc import Callable
from pathlib import Path

from persona.decisions import PersonaRef
from persona.documents import Persona
from persona.network import parse_rule, parse_via
from persona.patterns import Whitelist
from persona.problems import PersonaError
from persona_guest.core.reassignment import NO_PERSONA_DOCUMENT
from persona_guest.core.ruleset import access
from persona_guest.enforce import plan as plans
from persona_guest.enforce.facility import Facility
from persona_guest.enforce.network.egress_routes import EgressRoutes, Routes, Routing
from persona_guest.enforce.network.facility import Network
from persona_guest.enforce.network.orphan_sockets import SocketOwners
from persona_guest.enforce.network.rejects import Refusals, Tell
from persona_guest.enforce.network.resolvers import Resolvers
from persona_guest.enforce.network.table import Table
from persona_guest.enforce.network.tamper import Meddling
from persona_guest.enforce.network.user_rules import UserRules
from persona_guest.enforce.plan import Plan
from persona_guest.loop import Loop

log = logging.getLogger("persona.enforce")

# What needs a module of its own: connection tracking, and the translation of addresses of what goes a way.
WAY = parse_via("table 1")
KINDS = Persona("warm", Whitelist(()), network_access=(parse_rule("in:any:udp/1"), parse_rule(f"any via {WAY}")))
_RESOLVERS_S = 2.0  # after a change of resolv.conf; at none it costs two calls of stat(2)


class Net:
    """Makes the parts and holds them.

    ``document`` has the personas' documents, ``is_open`` knows which sessions have not ended.  Raises ``OSError`` where
    there is no nftables to speak to.
    """

    def __init__(
        self,
        runtime: Path,
        cgroups: str,
        document: Callable[[PersonaRef], Persona],
        is_open: Callable[[str], bool],
    ) -> None:
        egress_routes = EgressRoutes(runtime / "ways.json")
        self.table = Table(egress_routes.number)
        self.user_rules = UserRules(document, self._bind, lambda uid: self._network.exempt(uid))
        self._routes = Routes(egress_routes, Routing(), self.table, self.user_rules.current)
        owners = SocketOwners(runtime / "outside.json", is_open)
        self._network = Network(self.table, egress_routes.number, cgroups, self.user_rules.current, owners)
        self.facilities: tuple[Facility, ...] = (self._routes, self._network)
        self.resolvers = Resolvers(self.table)

    def _bind(self, uid: int) -> Plan:
        persona = self.user_rules.current.get(uid)
        if persona is not None:
            return (*self._routes.need(persona), *self._network.bind_user(uid))
        return self._network.bind_user(uid)

    def warm(self) -> None:
        """Has the kernel load what nftables needs, before the first login, which would wait for it."""
        for persona, who in ((NO_PERSONA_DOCUMENT, "every login"), (KINDS, "some kind of rule")):
            try:
                self.table.warm(access(persona, {WAY: 1}))
            except OSError as error:
                log.error("nftables lacks something that %s would need: %s", who, error)

    def watch(self, loop: Loop, repair: Callable[[], None], tell: Tell) -> None:
        """Hears from now on of connections that are refused, and of others who change the table."""

        def meddled() -> None:
            log.warning("somebody else changed the table inet persona; it is made anew")
            self.table.disturbed = True
            repair()

        Refusals(loop, tell)
        Meddling(loop, self.table.port, meddled)
        loop.call_every(_RESOLVERS_S, self.resolvers.refresh)

    def clear(self) -> None:
        """Removes everything of ours, whichever agent made it; what fails is in the journal."""
        self.user_rules.release()
        for facility in reversed(self.facilities):
            try:
                for failure in plans.apply_each(facility.release()):
                    log.error("%s: something stays: %s", facility.name, failure)
            except (PersonaError, OSError) as error:
                log.error("%s: something stays: %s", facility.name, error)
