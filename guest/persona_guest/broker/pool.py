"""Questions to the broker from the agent's loop: a few threads, each with one kept connection.

The loop never waits: it posts a call and gets the result in its mailbox.  Users are served in turns.
Every call has a deadline from the moment it is posted and is answered by then, even where it still waits
for a thread; a queue that is full refuses at once, and after a failure the link answers "unreachable" by
itself for a moment, so that a dead broker costs one timeout and not one a command.  What nobody waits for
has a thread of its own: it may be slow, and takes none from those who wait.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from persona.problems import Reason
from persona_guest.broker.fair_queue import FairQueue
from persona_guest.broker.http import Body, BrokerError, Connection, NotAsked
from persona_guest.settings import Broker

_SHARE_MAX = 512  # questions of one user that wait
_QUEUE_MAX = 2048
_URGENT_THREADS = 2
_PATIENT_TIMES = 5  # the timeout of what nobody waits for, in timeouts of what somebody does
_GRACE_S = 0.05  # a call that ends by itself at its deadline knows better why
_PAUSE_S = 0.5  # after a failure, how long nobody is sent into the same timeout


@dataclass(frozen=True, slots=True)
class Answer:
    """What the broker said: HTTP status and JSON value."""

    status: int
    body: Any


Outcome = Answer | BrokerError
Done = Callable[[Outcome], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    method: str
    path: str
    body: object | Body | None
    deadline: float
    urgent: bool
    done: Done


_Calls = FairQueue[_Call | None]


class Pool:
    """``deliver`` runs a callable in the loop's thread; every ``done`` is called there, exactly once.

    ``post``, ``reachable`` and ``sweep`` are that thread's as well.
    """

    def __init__(self, settings: Broker, deliver: Callable[[Callable[[], None]], None]) -> None:
        self._settings = settings
        self._deliver = deliver
        self._urgent: _Calls = FairQueue(_SHARE_MAX, _QUEUE_MAX)
        self._patient: _Calls = FairQueue(_SHARE_MAX, _QUEUE_MAX)
        self._unanswered: set[_Call] = set()  # the loop's thread alone looks at it
        self._busy: dict[Connection, _Call] = {}
        self._pause_until = 0.0
        self._last_failure = BrokerError(Reason.BROKER_UNREACHABLE, "not asked yet")
        served = [self._urgent] * _URGENT_THREADS + [self._patient]
        self._workers = [(Connection(settings), calls) for calls in served]
        for worker in self._workers:
            threading.Thread(target=self._work, args=worker, name="broker-link", daemon=True).start()

    def post(
        self, who: str, method: str, path: str, body: object | Body | None, done: Done, *, urgent: bool = True
    ) -> None:
        """Asks on behalf of user ``who``; ``done`` gets the outcome later.

        A ``body`` that is callable makes the body for the broker's version of the protocol, in another thread.
        ``urgent`` calls fail at once while the broker is away, and wait for no call that is not.
        """
        now = time.monotonic()
        if urgent and now < self._pause_until:
            failure = self._last_failure
            self._deliver(lambda: done(failure))
            return
        timeout = self._settings.timeout_s * (1 if urgent else _PATIENT_TIMES)
        call = _Call(method, path, body, now + timeout, urgent, done)
        self._unanswered.add(call)
        if not (self._urgent if urgent else self._patient).put(who, call):
            overload = BrokerError(Reason.AGENT_OVERLOADED, "too many questions at once")
            self._deliver(lambda: self._answer(call, overload))

    def reachable(self) -> None:
        """The event stream came up: ask again at once, and connect before somebody waits for it."""
        self._pause_until = 0.0
        for _ in range(_URGENT_THREADS):
            self.post("", "GET", "/healthz", None, lambda _outcome: None)

    def sweep(self, now: float) -> None:
        """Answers what is past its deadline, and cuts it where a dripping peer stretches it; call often."""
        for connection, call in list(self._busy.items()):
            if now > call.deadline + _GRACE_S:
                if call.urgent and call in self._unanswered:  # its thread may hang on for longer, in a name lookup
                    self._failed(_late())
                connection.cut_late(now - _GRACE_S)
        for call in [call for call in self._unanswered if now > call.deadline + _GRACE_S]:
            self._answer(call, _late())

    def close(self) -> None:
        """Ends the threads, soon; calls that wait are dropped."""
        for connection, calls in self._workers:
            calls.put("", None)
            connection.end()

    def _failed(self, error: BrokerError) -> None:
        self._last_failure = error
        self._pause_until = time.monotonic() + _PAUSE_S

    def _answer(self, call: _Call, outcome: Outcome) -> None:
        if call in self._unanswered:
            self._unanswered.remove(call)
            call.done(outcome)

    def _work(self, connection: Connection, calls: _Calls) -> None:
        while True:
            call = calls.get()
            if call is None:
                connection.end()
                connection.close()
                return
            outcome: Outcome
            if time.monotonic() >= call.deadline:
                outcome = _late()
            else:
                self._busy[connection] = call
                try:
                    outcome = Answer(*connection.call(call.method, call.path, call.body, call.deadline))
                except BrokerError as error:
                    outcome = error
                    if call.urgent and not isinstance(error, NotAsked):
                        self._failed(error)
                finally:
                    self._busy.pop(connection, None)
            self._deliver(self._bind(call, outcome))

    def _bind(self, call: _Call, outcome: Outcome) -> Callable[[], None]:
        return lambda: self._answer(call, outcome)


def _late() -> BrokerError:
    return BrokerError(Reason.BROKER_UNREACHABLE, "no answer in time")
