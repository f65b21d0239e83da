"""What ``persona status`` shows of the agent and of one session, without asking the broker."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from persona.decisions import PersonaRef
from persona_guest.agent.event_stream import EventStreamState
from persona_guest.agent.layers import Layers
from persona_guest.audit.spool import Status as SpoolStatus
from persona_guest.core.leases import LeaseBook
from persona_guest.gate.supervisor import Supervisor
from persona_guest.ipc.standby import Keeping
from persona_guest.lsm.layer import KernelLayer
from persona_guest.session.model import Login
from persona_guest.session.registry import Registry
from persona_guest.settings import Settings


class Status:
    """Reads the parts that ``persona status`` is about; ``records`` tells how the spool fares."""

    def __init__(
        self,
        *,
        settings: Settings,
        registry: Registry,
        supervisor: Supervisor,
        leases: LeaseBook,
        event_stream: EventStreamState,
        keeping: Keeping,
        kernel_layer: KernelLayer,
        layers: Layers,
        records: Callable[[], SpoolStatus],
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._supervisor = supervisor
        self._leases = leases
        self._event_stream = event_stream
        self._keeping = keeping
        self._kernel_layer = kernel_layer
        self._layers = layers
        self._records = records

    def of(self, login: Login | None, user: str, *, everything: bool = False) -> dict[str, Any]:
        """As docs/protocol.md has it; ``login`` is the session that ``user`` asks from, if it is one.

        ``everything``: also how the records of all users fare, which is root's to know.
        """
        session = login.session if login else None
        persona, policy = self._current(login)
        layer = self._kernel_layer.layer
        return {
            "ok": True,
            "gated": login is not None,
            "mode": str(self._settings.mode),
            "session": session.id if session else None,
            "user": session.subject.user if session else user,
            "vm": self._settings.vm.name,
            "persona": {"name": persona.name, "version": persona.version} if persona else None,
            "policy": policy,
            "limits": {},
            "network": [],
            "places": [],
            "lease_s": self._leases.remaining(login.holder, time.monotonic()) if login else None,
            "layers": self._layers.active(),
            "kernel": {"why_not": layer.why, **layer.counts()},
            "broker": self._event_stream.connection,
            "standby": self._keeping.connected,
            "generation": self._leases.generation,
            "sessions": len(self._registry.gated()),
            "notify_us": _percentiles(self._supervisor.times),
            "verified": asdict(self._supervisor.verifier.counts),
            "records": asdict(self._records()) if everything else None,
        }

    def _current(self, login: Login | None) -> tuple[PersonaRef | None, str | None]:
        """The persona and policy of the last start, while that still holds; else those of the login."""
        if login is None:
            return None, None
        last = login.last
        if last is not None and last.generation == self._leases.generation:
            return last.persona, last.policy
        admitted = login.admitted
        return (admitted.persona, admitted.policy) if admitted is not None and admitted.persona else (None, None)


def _percentiles(seconds: Iterable[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {f"p{p}": round(ordered[(len(ordered) - 1) * p // 100] * 1e6, 1) for p in (50, 99)}
