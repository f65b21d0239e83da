"""Sends what is in the spool to the broker, oldest first, and forgets what the broker says that it keeps.

A thread of its own: while it waits for the broker, records go on into journal and spool.
"""

import http
import json
import logging
import random
import threading
import time
from enum import Enum
from typing import Any

from persona import wire
from persona.codec import MAX_BODY
from persona.record_codec import encode_stream, record_for
from persona_guest.audit.entries import REFUSED, Batch
from persona_guest.audit.spool import Spool
from persona_guest.broker.http import BrokerError, Connection
from persona_guest.settings import Broker

log = logging.getLogger("persona.record")

_BATCH = 200
_BATCH_SIZE = MAX_BODY // 2  # one more record, at its largest, still fits into the body
_PER_SECOND = 1000  # records, on the average: a broker that comes back has other guests' to take too
_AWAY_S = (0.5, 8.0)  # between two tries: at first, and at the longest
# What is wrong with the records and not with the moment: sending the same again would be refused for ever.
_REFUSALS = (
    http.HTTPStatus.BAD_REQUEST,
    http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    http.HTTPStatus.UNPROCESSABLE_ENTITY,
)


class _Round(Enum):
    SENT = "sent"
    EMPTY = "empty"
    AWAY = "away"


class Sender:
    """``wake`` when there is something new; ``finish`` ends it."""

    def __init__(self, settings: Broker, spool: Spool) -> None:
        self._spool = spool
        self._connection = Connection(settings)
        self._timeout = settings.timeout_s * 5
        self._part = _BATCH  # how many are sent at once
        self._unwilling = 0  # the HTTP status with which the broker took nothing, for whatever reason of its own
        self._new = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="record-sender", daemon=True)

    def start(self) -> None:
        """Begins; the spool is open by now."""
        self._thread.start()

    def wake(self) -> None:
        """There is something new to send."""
        self._new.set()

    def finish(self, seconds: float) -> bool:
        """One last try, for so long; returns whether the thread has ended, which it does within a moment."""
        self._ending.set()
        self._new.set()
        if self._thread.ident is not None:
            self._thread.join(seconds)
            self._connection.end()
            self._thread.join(2.0)
        return not self._thread.is_alive()

    def _run(self) -> None:
        away_s = 0.0
        while True:
            self._new.clear()
            began = time.monotonic()
            done = self._round()
            if self._ending.is_set():
                if done is not _Round.SENT:
                    return
            elif done is _Round.SENT:
                away_s = 0.0
                self._ending.wait(max(time.monotonic() - began, self._sent / _PER_SECOND))
            elif done is _Round.EMPTY:
                self._new.wait()
            else:  # all guests of a broker that comes back must not meet there at once
                away_s = min(max(_AWAY_S[0], 2 * away_s), _AWAY_S[1])
                self._ending.wait(away_s * random.uniform(0.5, 1.0))  # noqa: S311 - no secret

    def _round(self) -> _Round:
        """Sends one batch."""
        self._sent = 0
        batch = self._spool.batch(self._part, _BATCH_SIZE)
        if batch is None:
            return _Round.EMPTY
        try:
            status, answer = self._send(batch)
        except BrokerError:
            self._spool.put_back()
            return _Round.AWAY
        if status in _REFUSALS and len(batch.entries) > 1:
            self._part = len(batch.entries) // 2  # to find the one that it refuses all for
            self._spool.put_back()
            return _Round.SENT
        if status in _REFUSALS:
            log.error("the broker refused a record: HTTP status %d", status)
            self._refused(batch, {0})
        elif status not in (200, 204):
            if status != self._unwilling:
                log.error("the broker takes no records now: HTTP status %d", status)
            self._unwilling = status
            self._spool.put_back()
            return _Round.AWAY
        else:
            self._unwilling = 0
            self._refused(batch, _named(answer))
        self._spool.sent(batch)
        self._sent = len(batch.entries)
        self._part = min(_BATCH, 2 * self._part)
        return _Round.SENT

    def _send(self, batch: Batch) -> tuple[int, Any]:
        """Raises ``BrokerError``."""

        def body(version: int) -> dict[str, Any]:
            values = [entry.value for entry in batch.entries]
            if version > wire.FIRST:
                return {
                    "stream": encode_stream(batch.stream),
                    "records": [record_for(value, version) for value in values],
                    "lost": 0,  # markers say it
                }
            records = [record_for(value, version) for value in values if "lost" not in value]
            return {"records": records, "lost": sum(_count(value["lost"]) for value in values if "lost" in value)}

        return self._connection.call("POST", "/v1/records", body, time.monotonic() + self._timeout)

    def _refused(self, batch: Batch, indexes: set[int]) -> None:
        """Marks what the broker cannot keep as lost; a marker that it cannot keep is told by no other."""
        for index in sorted(indexes):
            if index < len(batch.entries) and "lost" not in batch.entries[index].value:
                number = batch.entries[index].number
                if batch.stream == self._spool.stream:
                    self._spool.lose(number, number, REFUSED)
                else:  # of a boot before: its numbers are not this agent's to go on with
                    log.error("record %d of boot %s is lost: the broker refused it", number, batch.stream.boot)


def _named(answer: Any) -> set[int]:
    """The indexes of the records that the broker names as those which it cannot keep."""
    refused = answer.get("refused") if isinstance(answer, dict) else None
    if not isinstance(refused, list) or not refused:
        return set()
    log.error("the broker refused %d records: %s", len(refused), json.dumps(refused[0])[:300])
    return {item["index"] for item in refused if isinstance(item, dict) and type(item.get("index")) is int}


def _count(lost: Any) -> int:
    """How many records a marker is about; it was read from a file."""
    if isinstance(lost, dict) and type(lost.get("first")) is int and type(lost.get("last")) is int:
        return max(0, int(lost["last"]) - int(lost["first"]) + 1)
    return 0
