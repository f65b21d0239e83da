"""What guests report of their own health, and of nobody else's: the token says whose it is."""

import time

from flask import Blueprint

from persona.health import decode_report
from persona_broker.api.guests import asked, body, guest, state, store
from persona_broker.policy.vm_health import bounds_of

blueprint = Blueprint("reports", __name__)


@blueprint.post("/v1/health")
def health() -> tuple[str, int]:
    """Keeps the calling guest's report of its own health, as of now by the broker's clock."""
    name = guest()
    report = decode_report(body())
    store().put_report(name, report, bounds_of(state().current().snapshot.vm_conditions), time.time())
    asked().write_down(store(), time.time())
    return "", 204
