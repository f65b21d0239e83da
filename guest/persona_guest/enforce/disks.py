"""The disks behind the mounts that matter, as ``io.max`` wants them: whole disks, by MAJOR:MINOR.

proc(5) mountinfo names the device of each mount; sysfs says which disk a partition is of.
"""

import os
import re
from functools import lru_cache

_DEVICE = re.compile(r"(\d+):(\d+)")
_DISKS_MAX = 64


def disks(mountinfo: str = "/proc/self/mountinfo", devices: str = "/sys/dev/block") -> tuple[str, ...]:
    """Every disk that a file system with a block device lies on, in the order of the mount table.

    A file system on a device mapper or md device is limited there, once, and not below it again.
    Raises ``OSError``.
    """
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as file:
        return _behind(file.read(), devices)


@lru_cache(maxsize=1)  # each login asks, and the table seldom changes
def _behind(table: str, devices: str) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for line in table.splitlines():
        fields = line.split()
        # btrfs and others show an anonymous device, and name the real one as their source
        for device in (fields[2] if len(fields) > 2 else "", _source(fields)):
            if (disk := _disk_of(device, devices)) is not None:
                found[disk] = None
    return tuple(found)[:_DISKS_MAX]


def _disk_of(device: str, devices: str) -> str | None:
    if not _DEVICE.fullmatch(device) or device.startswith("0:"):
        return None
    path = os.path.realpath(f"{devices}/{device}")
    if not os.path.isdir(path):
        return None
    if os.path.exists(f"{path}/partition"):
        path = os.path.dirname(path)
    try:
        with open(f"{path}/dev", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None


def _source(fields: list[str]) -> str:
    try:
        kind, source = fields[fields.index("-") + 1 :][:2]
        # whoever mounts FUSE names its source; and a way out of /dev may lead into a file system that he serves
        ours = not kind.startswith("fuse") and source.startswith("/dev/") and os.path.normpath(source) == source
        status = os.stat(source) if ours else None
    except (ValueError, OSError):
        return ""
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" if status is not None else ""
