"""What the processes of a place use now, and how hard they wait for it (PSI)."""

from typing import NamedTuple

from persona_guest.core.kernel_text import decimal
from persona_guest.kernel.cgroup import Hierarchy

_RESOURCES = ("cpu", "memory", "io")


class Sample(NamedTuple):
    """Counters and levels of one moment: microseconds, bytes, processes; pressure in percent of the last 10 s."""

    cpu_us: int
    memory: int
    pids: int
    read: int
    written: int
    pressure: dict[str, float]


def sample(tree: Hierarchy, cgroup: str) -> Sample:
    """Raises ``OSError`` where the cgroup is gone; a file that this kernel has not counts as nothing."""
    if not tree.exists(cgroup):
        raise FileNotFoundError(2, "no such cgroup", cgroup)
    io = _read(tree, cgroup, "io.stat").split()
    return Sample(
        cpu_us=_keyed(_read(tree, cgroup, "cpu.stat"), "usage_usec"),
        memory=_number(_read(tree, cgroup, "memory.current")),
        pids=_number(_read(tree, cgroup, "pids.current")),
        read=_summed(io, "rbytes="),
        written=_summed(io, "wbytes="),
        pressure={name: _pressure(_read(tree, cgroup, f"{name}.pressure")) for name in _RESOURCES},
    )


def rates(before: Sample, after: Sample, seconds: float) -> dict[str, object]:
    """The two as JSON: ``cpu_percent`` of one core, ``read_bps`` and ``write_bps`` over the time between."""
    return {
        "cpu_percent": round((after.cpu_us - before.cpu_us) / seconds / 1e4, 1),
        "memory": after.memory,
        "pids": after.pids,
        "read_bps": round((after.read - before.read) / seconds),
        "write_bps": round((after.written - before.written) / seconds),
        "pressure": after.pressure,
    }


def _read(tree: Hierarchy, cgroup: str, file: str) -> str:
    try:
        return tree.read(cgroup, file)
    except OSError:  # no such controller, or PSI is off (EOPNOTSUPP)
        return ""


def _number(text: str) -> int:
    return decimal(text.removesuffix("\n")) or 0


def _keyed(text: str, key: str) -> int:
    for line in text.split("\n"):
        name, _, value = line.partition(" ")
        if name == key:
            return _number(value)
    return 0


def _summed(words: list[str], prefix: str) -> int:
    return sum(_number(word.removeprefix(prefix)) for word in words if word.startswith(prefix))


def _pressure(text: str) -> float:
    for word in text.split():
        if word.startswith("avg10="):  # of the first line: some
            return float(word.removeprefix("avg10="))
    return 0.0
