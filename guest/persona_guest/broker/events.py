"""The broker's push: one stream that says when leases end early.

While the stream is up the agent may reuse decisions; when it breaks, nothing new is leased until it
is back, because a revocation could not arrive.
"""

import http.client
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass

from persona import wire
from persona_guest.broker.http import BrokerError, Line, open_connection, read_token
from persona_guest.settings import Broker

_SILENCE_S = 12.0  # the broker beats every 5 s: two missed beats and the stream is dead
_LINE_MAX = 4096
_RETRY_S = (0.1, 0.2, 0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class Connected:
    """The stream is up."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The stream is down, and why."""

    detail: str


@dataclass(frozen=True, slots=True)
class Changed:
    """The state of policies and conditions is now ``generation``; ``session`` where it concerns one."""

    generation: int
    why: str
    session: str | None


Event = Connected | Lost | Changed


class Stream:
    """Follows ``/v1/events`` for ever in a thread of its own; ``deliver`` must be safe to call from it."""

    def __init__(self, settings: Broker, deliver: Callable[[Event], None]) -> None:
        self._settings = settings
        self._deliver = deliver
        self._line = Line()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="broker-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Asks the thread to end, and ends what it waits for."""
        self._stop.set()
        self._line.end()

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                self._follow()
                failures = 0
                detail = "the broker closed the stream"
            except (OSError, http.client.HTTPException, BrokerError, ValueError, RecursionError) as error:
                detail = str(error) or type(error).__name__
            except Exception as error:  # whatever a peer makes the library stumble over: the next stream may be whole
                detail = f"{type(error).__name__}: {error}"
            if self._stop.is_set():
                return
            self._deliver(Lost(detail))
            self._stop.wait(_RETRY_S[min(failures, len(_RETRY_S) - 1)])
            failures += 1

    def _follow(self) -> None:
        connection = open_connection(self._settings, self._settings.events_url, self._line, self._settings.timeout_s)
        try:
            headers = {
                "Authorization": "Bearer " + read_token(self._settings),
                wire.HEADER: str(wire.CURRENT),
            }
            connection.connect()
            stream = connection.sock  # http.client lets go of it where the peer will close
            connection.request("GET", "/v1/events", headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"events: HTTP status {response.status}")
            stream.settimeout(_SILENCE_S)
            first = True
            while not self._stop.is_set():
                line = response.readline(_LINE_MAX)
                if not line:
                    return
                event = _parse(line)
                if first:
                    self._deliver(Connected())
                    first = False
                self._deliver(event)
        finally:
            self._line.over()
            connection.close()


def _parse(line: bytes) -> Changed:
    if not line.endswith(b"\n"):
        raise ValueError("events: a line that is cut or too long")
    value = json.loads(line)
    if not isinstance(value, dict) or not isinstance(value.get("generation"), int):
        raise ValueError("events: a line without a generation")
    session = value.get("session")
    return Changed(value["generation"], str(value.get("why")), session if isinstance(session, str) else None)
