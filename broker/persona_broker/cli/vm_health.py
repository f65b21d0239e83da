"""The health of VMs for operators: what they reported, and what-if figures for ``explain``."""

import argparse
import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import replace

from persona import wire
from persona.answers import as_json, iso
from persona.health import LAYERS, RESOURCES, Report, Space, encode_report
from persona.parsing import Bad
from persona.problems import Fault, PersonaError
from persona.quantities import NUMBER, parse_bytes
from persona.shown import amount
from persona.shown import line as printable
from persona_broker.cli.guests import NO_GUESTS
from persona_broker.cli.store import for_reading
from persona_broker.policy.vm_health import HealthJudge
from persona_broker.settings import Settings

HELP = "disk_free=8%%,errors=3,...: also memory_available, pressure.cpu, load, failed_units, clock_skew, layers=a+b"
_WHOLE = 1 << 40  # bytes of which a share is taken: enough to make any amount that is asked for


def report_of(text: str) -> Report:
    """``disk_free=8%,memory_available=1GiB,pressure.io=30,...``; what is left out is not known.

    An amount of bytes is one of 1 TiB.  Raises ``ArgumentTypeError``.
    """
    report = Report()
    for value in text.split(","):
        figure, _, amount = value.partition("=")
        try:
            report = _with(report, figure.strip(), amount.strip())
        except (ValueError, OverflowError):  # a share of infinity
            raise argparse.ArgumentTypeError(f"{value!r}: {HELP.replace('%%', '%')}") from None
    return report


def _with(report: Report, figure: str, text: str) -> Report:
    """Raises ``ValueError``, ``OverflowError``."""
    if figure == "disk_free":
        return replace(report, disks={"/": _space(text)})
    if figure == "memory_available":
        return replace(report, memory=_space(text))
    if figure == "layers" and set(text.split("+")) <= set(LAYERS):
        return replace(report, layers=dict.fromkeys(text.split("+"), True))
    if not re.fullmatch(f"-?{NUMBER}", text, re.ASCII):
        raise ValueError(text)
    number = float(text)
    group, _, resource = figure.partition(".")
    if group == "pressure" and resource in RESOURCES:
        return replace(report, pressure={**report.pressure, resource: number})
    if figure == "failed_units" and 0 <= number <= 1000:
        return replace(report, failed_units=tuple(f"unit-{index}.service" for index in range(int(number))))
    if figure == "load":
        return replace(report, load=number)
    if figure == "errors":
        return replace(report, errors=int(number))
    if figure == "clock_skew":
        return replace(report, clock_skew_s=number)
    raise ValueError(figure)


def _space(text: str) -> Space:
    if text.endswith("%"):
        if not re.fullmatch(NUMBER, text[:-1], re.ASCII):
            raise ValueError(text)
        return Space(_WHOLE, int(_WHOLE * float(text[:-1]) / 100))
    with contextlib.suppress(Bad):
        return Space(_WHOLE, parse_bytes(int(text) if text.isascii() and text.isdigit() else text))
    raise ValueError(text)


def show(arguments: argparse.Namespace, settings: Settings) -> int:
    """``health [VM]``: 0 every VM that policies ask it of is healthy, 1 not."""
    from persona_broker.store.health import Reports

    store, now = for_reading(settings), time.time()
    guests = [name for name in store.guests() if arguments.vm in (None, name)]
    if arguments.vm and not guests:
        raise PersonaError(Fault.NOT_FOUND, f"there is no guest {arguments.vm!r}")
    reports = Reports(store).look(guests)
    unhealthy = HealthJudge(settings.health_max_age_s).look(store.snapshot().vm_conditions, reports, now)
    items = []
    for name in guests:
        reported = reports.get(name)
        unmet = sorted({unmet.detail for unmet in unhealthy.get(name, {}).values()})
        age = round(now - reported.at, 1) if reported else None
        items.append(
            {
                "vm": name,
                "at": iso(reported.at) if reported else None,
                "age_s": age,
                "report": encode_report(reported.report) if reported else None,
                "unmet": unmet,
            }
        )
        if not arguments.json:
            print(f"{name}: " + (f"reported {age} s ago" if reported else "has not reported"))
            for line in (*(_described(reported.report) if reported else ()), *(f"! {detail}" for detail in unmet)):
                print(f"    {printable(line)}")
    if arguments.json:
        print(as_json(items))
    elif not guests:
        print(NO_GUESTS)
    return 1 if any(item["unmet"] for item in items) else 0


def _described(report: Report) -> Iterator[str]:
    yield "agent: " + wire.RELEASES.get(report.wire, f"newer than this broker (version {report.wire} of the protocol)")
    for path, space in report.disks.items():
        yield f"disk {path}: {amount(space.free)} of {amount(space.total)} free ({space.free_percent:.0f} %)"
    if report.memory is not None:
        yield f"memory: {amount(report.memory.free)} of {amount(report.memory.total)} available"
    yield "pressure: " + (", ".join(f"{name} {some:.0f} %" for name, some in report.pressure.items()) or "unknown")
    yield "load a CPU: " + _known(report.load)
    yield "failed units: " + ("unknown" if report.failed_units is None else ", ".join(report.failed_units) or "none")
    yield "errors a minute: " + _known(report.errors)
    yield "clock ahead by, s: " + _known(report.clock_skew_s)
    yield "layers: " + (", ".join(name for name, active in report.layers.items() if active) or "none")


def _known(figure: float | None) -> str:
    return "unknown" if figure is None else f"{figure:g}"
