"""This machine's own counters, from ``/proc`` and ``/sys``: of the whole host, and not the sum of its domains."""

import time
from collections.abc import Callable
from pathlib import Path

from persona_broker.host.core import proc_text
from persona_broker.host.core.readings import HostReading, Link

_RESOURCES = ("cpu", "memory", "io")


class Machine:
    """Reads what is there: a kernel without PSI, or a machine without disks, has fewer figures."""

    def __init__(
        self, proc: Path = Path("/proc"), sys: Path = Path("/sys"), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._proc = proc
        self._sys = sys
        self._clock = clock

    def read(self) -> HostReading:
        """All counters at about one moment."""
        pressure = {name: proc_text.stalled_us(_text(self._proc / "pressure" / name)) for name in _RESOURCES}
        busy_ms = proc_text.disk_busy_ms(_text(self._proc / "diskstats"))
        return HostReading(
            self._clock(),
            proc_text.cpu_times(_text(self._proc / "stat")),
            proc_text.memory(_text(self._proc / "meminfo")),
            self._links(),
            {name: ms for name, ms in busy_ms.items() if self._is_disk(name)},
            {name: stalled for name, stalled in pressure.items() if stalled is not None},
        )

    def _links(self) -> dict[str, Link]:
        """Of real network cards: bridges and taps of VMs carry the same bytes a second time."""
        found = {}
        for name, (received, sent) in proc_text.transferred(_text(self._proc / "net" / "dev")).items():
            folder = self._sys / "class" / "net" / name
            if (folder / "device").exists():
                speed = _text(folder / "speed").strip()  # megabits a second; -1, or an error, where it has no link
                found[name] = Link(received, sent, int(speed) * 1e6 if speed.isdecimal() else 0.0)
        return found

    def _is_disk(self, name: str) -> bool:
        """A whole disk with hardware behind it; partitions, loops and device-mapper count the same time again."""
        return (self._sys / "block" / name / "device").exists()


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
