"""Where the load of the broker's own machine comes from: an interface and its two sources."""

import time
from collections.abc import Callable, Mapping
from typing import Protocol

_FIRST_S = 0.2


class LoadSource(Protocol):
    """Percent by metric (cpu, memory, network); a metric that cannot be told is left out."""

    name: str
    immediate: bool  # told rather than measured: worth reading at every change of the database

    def read(self) -> Mapping[str, float]:
        """The load now."""


class SetSource:
    """What the operator set with ``persona-broker load set``: for demonstrations and tests."""

    name = "set"
    immediate = True

    def __init__(self, get: Callable[[], Mapping[str, float]]) -> None:
        self._get = get

    def read(self) -> Mapping[str, float]:
        """The load that was set last."""
        return self._get()


class MachineSource:
    """This machine, through psutil: the broker then runs on the host of the VMs."""

    name = "psutil"
    immediate = False  # the CPU's load over a few milliseconds is noise

    def __init__(self) -> None:
        import psutil  # only a broker with this source pays for it

        self._psutil = psutil
        psutil.cpu_percent()
        time.sleep(_FIRST_S)  # or the first reading would be of nearly no time
        self._bytes = self._transferred()
        self._at = time.monotonic()

    def read(self) -> Mapping[str, float]:
        """CPU since the last reading, memory that is not available, network of the fastest link's speed."""
        load = {"cpu": self._psutil.cpu_percent(), "memory": self._psutil.virtual_memory().percent}
        now, total = time.monotonic(), self._transferred()
        speed = max((nic.speed for nic in self._psutil.net_if_stats().values() if nic.isup), default=0)
        if speed > 0 and now > self._at:
            rate = (total - self._bytes) * 8 / (now - self._at)
            load["network"] = min(100.0, rate / (speed * 1e6) * 100)
        self._bytes, self._at = total, now
        return load

    def _transferred(self) -> int:
        counters = self._psutil.net_io_counters(nowrap=True)
        return int(counters.bytes_sent + counters.bytes_recv) if counters else 0
