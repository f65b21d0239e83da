"""Calls that may never return, each in a thread of its own, waited for only so long."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class TookTooLongError(Exception):
    """It did not return in time; its thread goes on, and ends when the call does."""


class _Outcome(Generic[T]):
    """What a call came to, once ``done``."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.value: list[T] = []
        self.error: BaseException | None = None


class TimeLimit:
    """For one thread to call; ``late`` counts the calls that have not returned yet."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._late: list[threading.Thread] = []

    @property
    def late(self) -> int:
        """How many calls were given up and still hang."""
        self._late = [thread for thread in self._late if thread.is_alive()]
        return len(self._late)

    def call(self, what: Callable[[], T], limit_s: float) -> T:
        """What ``what`` returns or raises.  Raises ``TookTooLongError``."""
        outcome: _Outcome[T] = _Outcome()
        thread = threading.Thread(target=_run, args=(what, outcome), name=self._name, daemon=True)
        thread.start()
        if not outcome.done.wait(limit_s):
            self._late.append(thread)
            raise TookTooLongError(f"no answer within {limit_s:g} s")
        thread.join()
        if outcome.error is not None:
            raise outcome.error
        return outcome.value[0]


def _run(what: Callable[[], T], outcome: _Outcome[T]) -> None:
    try:
        outcome.value.append(what())
    except Exception as error:
        outcome.error = error
    finally:
        outcome.done.set()
