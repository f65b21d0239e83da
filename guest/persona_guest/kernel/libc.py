"""The C library of this process, for calls that Python has no function for, and the error of one that failed."""

import ctypes
import os

LIBC = ctypes.CDLL(None, use_errno=True)


def failure(what: str = "") -> OSError:
    """What to raise for the call that has just failed in this thread; ``what`` names it."""
    number = ctypes.get_errno()
    text = os.strerror(number)
    return OSError(number, f"{what}: {text}" if what else text)
