"""A persona's limits as the files of its cgroup say them: cgroup-v2.rst of the kernel's documentation."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from persona.documents import DiskIo, ResourceLimits

CONTROLLERS = ("cpu", "io", "memory", "pids")
_PERIOD_US = 100_000  # the kernel's default; 1 % of it is the smallest quota that it takes
PAGE = 4096  # the kernel counts memory in pages and rounds down
WEIGHT_DEFAULT = 100
_WEIGHT_MAX = 10_000
_PRIORITY_DEFAULT = 50
_MAX = "max"
_IO_KEYS = (("rbps", "read_bps"), ("wbps", "write_bps"), ("riops", "read_iops"), ("wiops", "write_iops"))
IO_UNLIMITED = " ".join(f"{key}={_MAX}" for key, _ in _IO_KEYS)


@dataclass(frozen=True, slots=True)
class Setting:
    """One value of one file; of ``io.max`` for one device (``MAJOR:MINOR``).

    ``optional``: not every kernel has the file, and without it nothing more is possible.
    """

    file: str
    value: str
    device: str = ""
    optional: bool = False

    @property
    def text(self) -> str:
        """The line that is written to the cgroup file."""
        return f"{self.device} {self.value}" if self.device else self.value

    @property
    def default(self) -> bool:
        """Whether a new cgroup has this value."""
        return self.value == _DEFAULTS[self.file]

    def current(self, content: str) -> str:
        """The value that a file with this content has for this setting."""
        if not self.device:
            return content.strip()
        for line in content.split("\n"):
            device, _, value = line.partition(" ")
            if device == self.device:
                return value
        return IO_UNLIMITED


def settings_of(limits: ResourceLimits, devices: tuple[str, ...]) -> tuple[Setting, ...]:
    """Every limit, those that are not set as unlimited, so that applying them always brings the same end.

    A memory limit is all there is: no swap beside it, or one session's bomb would thrash the disk of all.
    The kernel kills the largest program, not the whole session (``memory.oom.group`` stays 0): the
    shell that is left can say what happened.
    """
    percent = limits.cpu_percent
    memory = limits.memory_bytes
    return (
        Setting("cpu.max", f"{_MAX if percent is None else round(percent * _PERIOD_US / 100)} {_PERIOD_US}"),
        Setting("memory.max", _MAX if memory is None else str(memory // PAGE * PAGE)),
        Setting("memory.swap.max", _MAX if memory is None else "0", optional=True),
        Setting("pids.max", _MAX if limits.pids is None else str(limits.pids)),
        *(Setting("io.max", _io(limits.disk_io), device) for device in devices),
    )


def weights_of(weight: int) -> tuple[Setting, ...]:
    """The share under contention.  ``io.weight`` counts where the disk's scheduler looks at it (BFQ, io.cost)."""
    return Setting("cpu.weight", str(weight)), Setting("io.weight", f"default {weight}", optional=True)


def weight_of(priority: int) -> int:
    """A persona's priority (0 to 1000) as a weight: the default is the kernel's default, twice is twice."""
    return min(max(1, priority * WEIGHT_DEFAULT // _PRIORITY_DEFAULT), _WEIGHT_MAX)


UNLIMITED = ResourceLimits()

# --- memory that outlives its session -------------------------------------------------------------------

_MIB = 1 << 20
LEAST = 32 * _MIB  # what a place may use whatever its user left: a shell and what it takes to delete files
_USERS_OWN = 64 * _MIB  # for what of a user's is in no place: the first moments of a login, the service manager
_SESSIONS_OWN = 16 * _MIB  # for sshd's two processes of each session
_ROUGHLY = 16 * _MIB  # what is counted changes all the time; what is written because of it does not
LEFT_ROUGHLY = 4 * _MIB  # the kernel's counters of several cgroups are not of one moment
NOTHING_LEFT = 8 * _MIB  # a bound that only what is left keeps up goes below this


def room(limit: int, left: int) -> int:
    """How much of its limit a place has where its user's earlier sessions left so many bytes in memory."""
    return max(limit - left // LEFT_ROUGHLY * LEFT_ROUGHLY, min(limit, LEAST)) // PAGE * PAGE


def bound_of(limits: Iterable[int | None], sessions: int, before: int | None, counted: Callable[[], int]) -> int | None:
    """The most that all that is one user's may use; ``None`` = no bound.

    That is the sum of the ``limits`` that hold for them now, and an allowance.  It does not become lower than
    what is ``counted`` there, or the kernel would kill all that lives there for what lies in files; and what is
    left does not raise it: it never becomes higher than both ``before`` (``None`` = none) and what the limits give.
    """
    total = _USERS_OWN + _SESSIONS_OWN * sessions
    for limit in limits:
        if limit is None:
            return None
        total += limit
    if before is None or total < before:
        held = -(-(counted() + _USERS_OWN) // _ROUGHLY) * _ROUGHLY
        total = max(total, held if before is None else min(held, before))
    return total // PAGE * PAGE


def _io(disk: DiskIo) -> str:
    found = ((key, getattr(disk, name)) for key, name in _IO_KEYS)
    return " ".join(f"{key}={_MAX if value is None else value}" for key, value in found)


_DEFAULTS = {setting.file: setting.value for setting in (*settings_of(UNLIMITED, ("",)), *weights_of(WEIGHT_DEFAULT))}
