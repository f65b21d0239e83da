"""Coroutines over functions that call back: what takes several answers reads from top to bottom.

There is no event loop here.  A coroutine goes on in whatever thread calls back, which in the agent is the loop's.
"""

from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Begin = Callable[[Callable[[T], None]], None]


class FromCallback(Generic[T]):
    """What a function calls back with: ``await FromCallback(begin)``.

    ``begin`` is called with a function that takes the answer, once, now or later.
    """

    def __init__(self, begin: Begin[T]) -> None:
        self._begin = begin

    def __await__(self) -> Generator[Begin[T], T, T]:
        return (yield self._begin)


def run(coroutine: Coroutine[Begin[Any], Any, T], done: Callable[[T], None]) -> None:
    """Runs ``coroutine`` until it waits, and on with each answer; ``done`` gets what it returns.

    What it raises goes to whoever called last: ``run``'s caller, or the one that called back.
    """

    def go_on(answer: Any = None) -> None:
        try:
            begin = coroutine.send(answer)
        except StopIteration as end:
            done(end.value)
            return
        begin(go_on)

    go_on()
