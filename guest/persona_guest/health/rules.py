"""What the files of /proc say of a machine's health, which log entries and units count, and when a report is news.

proc(5): mountinfo, meminfo, loadavg, pressure; systemd.journal-fields(7).
"""

import os
import re
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

from persona.health import Report, Space
from persona_guest.core import kernel_text
from persona_guest.core.accounts import is_person

# File systems on disks whose device number is not the disk's.
_ANONYMOUS = (b"btrfs", b"zfs", b"bcachefs")
_FIGURE = re.compile(rb"[0-9]+(?:\.[0-9]+)?")
_SOME = re.compile(rb"some avg10=([0-9]+(?:\.[0-9]+)?)(?: |$)")
# Units of the system's manager that logind starts for a user, and what they mount in their /run/user.
_USERS_UNIT = re.compile(
    r"user(-runtime-dir)?@.+\.service|session-.+\.scope|user-.+\.slice|run-user-[0-9]+(-.+)?\.mount", re.DOTALL
)
# Of an OOM kill the kernel logs this line alone as an error.  When it is the machine that is full, it begins otherwise.
_LIMIT_REACHED = "Memory cgroup out of memory: "
# What sshd says of whoever talks to it and is nobody yet; "[preauth]" is its mark on most of that.
_STRANGER = re.compile(
    r"error: (kex_exchange_identification|kex_protocol_error|Protocol major versions differ|beginning MaxStartups)"
    r"|(error|fatal): Timeout before authentication|.* \[preauth\]$",
    re.DOTALL,
)
WINDOW_S = 60.0
COUNTED_MAX = 10_000  # errors in a window; more is no more of a reason


def real_mounts(mountinfo: bytes | str) -> list[str]:
    """Mount points of writable file systems on disks, each file system once, by its shortest path.

    Not what lives in memory, comes over a network or is served by a process (FUSE): its space is no disk's,
    and asking for it may wait for somebody.  Whether it is writable is the file system's word: where this
    process has a view of its own, everything may be read-only to it.
    """
    found: dict[bytes, bytes] = {}
    for mount in kernel_text.mounts(mountinfo):
        device, path, kind = mount.device, mount.point, mount.kind
        on_disk = kind in _ANONYMOUS or not (device.startswith(b"0:") or kind.startswith(b"fuse"))
        if on_disk and mount.writable and len(path) < len(found.get(device, path + b"/")):
            found[device] = path
    return sorted(map(os.fsdecode, found.values()))


def memory(meminfo: bytes | str) -> Space | None:
    """Size and available bytes, from meminfo; ``None`` where the kernel does not say."""
    kib = {}
    for line in kernel_text.lines(meminfo):
        name, _, value = line.partition(b":")
        kib[name] = kernel_text.decimal(value.strip(b" ").partition(b" ")[0])
    total, available = kib.get(b"MemTotal"), kib.get(b"MemAvailable")
    return Space(total * 1024, available * 1024) if total is not None and available is not None else None


def pressure(text: bytes | str) -> float | None:
    """Percent of the last 10 s in which some task waited; ``None`` where the kernel does not say."""
    for line in kernel_text.lines(text):
        if match := _SOME.match(line):
            return float(match[1])
    return None


def load_average(text: bytes | str, cpus: int) -> float:
    """The load of the last minute for each CPU, from loadavg.  Raises ``ValueError``."""
    first = kernel_text.lines(text)[0].partition(b" ")[0]
    if not _FIGURE.fullmatch(first):
        raise ValueError(f"{first!r} is not a load average")
    return float(first) / max(1, cpus)


class Errors:
    """How many errors the journal had in the last minute, told one by one when each happened (Unix seconds)."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=COUNTED_MAX)

    def add(self, at: float, now: float) -> None:
        """One more; a clock that was put back leaves none in the future."""
        self._times.append(min(at, now))

    def count(self, now: float) -> int:
        """Those of the minute before ``now``."""
        while self._times and not now - WINDOW_S < self._times[0] <= now:
            self._times.popleft()
        return len(self._times)


def firmware_uuid(text: str) -> str:
    """A machine's UUID from product_uuid of /sys/class/dmi/id; empty where the firmware has none (all 0, or all 1)."""
    try:
        found = uuid.UUID(text)
    except ValueError:
        return ""
    return "" if found.int in (0, (1 << 128) - 1) else str(found)


def counts(entry: Mapping[str, object], uid_min: int) -> bool:
    """Whether an error is the machine's own: what a login user does must not take others' personas away."""
    # systemd-coredump is root and says whose program crashed; anybody could say so of root
    if any(is_person(_number(entry.get(field)), uid_min) for field in ("_AUDIT_LOGINUID", "_UID", "COREDUMP_UID")):
        return False
    message = entry.get("MESSAGE", "")
    # bytes where it is not UTF-8, which a user's process can call itself
    text = message.decode("utf-8", "replace") if isinstance(message, bytes) else str(message)
    if entry.get("_TRANSPORT") == "kernel":
        return not text.startswith(_LIMIT_REACHED)
    # not _COMM: journald does not get to read that of a process that says one line and ends
    if str(entry.get("SYSLOG_IDENTIFIER")).startswith("sshd"):  # or sshd-session
        return _STRANGER.match(text) is None
    return not is_users(str(entry.get("UNIT", "")))


def is_users(unit: str) -> bool:
    """Whether a unit of the system's manager is a user's own, which they can make fail as they like."""
    return _USERS_UNIT.fullmatch(unit) is not None


def _number(value: object) -> int | None:
    return value if type(value) is int else kernel_text.decimal(value) if isinstance(value, str | bytes) else None


def is_news(before: Report, now: Report) -> bool:
    """Whether a report should not wait for its turn: something came, went, or moved noticeably."""
    if _known(before) != _known(now) or before.failed_units != now.failed_units or before.layers != now.layers:
        return True
    return any(
        abs(new - old) >= max(step, abs(old) * share)
        for old, new, step, share in _figures(before, now)
        if old is not None and new is not None
    )


def _known(report: Report) -> Iterable[object]:
    return (
        report.disks.keys(),
        report.pressure.keys(),
        [figure is None for figure in (report.memory, report.load, report.errors, report.clock_skew_s)],
    )


def _figures(before: Report, now: Report) -> Iterator[tuple[float | None, float | None, float, float]]:
    """Old, new, the step that is noticeable, and the share of the old that is."""
    for path, space in now.disks.items():
        old = before.disks[path]
        yield old.free_percent, space.free_percent, 1.0, 0.0
        yield old.free, space.free, 1 << 20, 0.1
    if before.memory is not None and now.memory is not None:
        yield before.memory.free_percent, now.memory.free_percent, 3.0, 0.0
    for resource, some in now.pressure.items():
        yield before.pressure[resource], some, 5.0, 0.0
    yield before.load, now.load, 0.25, 0.1
    yield before.errors, now.errors, 1.0, 0.1
    yield before.clock_skew_s, now.clock_skew_s, 1.0, 0.0


def clock_skew(sent: float, received: float, answered: float) -> float | None:
    """How far this clock is ahead of the broker's, which names whole seconds (HTTP's Date, RFC 9110 5.6.7).

    ``sent`` and ``received`` by this clock.  ``None`` where the answer took too long to say.
    """
    if not 0 <= received - sent < 2:
        return None
    return round((sent + received) / 2 - (answered + 0.5), 1)
