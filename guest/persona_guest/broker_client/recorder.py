"""Every decision on its way to the journal and to the broker's record, never in the way of an exec.

The loop appends to a bounded queue; a thread writes.  What does not fit is counted and the count is
sent: nothing is lost silently.
"""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from persona.codec import MAX_BODY, Record, encode_record
from persona_guest.broker_client.http import BrokerError, Connection
from persona_guest.settings import Broker

log = logging.getLogger("persona.record")

_QUEUE_MAX = 20_000
_BATCH = 200
_BATCH_SIZE = MAX_BODY // 2  # one more record, at its largest, still fits into the body
_INTERVAL_S = 0.5


# One that is there, or what makes it in the recorder's thread, where it may wait for others.
Recordable = Record | Callable[[], Record]


class Recorder:
    """``add`` from the loop's thread, all else in the recorder's own."""

    def __init__(self, settings: Broker, journal: Callable[[Record], None]) -> None:
        self._queue: deque[Recordable] = deque()
        self._lost = 0
        self._journal = journal
        self._unsent: list[dict[str, Any]] = []
        self._size = 0
        self._connection = Connection(settings)
        self._timeout = settings.timeout_s * 5
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def add(self, record: Recordable) -> None:
        """Takes a record; when 20,000 wait already, counts it as lost instead."""
        if len(self._queue) >= _QUEUE_MAX:
            self._lost += 1
        else:
            self._queue.append(record)

    def close(self) -> None:
        """One last try to send, at most a few seconds."""
        self._stop.set()
        self._thread.join(3)

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        while self._queue or self._unsent or self._lost:
            while self._queue and len(self._unsent) < _BATCH and self._size < _BATCH_SIZE:
                taken = self._queue.popleft()
                record = taken() if callable(taken) else taken
                self._journal(record)
                value = encode_record(record)
                self._size += len(json.dumps(value))  # a user chooses how long command lines are
                self._unsent.append(value)
            lost = self._lost
            body = {"records": self._unsent, "lost": lost}
            try:
                status, _ = self._connection.call("POST", "/v1/records", body, time.monotonic() + self._timeout)
            except BrokerError:
                return  # kept for the next round; the journal has them already
            if status != 204:
                # Refused, not unreachable: sending the same again would be refused for ever.
                log.error("the broker refused %d records: HTTP status %d", len(self._unsent), status)
                self._lost += len(self._unsent)
                self._sent()
                return
            self._lost -= lost
            self._sent()

    def _sent(self) -> None:
        self._unsent.clear()
        self._size = 0
