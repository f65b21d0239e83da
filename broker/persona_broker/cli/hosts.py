"""``guest bind`` and ``unbind``, and ``coverage``: which guest is which domain, and what has no other half."""

import argparse
import time
import uuid
from collections.abc import Mapping
from contextlib import closing

from persona.problems import Fault, PersonaError
from persona.shown import line as printable
from persona_broker.cli.author import author
from persona_broker.cli.chain import hand_over
from persona_broker.cli.store import existing, for_reading, say
from persona_broker.host.core.readings import Domain, DomainState
from persona_broker.settings import Settings, watched_hosts
from persona_broker.store.hosts import SeenHost, SeenHosts
from persona_broker.view import State

_OFFERED_MAX = 20


def bind(arguments: argparse.Namespace, settings: Settings) -> int:
    """``guest bind VM --uuid U``: from now on its host is the one on which that domain runs."""
    wanted = _uuid(arguments.uuid)
    store = existing(settings)
    if arguments.vm not in store.guests():
        raise PersonaError(Fault.NOT_FOUND, f"there is no guest {arguments.vm!r}; 'persona-broker guest list' has them")
    seen = SeenHosts(store)
    seen.look()
    found = [(host, one) for host, one in _domains(seen.seen) if one.uuid == wanted]
    if not found:
        bound = {binding.uuid for binding in store.bindings().values()}
        free = [(host, one) for host, one in _domains(seen.seen) if one.uuid not in bound]
        raise PersonaError(Fault.NOT_FOUND, f"no host has a domain {wanted}; {_offered(free, bool(seen.seen))}")
    store.bind(arguments.vm, wanted, author(""))
    hand_over(store, settings)
    host, domain = found[0]
    value = {"vm": arguments.vm, "uuid": wanted, "name": domain.name, "host": host}
    say(arguments, value, f"{arguments.vm} is domain {printable(domain.name)} on {host}")
    return 0


def unbind(arguments: argparse.Namespace, settings: Settings) -> int:
    """``guest unbind VM``: its host's load is that of the broker's machine again."""
    store = existing(settings)
    if not store.unbind(arguments.vm, author("")):
        raise PersonaError(Fault.NOT_FOUND, f"guest {arguments.vm!r} is bound to no domain")
    hand_over(store, settings)
    say(arguments, {"unbound": arguments.vm}, f"{arguments.vm} is bound to no domain any more")
    return 0


def coverage(arguments: argparse.Namespace, settings: Settings) -> int:
    """``coverage``: 0 each domain has its agent and each agent its domain, 1 not."""
    with closing(for_reading(settings)) as store:
        state = State(store, settings.load_max_age_s, settings.health_max_age_s, watched_hosts(settings.host))
        found = state.current().gaps(time.time())
    items = [
        {"lack": str(gap.lack), "vm": gap.vm, "host": gap.host, "uuid": gap.uuid, "detail": gap.detail} for gap in found
    ]
    lines = [
        f"{gap.lack:24} {gap.vm or gap.host or '-':20} {printable(gap.detail)}" + (f"  {gap.uuid}" if gap.uuid else "")
        for gap in found
    ]
    say(arguments, items, "\n".join(lines) or "nothing is missing")
    return 1 if found else 0


def _uuid(text: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError:
        fix = "expected one as 'virsh domuuid NAME' and 'persona-host top' show it"
        raise PersonaError(Fault.BAD_REQUEST, f"{text[:64]!r} is not a UUID: {fix}") from None


def _domains(hosts: Mapping[str, SeenHost]) -> list[tuple[str, Domain]]:
    """All that are seen, those that run first."""
    every = [(name, domain) for name, host in sorted(hosts.items()) for domain in host.sample.domains]
    return sorted(every, key=lambda item: item[1].state is not DomainState.RUNNING)


def _offered(free: list[tuple[str, Domain]], watched: bool) -> str:
    if not watched:
        return "no host has been seen yet: is persona-host running? 'persona-host top' says what it sees"
    if not free:
        return "every domain that is seen is bound to a guest"
    named = [f"{one.uuid} ({printable(one.name)} on {host}, {one.state})" for host, one in free[:_OFFERED_MAX]]
    more = f", and {len(free) - _OFFERED_MAX} more" if len(free) > _OFFERED_MAX else ""
    return f"not bound yet: {', '.join(named)}{more}"
