"""The push: one line when something changed, one every few seconds so that silence means a dead stream."""

import json
import threading
from collections.abc import Iterator

from flask import Blueprint, Response, current_app

from persona.problems import Fault, PersonaError
from persona_broker.api.guests import guest
from persona_broker.watcher import Watcher

blueprint = Blueprint("events", __name__)

BEAT_S = 5.0
STREAMS_MAX = 500  # each holds a thread of this process, which does nothing else
_streams = threading.BoundedSemaphore(STREAMS_MAX)


@blueprint.get("/v1/events")
def events() -> Response:
    """JSON lines for as long as the guest listens."""
    guest()
    watcher: Watcher = current_app.extensions["watcher"]
    if not _streams.acquire(blocking=False):
        raise PersonaError(Fault.OVERLOADED, f"{STREAMS_MAX} streams are open already")
    response = Response(_lines(watcher), content_type="application/x-ndjson")
    response.call_on_close(_streams.release)
    return response


def _lines(watcher: Watcher) -> Iterator[bytes]:
    seen, why = watcher.generation, "hello"
    while True:
        yield json.dumps({"generation": seen, "why": why}).encode() + b"\n"
        with watcher.changed:
            if watcher.generation == seen:
                watcher.changed.wait(BEAT_S)
            why = "beat" if watcher.generation == seen else "changed"
            seen = watcher.generation
