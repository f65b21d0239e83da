"""Which inode the kernel means by a descriptor: device of the super block and inode number, proc(5).

stat(2) says the same on most file systems.  btrfs and overlayfs give out device numbers that are on no
super block: those are recognised by their major number 0 and looked up.
"""

import contextlib
import os

from persona_guest.kernel.layer_abi import kernel_device


def kernel_image(fd: int, status: os.stat_result) -> tuple[int, int]:
    """(device, inode) of an open descriptor; what stat says where /proc knows no better."""
    if os.major(status.st_dev):
        return kernel_device(status.st_dev), status.st_ino
    fields: dict[str, str] = {}
    with open(f"/proc/self/fdinfo/{fd}") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            fields[key] = value.strip()
    device, inode = kernel_device(status.st_dev), status.st_ino
    if fields.get("ino", "").isdigit():  # Linux 5.14
        inode = int(fields["ino"])
    # the mount is one of the namespace that sessions live in; the agent's own has copies under other ids
    with contextlib.suppress(OSError, ValueError), open("/proc/1/mountinfo") as lines:
        for line in lines:
            words = line.split(" ", 3)
            if words[0] == fields.get("mnt_id"):
                major, _, minor = words[2].partition(":")
                device = int(major) << 20 | int(minor)
                break
    return device, inode
