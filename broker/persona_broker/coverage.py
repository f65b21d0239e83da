"""What is not as it should be between domains and agents: which has no other half, which is silent.  Pure."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from persona_broker.host.core.readings import Domain, DomainState
from persona_broker.policy.conditions import is_fresh
from persona_broker.policy.vm_health import Reported
from persona_broker.store.hosts import SeenHost


class Lack(StrEnum):
    """What is missing."""

    HOST_NOT_SEEN = "host_not_seen"  # no sample of it, or none that lists its domains, for too long
    DOMAIN_WITHOUT_AGENT = "domain_without_agent"  # it runs, and no guest is bound to it
    DOMAIN_UNKNOWN = "domain_unknown"  # the hypervisor cannot tell its figures
    DOMAIN_ON_SEVERAL_HOSTS = "domain_on_several_hosts"  # one UUID runs more than once
    AGENT_WITHOUT_DOMAIN = "agent_without_domain"  # a guest that is bound to none, where hosts are watched
    DOMAIN_NOT_SEEN = "domain_not_seen"  # a guest's, on no host
    AGENT_SILENT = "agent_silent"  # no report of its health for too long, though nobody says that it is off
    LAYERS_OFF = "layers_off"  # a part of the gate that its agent says is not active
    UUID_DISAGREES = "uuid_disagrees"  # its agent says that it runs in another domain than its own


@dataclass(frozen=True, slots=True)
class Gap:
    """One of them; what does not matter to it is ``None``."""

    lack: Lack
    detail: str
    vm: str | None = None
    host: str | None = None
    uuid: str | None = None


@dataclass(frozen=True, slots=True)
class Ages:
    """``now`` in Unix seconds, and for how many seconds samples and reports say anything."""

    now: float
    load_max_age_s: float
    health_max_age_s: float


@dataclass(frozen=True, slots=True)
class _Place:
    """A domain on a host; ``has_process``: it runs there, or is paused."""

    host: str
    domain: Domain
    has_process: bool


def gaps(
    hosts: Mapping[str, SeenHost],
    bindings: Mapping[str, str],
    guests: Iterable[str],
    reports: Mapping[str, Reported],
    watched: Iterable[str],
    ages: Ages,
) -> list[Gap]:
    """All of them, those of hosts first.

    ``hosts`` have a sample, ``watched`` are to have one; ``bindings`` are UUIDs by guest, ``reports`` the newest ones.
    """
    found = [Gap(Lack.HOST_NOT_SEEN, "it has no sample", host=name) for name in watched if name not in hosts]
    found += _of_hosts(hosts, ages)
    fresh = [host for host in hosts.values() if is_fresh(host.state.domains_at, ages.now, ages.load_max_age_s)]
    where: dict[str, list[_Place]] = {}
    for host in fresh:
        for domain in host.sample.domains:
            has_process = host.state.runs.get(domain.uuid, False)
            where.setdefault(domain.uuid, []).append(_Place(host.sample.host, domain, has_process))
    guest_of = {uuid: guest for guest, uuid in bindings.items()}
    for uuid, places in sorted(where.items(), key=lambda item: item[1][0].domain.name):
        found += _of_domain(uuid, places, guest_of.get(uuid))
    for guest in guests:
        found += _of_guest(guest, bindings.get(guest), where, bool(hosts), reports.get(guest), ages)
    return found


def _of_hosts(hosts: Mapping[str, SeenHost], ages: Ages) -> Iterator[Gap]:
    for name, host in sorted(hosts.items()):
        age_s = ages.now - host.sample.at
        if not is_fresh(host.sample.at, ages.now, ages.load_max_age_s):
            yield Gap(Lack.HOST_NOT_SEEN, f"its last sample is {age_s:.0f} s old", host=name)
        elif not is_fresh(host.state.domains_at, ages.now, ages.load_max_age_s):
            why = host.sample.problem or "its hypervisor does not answer"
            yield Gap(Lack.HOST_NOT_SEEN, f"its domains are not known: {why}", host=name)


def _of_domain(uuid: str, places: list[_Place], guest: str | None) -> Iterator[Gap]:
    there = [place for place in places if place.has_process]
    running = next((place for place in there if place.domain.state is DomainState.RUNNING), None)
    if running is not None and guest is None:
        detail = f"domain {running.domain.name} runs, and no guest is bound to it"
        yield Gap(Lack.DOMAIN_WITHOUT_AGENT, detail, None, running.host, uuid)
    if len(there) > 1:
        names = ", ".join(f"{place.host} ({place.domain.state})" for place in there)
        yield Gap(Lack.DOMAIN_ON_SEVERAL_HOSTS, f"domain {there[0].domain.name} is on {names}", guest, None, uuid)
    for place in places:
        if place.domain.problem:
            detail = f"domain {place.domain.name}: {place.domain.problem}"
            yield Gap(Lack.DOMAIN_UNKNOWN, detail, guest, place.host, uuid)


def _of_guest(
    guest: str,
    uuid: str | None,
    where: Mapping[str, list[_Place]],
    watched: bool,
    reported: Reported | None,
    ages: Ages,
) -> Iterator[Gap]:
    places = where.get(uuid, []) if uuid is not None else []
    if uuid is None and watched:
        yield Gap(Lack.AGENT_WITHOUT_DOMAIN, f"'persona-broker guest bind {guest}' says which it is", guest)
    if uuid is not None and not places:
        yield Gap(Lack.DOMAIN_NOT_SEEN, "its domain is on no host that is seen", guest, None, uuid)
    is_off = bool(places) and not any(place.has_process for place in places)
    if reported is None or not is_fresh(reported.at, ages.now, ages.health_max_age_s):
        if not is_off:
            age = "" if reported is None else f"its last report is {ages.now - reported.at:.0f} s old"
            yield Gap(Lack.AGENT_SILENT, age or "it has never reported", guest, None, uuid)
        return
    layers = sorted(layer for layer, active in reported.report.layers.items() if not active)
    if layers:
        yield Gap(Lack.LAYERS_OFF, f"not active: {', '.join(layers)}", guest, None, uuid)
    said = reported.report.uuid
    if uuid is not None and said not in ("", uuid):
        yield Gap(Lack.UUID_DISAGREES, f"its agent says that its domain is {said}", guest, None, uuid)
