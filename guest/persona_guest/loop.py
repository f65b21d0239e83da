"""The agent's event loop: epoll, timers, and a mailbox for other threads.

One thread runs every handler, so the state that handlers share needs no locks.  A handler must never
wait; what could wait goes to a thread and comes back through ``deliver``.
"""

import heapq
import itertools
import os
import select
import time
from collections import deque
from collections.abc import Callable

Handler = Callable[[int], None]

READABLE = select.EPOLLIN
GONE = select.EPOLLHUP | select.EPOLLERR
_TICK_MAX_S = 1.0


class Timer:
    """A call to come; ``cancel`` it when it is not wanted any more."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """The call will not be made."""
        self.call = None


class Loop:
    """``watch`` descriptors, ``call_later``, ``deliver`` from any thread, ``run`` until ``stop``."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._mail: deque[Callable[[], None]] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._running = True
        self.watch(self._bell, READABLE, self._collect)

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """Calls ``handler(events)`` when ``fd`` is ready, or hung up (which is always watched)."""
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def unwatch(self, fd: int) -> None:
        """Forgets ``fd``; call before closing it."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Calls once, after at least ``seconds``."""
        timer = Timer(call)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def call_every(self, seconds: float, call: Callable[[], None]) -> None:
        """Calls again and again, ``seconds`` after the last call ended."""

        def again() -> None:
            call()
            self.call_later(seconds, again)

        self.call_later(seconds, again)

    def deliver(self, call: Callable[[], None]) -> None:
        """Runs ``call`` in the loop's thread soon.  The only method that other threads may call."""
        self._mail.append(call)
        os.eventfd_write(self._bell, 1)

    def stop(self) -> None:
        """Ends ``run`` after the handlers of this round."""
        self._running = False

    def run(self) -> None:
        """Serves until ``stop``."""
        poll, handlers, timers = self._epoll.poll, self._handlers, self._timers
        while self._running:
            wait = _TICK_MAX_S
            if timers:
                wait = max(0.0, min(wait, timers[0][0] - time.monotonic()))
            for fd, events in poll(wait, 64):
                handler = handlers.get(fd)  # an earlier handler of this round may have closed it
                if handler is not None:
                    handler(events)
            if timers and timers[0][0] <= time.monotonic():
                self._fire()

    def _fire(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.call is not None:
                timer.call()

    def _collect(self, _events: int) -> None:
        os.eventfd_read(self._bell)
        while self._mail:
            self._mail.popleft()()
