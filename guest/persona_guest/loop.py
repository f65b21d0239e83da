"""The agent's event loop: epoll, timers, and a mailbox for other threads.

One thread runs every handler, so the state that handlers share needs no locks.  A handler must never
wait; what could wait goes to a thread and comes back through ``call_soon_threadsafe``.
"""

import heapq
import itertools
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

Handler = Callable[[int], None]
log = logging.getLogger("persona.agent")

READABLE = select.EPOLLIN
GONE = select.EPOLLHUP | select.EPOLLERR
_TICK_MAX_S = 1.0
_POLL_S = 0.02  # what run_until waits for may come about outside of the loop


class Timer:
    """A call to come; ``cancel`` it when it is not wanted any more."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """The call will not be made."""
        self.call = None


class Loop:
    """Waits for descriptors (``add_reader``), timers (``call_later``) and other threads (``call_soon_threadsafe``)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` tells the seconds by which timers go."""
        self._clock = clock
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._fresh: set[int] = set()  # watched since the round began
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._mail: deque[Callable[[], None]] = deque()
        self._bell_lock = threading.RLock()  # a signal handler may ring while this thread does
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._running = True
        self.add_reader(self._bell, READABLE, self._collect)

    def add_reader(self, fd: int, events: int, handler: Handler) -> None:
        """Calls ``handler(events)`` when ``fd`` is ready, or hung up (which is always watched).

        Raises ``OSError`` where the kernel has no room for it.
        """
        self._epoll.register(fd, events)
        self._handlers[fd] = handler
        self._fresh.add(fd)

    def remove_reader(self, fd: int) -> None:
        """Forgets ``fd``; call before closing it."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Calls once, after at least ``seconds``."""
        timer = Timer(call)
        heapq.heappush(self._timers, (self._clock() + seconds, next(self._order), timer))
        return timer

    def call_every(self, seconds: float, call: Callable[[], None]) -> None:
        """Calls again and again, ``seconds`` after the last call ended.

        Where one fails for want of a descriptor or of space (``OSError``), the next may not.
        """

        def again() -> None:
            try:
                call()
            except OSError as error:
                log.error("%s", error)
            self.call_later(seconds, again)

        self.call_later(seconds, again)

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        """Runs ``call`` in the loop's thread soon.  The only method that other threads may call.

        Once the loop is closed it does nothing: the bell's number may be another descriptor's by then.
        """
        with self._bell_lock:
            if self._bell >= 0:
                self._mail.append(call)
                os.eventfd_write(self._bell, 1)

    def stop(self) -> None:
        """Ends ``run`` after the handlers of this round."""
        self._running = False

    def run(self) -> None:
        """Serves until ``stop``; may be called again after that."""
        while self._running:
            self._turn(_TICK_MAX_S)
        self._running = True

    def run_until(self, done: Callable[[], object], seconds: float) -> None:
        """Serves until ``done()`` is true; it is asked after each round.  Raises ``TimeoutError`` after ``seconds``."""
        over = self._clock() + seconds
        while not done():
            left = over - self._clock()
            if left <= 0:
                raise TimeoutError(f"not done within {seconds} s of the loop's time")
            self._turn(min(left, _POLL_S))

    def close(self) -> None:
        """Gives its own descriptors back and forgets all calls; what was watched is its owners' to close."""
        self._handlers.clear()
        self._timers.clear()
        self._mail.clear()
        self._epoll.close()
        with self._bell_lock:
            os.close(self._bell)
            self._bell = -1

    def _turn(self, wait: float) -> None:
        """One round: waits until something is ready or a timer is due, at most so long, and calls the handlers."""
        timers = self._timers
        if timers:
            wait = max(0.0, min(wait, timers[0][0] - self._clock()))
        ready = self._epoll.poll(wait, 64)
        self._fresh.clear()
        for fd, events in ready:
            # an earlier handler of this round may have closed it, and another descriptor may have its number now:
            # what that one has to tell, the next round tells
            handler = self._handlers.get(fd)
            if handler is not None and fd not in self._fresh:
                handler(events)
        if timers and timers[0][0] <= self._clock():
            self._fire()

    def _fire(self) -> None:
        now = self._clock()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.call is not None:
                timer.call()

    def _collect(self, _events: int) -> None:
        os.eventfd_read(self._bell)
        while self._mail:
            self._mail.popleft()()
