"""Writes a file whole or not at all: whoever reads it meets the old text or the new one, never a part.

Every file that the agent keeps is written by ``write``.  On a full disk the old file stays as it was.
"""

import contextlib
import os
from pathlib import Path

NEW = ".new"  # what a file is called until it is complete; one that an agent left behind is nobody's


def write(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Puts ``text`` in place of what is at ``path``; makes the directory where there is none.

    Does not wait for the disk: all that is kept is written anew, or asked for anew, after a loss of power.
    Raises ``OSError`` that names ``path``, and leaves nothing behind.
    """
    new = path.with_name(path.name + NEW)
    try:
        fd = _create(new, mode)
        try:
            os.fchmod(fd, mode)  # one from before may have had another, and so may the umask
            left = memoryview(text.encode())
            while left:
                left = left[os.write(fd, left) :]
        finally:
            os.close(fd)
        os.replace(new, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # its space is wanted for the next try
            os.unlink(new)
        raise OSError(error.errno, error.strerror, str(path)) from error


def clear_unfinished(directory: Path) -> None:
    """Removes what an agent that was killed while it wrote left in ``directory``.  Raises nothing."""
    with contextlib.suppress(OSError):
        for path in directory.glob("*" + NEW):
            path.unlink(missing_ok=True)


def _create(path: Path, mode: int) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags, mode)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, flags, mode)
