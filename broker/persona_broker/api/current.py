"""What applies to running sessions now: how guests learn that processes have to follow."""

from dataclasses import replace
from typing import Any

from flask import Blueprint, Response, jsonify

from persona import codec, json_fields, wire
from persona.decisions import Subject
from persona.problems import Fault, PersonaError
from persona_broker.api.guests import asked, body, chosen_by, guest, state, store, wire_version
from persona_broker.view import View

blueprint = Blueprint("current", __name__)

SESSIONS_MAX = 500


@blueprint.post("/v1/sessions/current")
def current() -> Response:
    """Tells for each session of the guest's which policies hold now, in order, and their personas.

    A session that is not known here, or not this guest's, is left out.  ``groups`` has the groups of its user
    that are named now; else they are those of when it opened.
    """
    name, version = guest(), wire_version()
    value = json_fields.mapping(body(), "", ("sessions",), ("min_generation", "groups", "groups_in_use"))
    wanted = json_fields.strings(value["sessions"], "sessions", SESSIONS_MAX, 64)
    named = _groups(value.get("groups", {}))
    generation = json_fields.integer(value.get("min_generation", 0), "min_generation")
    view = state().current(generation)
    if view.generation < generation:
        raise PersonaError(Fault.NOT_READY, f"generation {generation} is not here, the newest is {view.generation}")
    asked().note(name, generation)
    chosen_by(value, view, name)
    by_subject: dict[Subject, dict[str, Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    for ident in wanted:
        session = store().session(ident)
        if session is None or session.guest != name:
            continue
        revoked = ident in view.revoked
        subject = replace(session.subject, groups=named.get(ident, session.subject.groups))
        if subject not in by_subject:
            by_subject[subject] = _applies(subject, view, version)
        found[ident] = {"revoked": revoked, **(_NOTHING if revoked else by_subject[subject])}
        if revoked and ident in view.ending and version > wire.FIRST:  # 0.1.0 would refuse the whole answer
            found[ident]["end"] = True  # and it does as the persona's on_revoke says
    return jsonify(generation=view.generation_for(name), sessions=found)


_NOTHING: dict[str, Any] = {"personas": [], "others": []}


def _groups(value: object) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, dict) or len(value) > SESSIONS_MAX:
        raise json_fields.CodecError("groups", f"expected an object with at most {SESSIONS_MAX} sessions")
    return {ident: codec.groups(names, f"groups.{ident[:64]}") for ident, names in value.items()}


def _applies(subject: Subject, view: View, version: int) -> dict[str, Any]:
    """What holds, and what may hold next: a guest has those documents before it needs them.

    Guests know no policy without a persona.  What one that cannot be read keeps from later ones is carved
    out of their commands; where it carves something out itself, that too is kept from them here.  So is what
    an older guest cannot read of a policy's commands; nothing comes after commands of which it can read nothing.
    """
    holding, others = [], []
    hidden: list[str] = []
    for entry in view.snapshot.for_wire(version).entries(subject, view.condition_state):
        if entry.hides:
            spoken = wire.patterns_for(
                (f"!{pattern.text}" for pattern in entry.policy.commands.patterns if not pattern.negative), version
            )
            if isinstance(spoken, wire.Unsuited):
                break
            hidden += spoken.texts
        if entry.versioned is None:
            continue
        ref = {"name": entry.versioned.ref.name, "version": entry.versioned.ref.version}
        if entry.unmet is None:
            readable = wire.patterns_for((pattern.text for pattern in entry.policy.commands.patterns), version)
            if isinstance(readable, wire.Unsuited):
                break
            holding.append({**ref, "policy": entry.policy.name, "commands": [*readable.texts, *hidden]})
            hidden += readable.left_out
        elif ref not in others:
            others.append(ref)
    return {"personas": holding, "others": others}
