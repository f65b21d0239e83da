"""For monitors: alive, ready, and the numbers.  No token needed, nothing secret said."""

import time

from flask import Blueprint, Response, current_app, jsonify

from persona.problems import Fault, PersonaError
from persona_broker import metrics
from persona_broker.api.guests import state, store
from persona_broker.store.interface import StoreError

blueprint = Blueprint("health", __name__)


@blueprint.get("/healthz")
def healthz() -> Response:
    """Says that the process answers."""
    return jsonify(status="ok")


@blueprint.get("/readyz")
def readyz() -> Response:
    """Says whether decisions can be made: the database can be read.  ``failing`` names what else does not work."""
    try:
        view = state().current()
    except StoreError as error:
        raise PersonaError(Fault.NOT_READY, f"the database cannot be read: {error}") from None
    wrong = (["audit"] if metrics.is_audit_failing() else []) + [f"sink {name}" for name in metrics.failing_sinks()]
    counts = {"policies": len(view.snapshot.policies), "unreadable": len(view.snapshot.unreadable)}
    # 200 all the same: whoever asks decides whether to send guests here, and decisions can be made
    return jsonify(status="degraded" if wrong else "ready", failing=wrong, generation=view.generation, **counts)


@blueprint.get("/metrics")
def numbers() -> Response:
    """Shows the metrics as Prometheus text, of all workers of this broker whichever answers."""
    view, newest = state().current(), current_app.extensions["spread"].look(time.time())
    return Response(metrics.render(view, store().records_lost(), newest), content_type="text/plain; version=0.0.4")
