"""What ``persona status`` shows of the agent and of one session, without asking the broker."""

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from persona.decisions import PersonaRef
from persona_guest.agent.agent import Agent
from persona_guest.session.model import Login


def status(agent: Agent, login: Login | None, user: str, *, everything: bool = False) -> dict[str, Any]:
    """As docs/protocol.md has it; ``login`` is the session that ``user`` asks from, if it is one.

    ``everything``: also how the records of all users fare, which is root's to know.
    """
    session = login.session if login else None
    persona, policy = _current(agent, login)
    layer, leases = agent.kernel_layer.layer, agent.leases
    return {
        "ok": True,
        "gated": login is not None,
        "mode": str(agent.settings.mode),
        "session": session.id if session else None,
        "user": session.subject.user if session else user,
        "vm": agent.settings.vm.name,
        "persona": {"name": persona.name, "version": persona.version} if persona else None,
        "policy": policy,
        "limits": {},
        "network": [],
        "places": [],
        "lease_s": leases.remaining(login.holder, time.monotonic()) if login else None,
        "layers": agent.layers(),
        "kernel": {"why_not": layer.why, **layer.counts()},
        "broker": agent.connection,
        "standby": agent.keeping.connected,
        "generation": leases.generation,
        "sessions": len(agent.registry.gated()),
        "notify_us": _percentiles(agent.supervisor.times),
        "verified": asdict(agent.supervisor.verifier.counts),
        "records": asdict(agent.records()) if everything else None,
    }


def _current(agent: Agent, login: Login | None) -> tuple[PersonaRef | None, str | None]:
    """The persona and policy of the last start, while that still holds; else those of the login."""
    if login is None:
        return None, None
    last = login.last
    if last is not None and last.generation == agent.leases.generation:
        return last.persona, last.policy
    admitted = login.admitted
    return (admitted.persona, admitted.policy) if admitted is not None and admitted.persona else (None, None)


def _percentiles(seconds: Iterable[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {f"p{p}": round(ordered[(len(ordered) - 1) * p // 100] * 1e6, 1) for p in (50, 99)}
