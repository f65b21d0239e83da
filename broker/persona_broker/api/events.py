"""The push: one line when something changed, one every few seconds so that silence means a dead stream."""

import json
import logging
import time
from collections import deque
from collections.abc import Iterator
from functools import partial

from flask import Blueprint, Response, current_app, request

from persona.problems import Fault, PersonaError
from persona_broker import metrics
from persona_broker.api.guests import guest
from persona_broker.condition_watcher import Watcher
from persona_broker.lasting import let_last
from persona_broker.store.interface import StoreError
from persona_broker.view import State

log = logging.getLogger("persona.events")

blueprint = Blueprint("events", __name__)

BEAT_S = 5.0
_TOLD_EVERY_S = 15.0  # that a stream is still open is written down
STREAMS_MAX = 500  # each holds a thread of this process, which does nothing else
STREAMS_OF_GUEST = 4  # an agent has one; after a cut its old one may not have ended yet


class Streams:
    """The open streams of this process: of each guest the newest few, so that none can take them all."""

    def __init__(self, watcher: Watcher, state: State) -> None:
        self._watcher = watcher
        self._state = state
        self._open: dict[str, deque[object]] = {}
        self._ending = False

    def open(self, guest: str) -> object:
        """A new stream; the guest's oldest ends where it is one too many.  Raises ``PersonaError`` (overloaded)."""
        stream = object()
        with self._watcher.changed:
            mine = self._open.setdefault(guest, deque(maxlen=STREAMS_OF_GUEST))
            if len(mine) < STREAMS_OF_GUEST and self._count() >= STREAMS_MAX:
                raise PersonaError(Fault.OVERLOADED, f"{STREAMS_MAX} streams are open already")
            mine.append(stream)
            metrics.streams(self._count())
            self._watcher.changed.notify_all()
        return stream

    def close(self, guest: str, stream: object) -> None:
        """It is gone, or was ended by a newer one before."""
        with self._watcher.changed:
            mine = self._open.get(guest, deque())
            if stream in mine:
                mine.remove(stream)
            if not mine:
                self._open.pop(guest, None)
            metrics.streams(self._count())

    def end(self) -> None:
        """All of them, soon: the process stops."""
        self._ending = True
        with self._watcher.changed:
            self._watcher.changed.notify_all()

    def lines(self, guest: str, stream: object) -> Iterator[bytes]:
        """JSON lines for as long as the guest listens, is registered and has no newer streams."""
        seen, why, told, told_at = self._generation_for(guest), "hello", -1, 0.0
        while not self._ending and stream in self._open.get(guest, ()) and self._registered(guest):
            yield json.dumps({"generation": seen, "why": why}).encode() + b"\n"
            with self._watcher.changed:
                if told != seen or time.monotonic() - told_at >= _TOLD_EVERY_S:  # the line is on its way
                    self._watcher.told[guest] = told = seen
                    told_at = time.monotonic()
                self._watcher.changed.wait_for(partial(self._is_news, guest, stream, seen), BEAT_S)
                newest = self._watcher.generation_for(guest)
                why = "beat" if newest == seen else "changed"
                seen = newest

    def _generation_for(self, guest: str) -> int:
        with self._watcher.changed:
            return self._watcher.generation_for(guest)

    def _is_news(self, guest: str, stream: object, seen: int) -> bool:
        """Whether this guest's stream must send something or end.  A change for other guests only does not count."""
        over = self._ending or stream not in self._open.get(guest, ())
        return over or self._watcher.generation_for(guest) != seen

    def _registered(self, guest: str) -> bool:
        try:
            return guest in self._state.current().guests.values()
        except StoreError as error:
            log.error("a stream ends, the database cannot be used: %s", error)
            return False

    def _count(self) -> int:
        return sum(map(len, self._open.values()))


@blueprint.get("/v1/events")
def events() -> Response:
    """Streams a line to the calling guest whenever something changed, and every few seconds."""
    name = guest()
    streams: Streams = current_app.extensions["streams"]
    let_last(request.environ["gunicorn.socket"])
    stream = streams.open(name)
    response = Response(streams.lines(name, stream), content_type="application/x-ndjson")
    response.call_on_close(lambda: streams.close(name, stream))
    return response
