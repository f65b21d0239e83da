"""One line onto the terminal or pipe that a task has as its standard error, without trusting either.

The user chooses what descriptor 2 is.  It is duplicated (never opened by path), must be writable for
the user themselves, must be a terminal or a pipe, and is written through a non-blocking description of
our own, so that a stopped terminal or a full pipe cannot stop the agent.
"""

import contextlib
import fcntl
import os
import stat
import termios

from persona_guest.kernel.task import duplicate_descriptor


def tell(pid: int, line: str) -> bool:
    """Writes ``line`` to the stderr of process ``pid``; false where that is not possible or not safe."""
    try:
        copy = duplicate_descriptor(pid, 2)
    except OSError:
        return False
    try:
        if fcntl.fcntl(copy, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            return False
        terminal = os.isatty(copy)
        if not terminal and not stat.S_ISFIFO(os.fstat(copy).st_mode):
            return False
        # A new description of the same file: O_NONBLOCK on the shared one would change the user's.
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        out = os.open(f"/proc/self/fd/{copy}", flags)
        try:
            end = b"\r\n" if terminal and not _adds_carriage_returns(out) else b"\n"
            return os.write(out, line.encode("utf-8", "replace") + end) > 0
        finally:
            os.close(out)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):  # the user's own file system may say what it likes
            os.close(copy)


def _adds_carriage_returns(terminal: int) -> bool:
    """Whether a newline moves its cursor to the left by itself: not where a program has it in raw mode, termios(3)."""
    try:
        flags = termios.tcgetattr(terminal)[1]
    except termios.error:
        return False
    return bool(flags & termios.OPOST and flags & termios.ONLCR)
