"""A bounded queue in which everybody waits for their own questions only: taken in turns, one of each who has any."""

import threading
from collections import OrderedDict, deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """``put`` never waits; ``get`` waits for an item.  For any number of threads."""

    def __init__(self, share_max: int, total_max: int) -> None:
        self._share_max = share_max
        self._total_max = total_max
        self._waiting: OrderedDict[str, deque[Item]] = OrderedDict()
        self._total = 0
        self._changed = threading.Condition()

    def put(self, who: str, item: Item) -> bool:
        """Adds an item; false where its owner has ``share_max`` here already, or all together have ``total_max``."""
        with self._changed:
            share = self._waiting.get(who)
            if self._total >= self._total_max or (share is not None and len(share) >= self._share_max):
                return False
            if share is None:
                share = self._waiting[who] = deque()
            share.append(item)
            self._total += 1
            self._changed.notify()
            return True

    def get(self) -> Item:
        """The oldest item of whoever has waited longest for a turn."""
        with self._changed:
            while not self._waiting:
                self._changed.wait()
            who, share = self._waiting.popitem(last=False)
            item = share.popleft()
            self._total -= 1
            if share:
                self._waiting[who] = share  # to the end of the line
            return item
