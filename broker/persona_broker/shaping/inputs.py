"""What the arbiter is told of a host: its domains, the sessions of the guests that they are, what their agents report.

Nobody shapes a VM yet, so what is in force is the baseline, with the memory that its balloon has.
"""

from collections.abc import Iterable, Mapping, Sequence

from persona.documents import Persona
from persona_broker.host.core.arbiter import WEIGHT, Host, LiveSession, Shape, Vm
from persona_broker.host.core.readings import Domain, DomainState
from persona_broker.policy.conditions import is_fresh
from persona_broker.store.hosts import SeenHost
from persona_broker.store.interface import SessionRow
from persona_broker.view import View

_NOT_BOUND = "no guest is bound to it"


def live_sessions(view: View, rows: Iterable[SessionRow]) -> dict[str, tuple[LiveSession, ...]]:
    """By guest, the sessions that may use a persona now.

    A session counts with the highest priority and the widest limits of its personas.
    """
    found: dict[str, tuple[LiveSession, ...]] = {}
    for row in rows:
        entries = view.snapshot.entries(row.subject, view.condition_state)
        personas = [entry.versioned.persona for entry in entries if entry.holds and entry.versioned is not None]
        if personas and not row.revoked:
            found[row.guest] = (*found.get(row.guest, ()), _session(personas))
    return found


def is_seen(host: SeenHost, view: View, now: float) -> bool:
    """Whether its load is known at ``now`` (Unix seconds), and its domains are."""
    times = (host.sample.at, host.sample.domains_at)
    return bool(host.sample.load) and all(is_fresh(at, now, view.load_max_age_s) for at in times)


def of_host(
    host: SeenHost, view: View, sessions: Mapping[str, tuple[LiveSession, ...]], now: float
) -> tuple[Host, list[Vm]]:
    """A host that is seen and its running VMs, called as the guests that they are, or by UUID."""
    free = host.sample.capacity.get("memory_free")
    guest_of = {binding.uuid: guest for guest, binding in view.bindings.items()}
    running = [domain for domain in host.sample.domains if domain.state is DomainState.RUNNING]
    vms = [_vm(domain, guest_of.get(domain.uuid), view, sessions, now) for domain in running]
    return Host(host.sample.load, None if free is None else int(free)), vms


def _vm(
    domain: Domain, guest: str | None, view: View, sessions: Mapping[str, tuple[LiveSession, ...]], now: float
) -> Vm:
    cpus, balloon, most = (domain.figures.get(name) for name in ("cpus", "memory", "memory_max"))
    name = domain.uuid if guest is None else guest
    left_alone = _NOT_BOUND if guest is None else ""
    live = () if guest is None else sessions.get(guest, ())
    if cpus is None or balloon is None or int(most or 0) == 0:
        return Vm(name, int(cpus or 0), int(most or 0), live, left_alone=left_alone)
    used = None if guest is None else _used(view, guest, now)
    shape = Shape(WEIGHT, None, int(balloon))
    return Vm(name, int(cpus), int(most or 0), live, shape, int(balloon), used, left_alone)


def _used(view: View, guest: str, now: float) -> int | None:
    reported = view.health.get(guest)
    if reported is None or not is_fresh(reported.at, now, view.health_max_age_s) or reported.report.memory is None:
        return None
    return reported.report.memory.total - reported.report.memory.free


def _session(personas: Sequence[Persona]) -> LiveSession:
    limits = [persona.resource_limits for persona in personas]
    percents = [limit.cpu_percent for limit in limits if limit.cpu_percent is not None]
    sizes = [limit.memory_bytes for limit in limits if limit.memory_bytes is not None]
    return LiveSession(
        max(persona.priority for persona in personas),
        max(percents) / 100 if len(percents) == len(limits) else None,
        max(sizes) if len(sizes) == len(limits) else None,
    )
