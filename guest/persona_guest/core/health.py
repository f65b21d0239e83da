"""What the files of /proc say of a machine's health, which log entries and units count, and when a report is news.

proc(5): mountinfo, meminfo, loadavg, pressure; systemd.journal-fields(7).
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

from persona.health import Report, Space

_NO_LOGIN = 0xFFFFFFFF  # audit login uid of what no login started
_UID_MAX = 60000  # login.defs on Debian; above are system users that systemd makes up
# File systems on disks whose device number is not the disk's.
_ANONYMOUS = ("btrfs", "zfs", "bcachefs")
# Units of the system's manager that logind starts for a user, and what he mounts in his /run/user.
_USERS_UNIT = re.compile(
    r"user(-runtime-dir)?@.+\.service|session-.+\.scope|user-.+\.slice|run-user-\d+(-.+)?\.mount", re.DOTALL
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


def real_mounts(mountinfo: str) -> list[str]:
    """Mount points of writable file systems on disks, each file system once, by its shortest path.

    Not what lives in memory, comes over a network or is served by a process (FUSE): its space is no disk's,
    and asking for it may wait for somebody.  Whether it is writable is the file system's word: where this
    process has a view of its own, everything may be read-only to it.
    """
    found: dict[str, str] = {}
    for line in mountinfo.splitlines():
        left, dash, right = line.partition(" - ")
        fields, tail = left.split(), right.split()
        if not dash or len(fields) < 6 or len(tail) < 3:
            continue
        device, path, kind = fields[2], _unescape(fields[4]), tail[0]
        on_disk = kind in _ANONYMOUS or not (device.startswith("0:") or kind.startswith("fuse"))
        if on_disk and "rw" in tail[2].split(",") and len(path) < len(found.get(device, path + "/")):
            found[device] = path
    return sorted(found.values())


def _unescape(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def memory(meminfo: str) -> Space | None:
    """``None`` where the kernel does not say."""
    kib = {name: int(value.split()[0]) for name, value in _pairs(meminfo) if value.split()[:1]}
    if "MemTotal" not in kib or "MemAvailable" not in kib:
        return None
    return Space(kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024)


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            yield name, value


def pressure(text: str) -> float | None:
    """Percent of the last 10 s in which some task waited; ``None`` where the kernel does not say."""
    match = re.search(r"^some avg10=(\d+(?:\.\d+)?)", text, re.MULTILINE)
    return float(match[1]) if match else None


def load_average(text: str, cpus: int) -> float:
    """One minute, a CPU.  Raises ``ValueError``."""
    return float(text.split()[0]) / max(1, cpus)


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


def counts(entry: Mapping[str, object], uid_min: int) -> bool:
    """Whether an error is the machine's own: what a login user does must not take others' personas away."""
    login = _number(entry.get("_AUDIT_LOGINUID"))
    if login is not None and uid_min <= login != _NO_LOGIN:
        return False
    # systemd-coredump is root and says whose program crashed; anybody could say so of root
    for field in ("_UID", "COREDUMP_UID"):
        uid = _number(entry.get(field))
        if uid is not None and uid_min <= uid <= _UID_MAX:
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
    """Whether a unit of the system's manager is a user's own, which he can make fail as he likes."""
    return _USERS_UNIT.fullmatch(unit) is not None


def _number(value: object) -> int | None:
    try:
        return int(str(value))
    except ValueError:
        return None


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
