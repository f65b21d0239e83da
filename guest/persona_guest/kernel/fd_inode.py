"""Which inode the kernel means by a descriptor: device of the super block and inode number, proc(5).

stat(2) says the same on most file systems.  btrfs and overlayfs give out device numbers that are on no
super block: those are recognised by their major number 0 and looked up.
"""

import contextlib
import os

from persona_guest.core.kernel_text import decimal, lines, mounts


def kernel_image(fd: int, status: os.stat_result) -> tuple[int, int]:
    """(device, inode) of an open descriptor; what stat says where /proc knows no better."""
    if os.major(status.st_dev):
        return kernel_device(status.st_dev), status.st_ino
    fields: dict[bytes, int | None] = {}
    with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
        for line in lines(info.read()):
            key, _, value = line.partition(b":")
            fields[key] = decimal(value.strip(b"\t "))
    inode = fields.get(b"ino")  # Linux 5.14
    # the mount is one of the namespace that sessions live in; the agent's own has copies under other ids
    device = _device_of_mount(fields.get(b"mnt_id"))
    return (
        kernel_device(status.st_dev) if device is None else device,
        status.st_ino if inode is None else inode,
    )


def _device_of_mount(ident: int | None, mountinfo: str = "/proc/1/mountinfo") -> int | None:
    """The device of the file system at this mount; ``None`` where the kernel does not say."""
    with contextlib.suppress(OSError), open(mountinfo, "rb") as table:
        for mount in mounts(table.read()):
            if mount.ident == ident:
                major, minor = map(decimal, mount.device.partition(b":")[::2])
                return None if major is None or minor is None else major << 20 | minor
    return None


def kernel_device(st_dev: int) -> int:
    """The kernel's dev_t of a stat(2) device: 12 bits of major above 20 of minor (include/linux/kdev_t.h)."""
    major = (st_dev >> 8) & 0xFFF | (st_dev >> 32) & ~0xFFF
    minor = st_dev & 0xFF | (st_dev >> 12) & ~0xFF
    return (major << 20 | minor) & 0xFFFFFFFF
