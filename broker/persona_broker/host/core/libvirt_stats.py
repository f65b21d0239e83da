"""What libvirt's bulk call tells of a domain, by the names of ``virConnectGetAllDomainStats``, as a reading."""

from collections.abc import Mapping

from persona_broker.host.core.readings import DomainReading, DomainState

STATES = {  # virDomainState
    1: DomainState.RUNNING,
    2: DomainState.RUNNING,  # "blocked": on a resource, as running ones are from time to time
    3: DomainState.PAUSED,
    5: DomainState.SHUT_OFF,
    6: DomainState.CRASHED,
}
_DEVICES_MAX = 1024


def reading_of(uuid: str, name: str, stats: Mapping[str, object]) -> DomainReading:
    """The reading of one domain.  A figure that libvirt leaves out, or that is not a number, is ``None``."""
    memory_kib, most_kib = _number(stats, "balloon.current"), _number(stats, "balloon.maximum")
    return DomainReading(
        uuid=uuid,
        name=name,
        state=STATES.get(_number(stats, "state.state") or 0, DomainState.OTHER),
        cpu_ns=_number(stats, "cpu.time"),
        cpus=_number(stats, "vcpu.current"),
        memory_bytes=None if memory_kib is None else memory_kib * 1024,
        memory_max_bytes=None if most_kib is None else most_kib * 1024,
        read_bytes=_sum(stats, "block", "rd.bytes"),
        written_bytes=_sum(stats, "block", "wr.bytes"),
        received_bytes=_sum(stats, "net", "rx.bytes"),
        sent_bytes=_sum(stats, "net", "tx.bytes"),
    )


def _number(stats: Mapping[str, object], key: str) -> int | None:
    value = stats.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _sum(stats: Mapping[str, object], group: str, field: str) -> int | None:
    """Over all devices of a group; ``None`` where one of them does not say, or there is none."""
    count = _number(stats, f"{group}.count") or 0
    found = [_number(stats, f"{group}.{index}.{field}") for index in range(min(count, _DEVICES_MAX))]
    known = [value for value in found if value is not None]
    return sum(known) if known and len(known) == len(found) else None
