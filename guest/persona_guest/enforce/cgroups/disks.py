"""The disks behind the mounts that matter, as ``io.max`` wants them: whole disks, by MAJOR:MINOR.

proc(5) mountinfo names the device of each mount; sysfs says which disk a partition is of.
"""

import os
import re
from functools import lru_cache

from persona_guest.core.kernel_text import Mount, mounts

_DEVICE = re.compile(rb"[0-9]+:[0-9]+")
_DISKS_MAX = 64


def disks(mountinfo: str = "/proc/self/mountinfo", devices: str = "/sys/dev/block") -> tuple[str, ...]:
    """Every disk that a file system with a block device lies on, in the order of the mount table.

    A file system on a device mapper or md device is limited there, once, and not below it again.
    Raises ``OSError``.
    """
    with open(mountinfo, "rb") as file:
        return _behind(file.read(), devices)


@lru_cache(maxsize=1)  # each login asks, and the table seldom changes
def _behind(table: bytes, devices: str) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for mount in mounts(table):
        # btrfs and others show an anonymous device, and name the real one as their source
        for device in (mount.device, _source(mount)):
            if (disk := _disk_of(device, devices)) is not None:
                found[disk] = None
    return tuple(found)[:_DISKS_MAX]


def _disk_of(device: bytes, devices: str) -> str | None:
    if not _DEVICE.fullmatch(device) or device.startswith(b"0:"):
        return None
    path = os.path.realpath(f"{devices}/{device.decode('ascii')}")
    if not os.path.isdir(path):
        return None
    if os.path.exists(f"{path}/partition"):
        path = os.path.dirname(path)
    try:
        with open(f"{path}/dev", "rb") as file:
            found = file.read(64).removesuffix(b"\n")
    except OSError:
        return None
    return found.decode("ascii") if _DEVICE.fullmatch(found) else None


def _source(mount: Mount) -> bytes:
    # whoever mounts FUSE names its source; and a way out of /dev may lead into a file system that they serve
    path = os.fsdecode(mount.source)
    if mount.kind.startswith(b"fuse") or not path.startswith("/dev/") or os.path.normpath(path) != path:
        return b""
    try:
        status = os.stat(path)
    except (ValueError, OSError):
        return b""
    return b"%d:%d" % (os.major(status.st_rdev), os.minor(status.st_rdev))
