"""Questions to the broker from the agent's loop: a few threads, each with one kept connection.

The loop never waits: it posts a call and gets the result in its mailbox.  Users are served in turns.
Every call has a deadline from the moment it is posted, a queue that is full refuses at once, and after
a failure the link answers "unreachable" by itself for a moment, so that a dead broker costs one
timeout and not one a command.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from persona.problems import Reason
from persona_guest.broker_client.fair import FairQueue
from persona_guest.broker_client.http import BrokerError, Connection
from persona_guest.settings import Broker

_SHARE_MAX = 512  # questions of one user that wait
_QUEUE_MAX = 2048
_THREADS = 2
_PAUSE_S = 0.5  # after a failure, how long nobody is sent into the same timeout


@dataclass(frozen=True, slots=True)
class Answer:
    """What the broker said: HTTP status and JSON value."""

    status: int
    body: Any


Outcome = Answer | BrokerError
Done = Callable[[Outcome], None]


@dataclass(frozen=True, slots=True)
class _Call:
    method: str
    path: str
    body: object | None
    deadline: float
    done: Done


class Link:
    """``deliver`` runs a callable in the loop's thread; every ``done`` is called there, exactly once."""

    def __init__(self, settings: Broker, deliver: Callable[[Callable[[], None]], None]) -> None:
        self._settings = settings
        self._deliver = deliver
        self._calls: FairQueue[_Call | None] = FairQueue(_SHARE_MAX, _QUEUE_MAX)
        self._connections = [Connection(settings) for _ in range(_THREADS)]
        self._busy: dict[Connection, float] = {}
        self._pause_until = 0.0
        self._last_failure = BrokerError(Reason.BROKER_UNREACHABLE, "not asked yet")
        self._threads = [
            threading.Thread(target=self._work, args=(connection,), name="broker-link", daemon=True)
            for connection in self._connections
        ]
        for thread in self._threads:
            thread.start()

    def post(self, who: str, method: str, path: str, body: object | None, done: Done, *, urgent: bool = True) -> None:
        """Asks on behalf of user ``who``; ``done`` gets the outcome later.

        ``urgent`` calls fail at once while the broker is away.
        """
        now = time.monotonic()
        if urgent and now < self._pause_until:
            failure = self._last_failure
            self._deliver(lambda: done(failure))
            return
        timeout = self._settings.timeout_s * (1 if urgent else 5)
        if not self._calls.put(who, _Call(method, path, body, now + timeout, done)):
            overload = BrokerError(Reason.AGENT_OVERLOADED, "too many questions at once")
            self._deliver(lambda: done(overload))

    def reachable(self) -> None:
        """The event stream came up: ask again at once, and connect before somebody waits for it."""
        self._pause_until = 0.0
        for _ in self._connections:
            self.post("", "GET", "/healthz", None, lambda _outcome: None, urgent=False)

    def sweep(self, now: float) -> None:
        """Cuts calls that are past their deadline, which a dripping peer could stretch; call often."""
        for connection, deadline in list(self._busy.items()):
            if now > deadline + 0.05:
                connection.abort()

    def close(self) -> None:
        """Ends the threads; calls that wait are dropped."""
        for _ in self._threads:
            self._calls.put("", None)
        for connection in self._connections:
            connection.abort()

    def _work(self, connection: Connection) -> None:
        while True:
            call = self._calls.get()
            if call is None:
                connection.close()
                return
            outcome: Outcome
            if time.monotonic() >= call.deadline:
                outcome = BrokerError(Reason.BROKER_UNREACHABLE, "no answer in time")
            else:
                self._busy[connection] = call.deadline
                try:
                    outcome = Answer(*connection.call(call.method, call.path, call.body, call.deadline))
                except BrokerError as error:
                    outcome = error
                    self._last_failure = error
                    self._pause_until = time.monotonic() + _PAUSE_S
                finally:
                    self._busy.pop(connection, None)
            self._deliver(_bind(call.done, outcome))


def _bind(done: Done, outcome: Outcome) -> Callable[[], None]:
    return lambda: done(outcome)
