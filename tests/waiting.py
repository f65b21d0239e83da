"""Waits for what happens by itself."""

import time
from collections.abc import Callable


def until(holds: Callable[[], object], seconds: float = 60, every: float = 0.02) -> None:
    """Returns once ``holds`` answers something true; fails after so many seconds, which a busy machine may take."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(every)
