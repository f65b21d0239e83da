"""A host's sample: its load and its domains, as the poller writes them and the broker reads them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from persona import json_fields
from persona.conditions import METRICS
from persona_broker.host.core.readings import Domain, DomainState

DOMAINS_MAX = 2_000  # of one host; the broker reads that many in some hundredths of a second
FIGURES = ("cpu", "cpus", "memory", "memory_max", "read", "write", "receive", "send")
CAPACITY = ("memory", "memory_free")
_TEXT_MAX = 1000
_FIGURE_MAX = 1e18


@dataclass(frozen=True, slots=True)
class HostSample:
    """``at`` and ``domains_at`` are Unix seconds; ``None`` = its domains were never listed.

    ``capacity`` is in bytes: all memory of the host, and what of it is available.
    ``problem`` is why the newest listing failed: ``domains`` are those of the last one that did not.
    """

    host: str
    uri: str
    at: float
    load: Mapping[str, float]
    domains_at: float | None
    domains: tuple[Domain, ...]
    problem: str = ""
    capacity: Mapping[str, float] = field(default_factory=dict)


def encode(sample: HostSample) -> dict[str, Any]:
    """As JSON has it."""
    return {
        "host": sample.host,
        "uri": sample.uri,
        "at": sample.at,
        "load": dict(sample.load),
        "domains_at": sample.domains_at,
        "domains": [
            {
                "uuid": domain.uuid,
                "name": domain.name,
                "state": str(domain.state),
                "figures": dict(domain.figures),
                "problem": domain.problem[:_TEXT_MAX],
            }
            for domain in sample.domains
        ],
        "problem": sample.problem[:_TEXT_MAX],
        "capacity": dict(sample.capacity),
    }


def decode(value: object) -> HostSample:
    """Raises ``CodecError``, which names the field."""
    needed = ("host", "uri", "at", "load", "domains_at", "domains", "problem")
    fields = json_fields.mapping(value, "", needed, ("capacity",))
    listed = fields["domains"]
    if not isinstance(listed, list) or len(listed) > DOMAINS_MAX:
        raise json_fields.CodecError("domains", f"expected a list of at most {DOMAINS_MAX}")
    at = fields["domains_at"]
    return HostSample(
        _text(fields["host"], "host"),
        _text(fields["uri"], "uri"),
        _number(fields["at"], "at"),
        _numbers(fields["load"], "load", METRICS, 100.0),
        None if at is None else _number(at, "domains_at"),
        tuple(_domain(item, f"domains[{index}]") for index, item in enumerate(listed)),
        _text(fields["problem"], "problem"),
        _numbers(fields.get("capacity", {}), "capacity", CAPACITY, _FIGURE_MAX),
    )


def _domain(value: object, path: str) -> Domain:
    fields = json_fields.mapping(value, path, ("uuid", "name", "state", "figures", "problem"), ())
    try:
        state = DomainState(_text(fields["state"], f"{path}.state"))
    except ValueError:
        raise json_fields.CodecError(f"{path}.state", f"expected one of {', '.join(DomainState)}") from None
    return Domain(
        json_fields.uuid(fields["uuid"], f"{path}.uuid"),
        _text(fields["name"], f"{path}.name"),
        state,
        _numbers(fields["figures"], f"{path}.figures", FIGURES, _FIGURE_MAX),
        _text(fields["problem"], f"{path}.problem"),
    )


def _text(value: object, path: str) -> str:
    if not isinstance(value, str) or len(value) > _TEXT_MAX:
        raise json_fields.CodecError(path, f"expected text of at most {_TEXT_MAX} characters")
    return value


def _number(value: object, path: str, most: float = _FIGURE_MAX) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise json_fields.CodecError(path, f"expected a number from 0 to {most:g}")
    return float(value)


def _numbers(value: object, path: str, names: tuple[str, ...], most: float) -> dict[str, float]:
    fields = json_fields.mapping(value, path, (), names)
    return {name: _number(number, f"{path}.{name}", most) for name, number in fields.items()}
