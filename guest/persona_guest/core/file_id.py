"""Which file something is, while that file exists: device and inode."""

import os
from typing import NamedTuple


class Image(NamedTuple):
    """The file of a program, as the kernel numbers it; ``device`` as os.makedev() makes it."""

    device: int
    inode: int

    @property
    def is_unique(self) -> bool:
        """Whether super block and inode number, which the kernel layer compares, say the same.

        On btrfs they do not: each subvolume, a user's own too, numbers its inodes from the beginning.
        """
        return os.major(self.device) != 0
