"""What a test goes over, where that must be something: a loop over nothing asserts nothing, and passes."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def some(items: Iterable[T]) -> list[T]:
    """All of them, in their order; where there is none, the test fails."""
    found = list(items)
    if not found:
        raise AssertionError("there is nothing here to be checked: the test would pass whatever the code does")
    return found
