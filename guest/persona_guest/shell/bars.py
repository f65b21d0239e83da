"""Use against limit, one line for each resource; as a bar where a person reads it."""

from collections.abc import Iterator
from typing import Any

from persona.quantities import parse_bytes, parse_cpu
from persona.shown import amount

_WIDTH = 20


def place_lines(places: list[dict[str, Any]], *, bars: bool) -> Iterator[str]:
    """The lines of each place, as the agent describes it in ``status``."""
    for place in places:
        persona, use, limits = place["persona"], place["use"], place["limits"]
        state = ", withdrawn" if place["withdrawn"] else ""
        yield f"{persona['name']} v{persona['version']}{state}:"
        disk, pressure = limits.get("disk_io", {}), use["pressure"]
        cpu, memory, pids = limits.get("cpu"), limits.get("memory"), limits.get("pids")
        rows = (
            ("cpu", use["cpu_percent"], parse_cpu(cpu) if cpu else None, "%", pressure["cpu"]),
            ("memory", use["memory"], parse_bytes(memory) if memory else None, "B", pressure["memory"]),
            ("processes", use["pids"], pids, "", None),
            ("read", use["read_bps"], _bytes(disk.get("read_bps")), "B/s", pressure["io"]),
            ("write", use["write_bps"], _bytes(disk.get("write_bps")), "B/s", None),
        )
        for label, used, limit, unit, waiting in rows:
            yield "  " + _row(label, used, limit, unit, waiting, bars=bars)
        if place.get("left"):
            yield f"  {amount(place['left'])} of the memory is what your earlier sessions left there, as in /dev/shm"


def _bytes(value: Any) -> int | None:
    return parse_bytes(value) if value else None


def _row(label: str, used: float, limit: float | None, unit: str, waiting: float | None, *, bars: bool) -> str:
    bar = ""
    if bars:
        filled = min(_WIDTH, round(_WIDTH * used / limit)) if limit else 0
        bar = f"[{'#' * filled}{'.' * (_WIDTH - filled)}] " if limit else " " * (_WIDTH + 3)
    text = _shown(used, unit) + (f" of {_shown(limit, unit)}" if limit is not None else ", no limit")
    pressure = f"; pressure {waiting:g} %" if waiting is not None else ""
    return f"{label:<10} {bar}{text}{pressure}"


def _shown(value: float, unit: str) -> str:
    if unit.startswith("B"):
        return amount(value) + unit.removeprefix("B")
    return f"{value:g}" + (f" {unit}" if unit else "")
