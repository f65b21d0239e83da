"""What ``persona status`` shows of the agent and of one session, without asking the broker."""

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from persona.decisions import PersonaRef
from persona_guest.agent.agent import Agent
from persona_guest.gate.pending import Gated


def status(agent: Agent, gated: Gated | None, user: str) -> dict[str, Any]:
    """As docs/protocol.md has it; ``gated`` is the session that ``user`` asks from, if it is one."""
    session = gated.session if gated else None
    persona, policy = _current(agent, gated)
    layer, leases = agent.kernel_layer.layer, agent.leases
    return {
        "ok": True,
        "gated": gated is not None,
        "mode": str(agent.settings.mode),
        "session": session.id if session else None,
        "user": session.subject.user if session else user,
        "vm": agent.settings.vm.name,
        "persona": {"name": persona.name, "version": persona.version} if persona else None,
        "policy": policy,
        "limits": {},
        "network": [],
        "places": [],
        "lease_s": leases.remaining(gated.holder, time.monotonic()) if gated else None,
        "layers": agent.layers(),
        "kernel": {"why_not": layer.why, **layer.counts()},
        "broker": agent.connection,
        "standby": agent.keeping.connected,
        "generation": leases.generation,
        "sessions": len(agent.supervisor.sessions),
        "notify_us": _percentiles(agent.supervisor.times),
        "verified": asdict(agent.supervisor.verifier.counts),
    }


def _current(agent: Agent, gated: Gated | None) -> tuple[PersonaRef | None, str | None]:
    """The persona and policy of the last start, while that still holds; else those of the login."""
    if gated is None:
        return None, None
    last = gated.last
    if last is not None and last.generation == agent.leases.generation:
        return last.persona, last.policy
    base = agent.sessions.base.get(gated.session.id)
    return (base.persona, base.policy) if base is not None and base.persona is not None else (None, None)


def _percentiles(seconds: Iterable[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {f"p{p}": round(ordered[(len(ordered) - 1) * p // 100] * 1e6, 1) for p in (50, 99)}
