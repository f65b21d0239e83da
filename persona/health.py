"""How a VM is: what its agent measures and reports, and what a policy asks of it.  Values, and their two forms.

A figure that a VM cannot tell is ``None`` or absent, and that is never healthy.  What the broker makes of a
report, and when a report is too old to say anything, is the broker's.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from persona import json_fields, wire
from persona.parsing import Bad, Reader, number, one_of, shown
from persona.quantities import NUMBER, bytes_from

RESOURCES = ("cpu", "memory", "io")  # what the kernel has pressure figures of
LAYERS = ("seccomp", "bpf", "verify", "landlock")
MOUNTS_MAX = 128
UNITS_MAX = 64
LAYERS_MAX = 16
PRESSURES_MAX = 16
_SPACE_LEAST = 1 << 20  # as a bound, bytes; less is always there
_NUMBER = re.compile(NUMBER, re.ASCII)
_PERCENT_FREE_MAX = 90.0  # its re-entry lies between it and 100


# --- what is reported -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes: all there is, and what an ordinary user could still take."""

    total: int
    free: int

    @property
    def free_percent(self) -> float:
        """0 to 100."""
        return 100.0 * self.free / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """One look at a VM.  ``None`` = it could not be told.

    ``disks`` by mount point; ``pressure`` by resource, percent of time in which some task waited for it over the
    last 10 s (PSI ``some avg10``); ``load`` the kernel's one-minute average a CPU; ``errors`` journal entries of
    priority err or worse in the last minute, those of gated users left out; ``clock_skew_s`` how far the clock is
    ahead of the broker's, negative = behind; ``layers`` of the gate by name, whether each is active; ``wire`` the
    newest version of the protocol that the agent speaks (``persona.wire``); ``uuid`` that of the VM's firmware, in
    small letters, empty = not known.
    """

    disks: Mapping[str, Space] = field(default_factory=dict)
    memory: Space | None = None
    pressure: Mapping[str, float] = field(default_factory=dict)
    load: float | None = None
    failed_units: tuple[str, ...] | None = None
    errors: int | None = None
    clock_skew_s: float | None = None
    layers: Mapping[str, bool] = field(default_factory=dict)
    wire: int = wire.FIRST
    uuid: str = ""


# What 0.1.0 knows: its broker refuses a report with more.  A later figure has a default, and is left out there.
_OF_0_1_0 = ("disks", "memory", "pressure", "load", "failed_units", "errors", "clock_skew_s", "layers")


def encode_report(report: Report, version: int = wire.CURRENT) -> dict[str, Any]:
    """HEALTH of docs/protocol.md, for a broker of this version of the protocol."""
    value = {
        "disks": {path: _encode_space(space) for path, space in report.disks.items()},
        "memory": None if report.memory is None else _encode_space(report.memory),
        "pressure": dict(report.pressure),
        "load": report.load,
        "failed_units": None if report.failed_units is None else list(report.failed_units),
        "errors": report.errors,
        "clock_skew_s": report.clock_skew_s,
        "layers": dict(report.layers),
        "wire": report.wire,
        "uuid": report.uuid,
    }
    return value if version > wire.FIRST else {name: value[name] for name in _OF_0_1_0}


def decode_report(value: object, path: str = "") -> Report:
    """A report; figures that only a newer guest knows are skipped.  Raises ``CodecError``."""
    item = json_fields.known(value, path, _OF_0_1_0)

    def at(name: str) -> str:
        return f"{path}.{name}" if path else name

    pressure = _by_name(item["pressure"], at("pressure"), PRESSURES_MAX, 64, json_fields.number)
    return Report(
        disks=_by_name(item["disks"], at("disks"), MOUNTS_MAX, 4096, _decode_space),
        memory=json_fields.optional(item["memory"], at("memory"), _decode_space),
        pressure={name: some for name, some in pressure.items() if name in RESOURCES},
        load=json_fields.optional(item["load"], at("load"), json_fields.number),
        failed_units=json_fields.optional(item["failed_units"], at("failed_units"), _decode_units),
        errors=json_fields.optional(item["errors"], at("errors"), json_fields.integer),
        clock_skew_s=json_fields.optional(item["clock_skew_s"], at("clock_skew_s"), _decode_skew),
        layers=_by_name(item["layers"], at("layers"), LAYERS_MAX, 64, json_fields.boolean),
        wire=_decode_wire(value, at("wire")),
        uuid=_decode_uuid(value, at("uuid")),
    )


def _encode_space(space: Space) -> dict[str, int]:
    return {"total": space.total, "free": space.free}


def _decode_space(value: object, path: str) -> Space:
    item = json_fields.known(value, path, ("total", "free"))
    return Space(json_fields.integer(item["total"], f"{path}.total"), json_fields.integer(item["free"], f"{path}.free"))


def _decode_wire(report: object, path: str) -> int:
    """0.1.0 does not say, and speaks the first."""
    return json_fields.integer(report.get("wire", wire.FIRST) if isinstance(report, dict) else None, path)


def _decode_uuid(report: object, path: str) -> str:
    """0.1.0 does not say."""
    found = report.get("uuid", "") if isinstance(report, dict) else None
    return "" if found == "" else json_fields.uuid(found, path)


def _decode_units(value: object, path: str) -> tuple[str, ...]:
    return json_fields.strings(value, path, UNITS_MAX)


def _decode_skew(value: object, path: str) -> float:
    if type(value) not in (int, float) or not -1e12 < value < 1e12:  # type: ignore[operator]  # narrowed by type()
        raise json_fields.CodecError(path, "expected a number")
    return float(value)  # type: ignore[arg-type]  # narrowed by type()


def _by_name(
    value: object, path: str, count: int, limit: int, decode: Callable[[object, str], json_fields.T]
) -> dict[str, json_fields.T]:
    if not isinstance(value, dict) or len(value) > count:
        raise json_fields.CodecError(path, f"expected an object of at most {count} entries")
    read = json_fields.string
    return {read(name, path, limit): decode(item, f"{path}[{name[:64]!r}]") for name, item in value.items()}


# --- what is asked ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bound:
    """A figure that must be above or below a number.  ``figure`` is a field of ``vm_health`` without its ending.

    ``percent``: of the whole, where the figure is an amount.  What is at or past the number counts as past it
    until it is better than ``again``, so that it does not flap.
    """

    figure: str
    number: float
    percent: bool = False

    @property
    def above(self) -> bool:
        """Whether the figure must be above the number."""
        return self.figure in _ABOVE

    @property
    def again(self) -> float:
        """A tenth better; a share of the whole at most half the way to all of it; counts as they are."""
        if self.figure in ("failed_units", "clock_skew"):
            return self.number
        if not self.above:
            return self.number * 0.9
        return min(self.number * 1.1, (self.number + 100) / 2) if self.percent else self.number * 1.1


@dataclass(frozen=True, slots=True)
class VmHealth:
    """What a policy asks of the VM: every bound, and layers of the gate that must be active."""

    bounds: tuple[Bound, ...]
    layers: tuple[str, ...] = ()


_ABOVE = ("disk_free", "memory_available")


def _amount(value: Any) -> tuple[float, bool]:
    """``"10%"`` or bytes."""
    if isinstance(value, str) and value.strip().endswith("%"):
        percent = _figure(value.strip()[:-1].rstrip())
        if not 0.01 <= percent <= _PERCENT_FREE_MAX:
            raise Bad(f"{shown(value)} is out of range", f"0.01 % to {_PERCENT_FREE_MAX:g} %, like 10%")
        return percent, True
    try:
        return float(bytes_from(_SPACE_LEAST)(value)), False
    except Bad as error:
        raise Bad(error.message, 'a share like "10%", or bytes like 2GiB') from None


def _figure(text: str) -> float:
    """-1 where it is no plain number; ``float`` takes other scripts' digits, ``1_0`` and ``nan`` too."""
    return float(text) if _NUMBER.fullmatch(text) else -1.0


def _seconds(value: Any) -> float:
    seconds = -1.0
    if type(value) in (int, float):
        seconds = value  # compared first: an integer may be too large for a float
    elif isinstance(value, str):
        seconds = _figure(value.strip().removesuffix("s").rstrip())
    if not 1 <= seconds <= 86400:
        fix = "like 5s; the broker's clock is told in whole seconds"
        raise Bad(f"expected 1 to 86400 seconds, not {shown(value)}", fix)
    return float(seconds)


_NUMBERS = {
    "load_below": number(0.01, 1000),
    "failed_units_below": number(1, 1000),
    "errors_below": number(1, 1e6),
    "clock_skew_below": _seconds,
}


def read_vm_health(reader: Reader) -> VmHealth | None:
    """``when.vm_health`` of a policy; ``None`` where it asks for nothing.  What is wrong is noted in the reader."""
    bounds = []
    for figure in _ABOVE:
        amount, percent = reader.read(f"{figure}_above", _amount, (0.0, False))
        if amount:
            bounds.append(Bound(figure, amount, percent))
    pressure = reader.below("pressure_below", RESOURCES)
    for resource in RESOURCES:
        if some := pressure.read(resource, number(1, 100), 0.0):
            bounds.append(Bound(f"pressure.{resource}", some))
    for name, parse in _NUMBERS.items():
        if limit := reader.read(name, parse, 0.0):
            bounds.append(Bound(name.removesuffix("_below"), limit))
    layers = reader.each("layers", one_of(*LAYERS), LAYERS_MAX)
    for index, layer in enumerate(layers):
        if layer in layers[:index]:
            reader.note(f"layers[{index}]", f"{layer!r} is there twice", "remove one")
    return VmHealth(tuple(bounds), layers) if bounds or layers else None


def vm_health_mapping(health: VmHealth) -> dict[str, Any]:
    """What ``read_vm_health`` reads back to an equal value."""
    mapping: dict[str, Any] = {}
    for bound in health.bounds:
        number: Any = int(bound.number) if bound.number.is_integer() else bound.number
        group, dot, resource = bound.figure.partition(".")
        if dot:
            mapping.setdefault(f"{group}_below", {})[resource] = number
        elif bound.above:
            mapping[f"{group}_above"] = f"{number}%" if bound.percent else number
        else:
            mapping[f"{group}_below"] = number
    if health.layers:
        mapping["layers"] = list(health.layers)
    return mapping
