"""Every decision on its way to the journal and to the broker's record, never in the way of an exec.

The loop appends to a bounded queue; a thread writes, to the journal first.  What does not fit while the broker is away
(one session has a quarter of the room) is counted and the count is sent: nothing is lost silently.
"""

import http
import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from persona.codec import MAX_BODY, Record, encode_record
from persona_guest.broker.http import BrokerError, Connection
from persona_guest.settings import Broker

log = logging.getLogger("persona.record")

_QUEUE_MAX = 20_000
_SHARE_MAX = _QUEUE_MAX // 4  # of one session, while the broker takes none
_BATCH = 200
_BATCH_SIZE = MAX_BODY // 2  # one more record, at its largest, still fits into the body
_INTERVAL_S = 0.5
# What is wrong with the records and not with the moment: sending the same again would be refused for ever.
_REFUSALS = (
    http.HTTPStatus.BAD_REQUEST,
    http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    http.HTTPStatus.UNPROCESSABLE_ENTITY,
)
_LAST_TRY_S = 3.0
_END_S = 2.0  # of systemd's TimeoutStopSec=10s


# One that is there, or what makes it in the recorder's thread, where it may wait for others.
Recordable = Record | Callable[[], Record]


class Recorder:
    """``add`` from the loop's thread, all else in the recorder's own.

    Every record is in the journal within a moment, also while the broker is away.
    """

    def __init__(self, settings: Broker, journal: Callable[[Record], None]) -> None:
        self._queue: deque[Recordable] = deque()  # from the loop to the journal
        self._waiting: deque[Record] = deque()  # in the journal, not yet in a batch
        self._waiting_of: Counter[str] = Counter()  # the same by session
        self._batch: list[Record] = []
        self._part = _BATCH  # how many of the batch are sent at once
        self._size = 0
        self._dropped = 0  # the loop's thread alone writes it
        self._unkept = 0  # from here on the recorder's: no room while the broker took none
        self._refused = 0
        self._told = 0
        self._unwilling = 0  # the HTTP status with which the broker took nothing, for whatever reason of its own
        self._journal = journal
        self._connection = Connection(settings)
        self._timeout = settings.timeout_s * 5
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def add(self, record: Recordable) -> None:
        """Takes a record; when 20,000 wait for the journal already, counts it as lost instead."""
        if len(self._queue) >= _QUEUE_MAX:
            self._dropped += 1
        else:
            self._queue.append(record)

    def close(self) -> None:
        """One last try to send, for a few seconds at most; afterwards the journal has every record that was added."""
        self._stop.set()
        self._thread.join(_LAST_TRY_S)
        self._connection.end()
        self._thread.join(_END_S)
        if self._thread.is_alive():  # in the journal, or in a look-up of a name
            log.error("the recorder hangs; %d records may be in no journal", len(self._queue))
            return
        self._write_down()
        unsent = len(self._batch) + len(self._waiting)
        if unsent:
            log.warning("%d records were not sent to the broker; the journal has them", unsent)

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self._flush()
        self._flush()

    def _write_down(self) -> None:
        while self._queue:
            taken = self._queue.popleft()
            record = taken() if callable(taken) else taken
            self._journal(record)
            if len(self._waiting) >= _QUEUE_MAX or self._waiting_of[record.session] >= _SHARE_MAX:
                self._unkept += 1
            else:
                self._waiting.append(record)
                self._waiting_of[record.session] += 1

    def _flush(self) -> None:
        self._write_down()
        while self._waiting or self._batch or self._lost():
            while self._waiting and len(self._batch) < _BATCH and self._size < _BATCH_SIZE:
                record = self._waiting.popleft()
                self._waiting_of[record.session] -= 1
                if not self._waiting_of[record.session]:
                    del self._waiting_of[record.session]
                self._size += len(json.dumps(encode_record(record)))  # a user chooses how long command lines are
                self._batch.append(record)
            part, lost = self._batch[: self._part], self._lost()
            try:
                status, answer = self._send(part, lost)
            except BrokerError:
                return  # kept for the next round
            if status in (200, 204):
                self._unwilling = 0
                self._told += lost
                self._count_refused(answer)
            elif status not in _REFUSALS:
                if status != self._unwilling:
                    log.error("the broker takes no records now: HTTP status %d", status)
                self._unwilling = status
                return  # kept for the next round
            elif len(part) > 1:
                self._part = len(part) // 2  # to find the one that it refuses all for
                continue
            else:
                log.error("the broker refused a record: HTTP status %d", status)
                self._refused += len(part)
            self._sent(part)
            self._write_down()
            if status in _REFUSALS and not part:
                return  # it does not even take the number of those that are lost

    def _lost(self) -> int:
        """How many the broker has still to be told of that it will never get."""
        return self._dropped + self._unkept + self._refused - self._told

    def _send(self, part: list[Record], lost: int) -> tuple[int, Any]:
        """Raises ``BrokerError``."""

        def body(version: int) -> dict[str, Any]:
            return {"records": [encode_record(record, version) for record in part], "lost": lost}

        return self._connection.call("POST", "/v1/records", body, time.monotonic() + self._timeout)

    def _count_refused(self, answer: Any) -> None:
        """Counts the records that the broker names as those which it cannot keep."""
        refused = answer.get("refused") if isinstance(answer, dict) else None
        if isinstance(refused, list) and refused:
            log.error("the broker refused %d records: %s", len(refused), json.dumps(refused[0])[:300])
            self._refused += min(len(refused), _BATCH)

    def _sent(self, part: list[Record]) -> None:
        del self._batch[: len(part)]
        self._part = min(_BATCH, 2 * self._part)
        if not self._batch:
            self._size = 0
