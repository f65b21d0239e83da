"""The text of the kernel's files about a host as numbers; see proc(5) and Documentation/accounting/psi.rst.

Each returns ``None``, or leaves out a line, where the text is not as it should be.
"""

_DISKSTATS_FIELDS = 13  # of a line of /proc/diskstats up to the time that the disk was busy


def cpu_times(text: str) -> tuple[float, float] | None:
    """Busy and all ticks since boot, from ``/proc/stat``.  Waiting for a disk is not being busy."""
    words = text.partition("\n")[0].split()
    if words[:1] != ["cpu"] or len(words) < 9 or not all(word.isdecimal() for word in words[1:9]):
        return None
    # user nice system idle iowait irq softirq steal; guests' time is in user already
    ticks = [int(word) for word in words[1:9]]
    return float(sum(ticks) - ticks[3] - ticks[4]), float(sum(ticks))


def memory(text: str) -> tuple[int, int] | None:
    """Total and available bytes, from ``/proc/meminfo``."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if name in ("MemTotal", "MemAvailable") and words and words[0].isdecimal():
            found[name] = int(words[0]) * 1024
    return (found["MemTotal"], found["MemAvailable"]) if len(found) == 2 else None


def transferred(text: str) -> dict[str, tuple[int, int]]:
    """Received and sent bytes by network card, from ``/proc/net/dev``."""
    found = {}
    for line in text.splitlines()[2:]:
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) >= 9 and words[0].isdecimal() and words[8].isdecimal():
            found[name.strip()] = int(words[0]), int(words[8])
    return found


def disk_busy_ms(text: str) -> dict[str, int]:
    """By block device for how many milliseconds it had requests, from ``/proc/diskstats``."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) >= _DISKSTATS_FIELDS and words[12].isdecimal():
            found[words[2]] = int(words[12])
    return found


def stalled_us(text: str) -> int | None:
    """Microseconds since boot in which some task waited, from a file of ``/proc/pressure``."""
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["some"] and words[-1].startswith("total=") and words[-1][6:].isdecimal():
            return int(words[-1][6:])
    return None
