"""What applies to running sessions now: how guests learn that processes have to follow."""

from typing import Any

from flask import Blueprint, Response, jsonify

from persona import codec
from persona.decisions import Subject
from persona.problems import Fault, PersonaError
from persona_broker.api.guests import body, guest, state, store
from persona_broker.state import View

blueprint = Blueprint("current", __name__)

SESSIONS_MAX = 500


@blueprint.post("/v1/sessions/current")
def current() -> Response:
    """Of each session that is known here and this guest's: the policies that hold, in order, and their personas."""
    name = guest()
    value = codec.mapping(body(), "", ("sessions",), ("min_generation",))
    wanted = codec.strings(value["sessions"], "sessions", SESSIONS_MAX, 64)
    generation = codec.integer(value.get("min_generation", 0), "min_generation")
    view = state().current(generation)
    if view.generation < generation:
        raise PersonaError(Fault.NOT_READY, f"generation {generation} is not here, the newest is {view.generation}")
    by_subject: dict[Subject, dict[str, Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    for ident in wanted:
        session = store().session(ident)
        if session is None or session.guest != name:
            continue
        revoked = ident in view.revoked
        if session.subject not in by_subject:
            by_subject[session.subject] = _applies(session.subject, view)
        found[ident] = {"revoked": revoked, **(_NOTHING if revoked else by_subject[session.subject])}
    return jsonify(generation=view.generation, sessions=found)


_NOTHING: dict[str, Any] = {"personas": [], "others": []}


def _applies(subject: Subject, view: View) -> dict[str, Any]:
    """What holds, and what may hold next: a guest has those documents before it needs them."""
    holding, others = [], []
    for entry in view.snapshot.entries(subject, view.outlook):
        if entry.versioned is None:
            continue
        ref = {"name": entry.versioned.ref.name, "version": entry.versioned.ref.version}
        if entry.unmet is None:
            commands = [pattern.text for pattern in entry.policy.commands.patterns]
            holding.append({**ref, "policy": entry.policy.name, "commands": commands})
        elif ref not in others:
            others.append(ref)
    return {"personas": holding, "others": others}
