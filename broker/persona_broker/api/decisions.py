"""Decisions, admissions, sessions and records: what guests ask and tell."""

import json
import time
from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Response, jsonify

from persona import codec
from persona.decisions import Decision, Denied, Lease, Width
from persona.documents import to_mapping
from persona.problems import Fault, PersonaError, Reason
from persona_broker import metrics
from persona_broker.api.guests import body, guest, own, state, store
from persona_broker.policy.engine import Entry
from persona_broker.state import View
from persona_broker.store.sqlite import SessionRow

blueprint = Blueprint("decisions", __name__)


@blueprint.post("/v1/decisions")
def decide() -> Response:
    """One program start."""
    started = time.perf_counter()
    name = guest()
    value = codec.mapping(body(), "", ("request",), ("min_generation", "explain"))
    request = codec.decode_request(value["request"])
    explain = codec.boolean(value.get("explain", False), "explain")
    own(request.subject.vm, name)
    view = _current(value)
    decision: Decision
    if request.session in view.revoked:
        help_ = "an operator revoked this session"
        decision = Denied(Reason.SESSION_REVOKED, help=help_, lease=_RETRY, generation=view.generation)
    else:
        decision = view.snapshot.decide(request, view.outlook)
    if not explain:  # a question, not a program start
        metrics.decided(decision, time.perf_counter() - started)
    return Response(json.dumps(codec.encode_decision(decision)), content_type="application/json")


_RETRY = Lease(30.0, Width.ARGV)


def _current(value: Mapping[str, Any]) -> View:
    """What to answer from: nothing older than what the guest has been told.  Raises ``PersonaError``."""
    wanted = codec.integer(value.get("min_generation", 0), "min_generation")
    view = state().current(wanted)
    if view.generation < wanted:
        raise PersonaError(Fault.NOT_READY, f"generation {wanted} is not here, the newest is {view.generation}")
    return view


@blueprint.post("/v1/admissions")
def admit() -> Response:
    """May this user log in?"""
    return _admission(opening=False)


@blueprint.post("/v1/sessions")
def open_session() -> Response:
    """The same, and the session exists from now on."""
    return _admission(opening=True)


def _admission(*, opening: bool) -> Response:
    name = guest()
    value = codec.mapping(body(), "", ("session", "subject", "service", "remote"), ("min_generation",))
    subject = codec.decode_subject(value["subject"])
    ident = codec.string(value["session"], "session", 64)
    service, remote = (codec.string(value[field], field) for field in ("service", "remote"))
    own(subject.vm, name)
    view = _current(value)
    admission = view.snapshot.admit(subject, view.outlook)
    metrics.admitted(admission.admitted)
    if not admission.admitted:
        denied = Denied(
            Reason.NO_MATCHING_POLICY,
            help=f"no policy names {subject.user} on {subject.vm}; ask its operator for one",
            generation=view.generation,
        )
        return jsonify(admitted=False, denied=codec.encode_decision(denied))
    if opening:
        row = SessionRow(ident, name, subject, service, remote, time.time(), revoked=False)
        if not store().open_session(row):
            raise PersonaError(Fault.CONFLICT, "another guest has a session of that name")
    entry = admission.entry
    ref = entry.versioned.ref if entry and entry.versioned else None
    answer = jsonify(
        admitted=True,
        session=ident,
        persona={"name": ref.name, "version": ref.version} if ref else None,
        policy=entry.policy.name if entry else None,
        generation=view.generation,
    )
    answer.status_code = 201 if opening else 200
    return answer


@blueprint.delete("/v1/sessions/<ident>")
def end_session(ident: str) -> tuple[str, int]:
    """A session is over."""
    if not store().end_session(ident, guest()):
        raise PersonaError(Fault.NOT_FOUND, "no such session of this guest")
    return "", 204


@blueprint.get("/v1/sessions/<ident>/personas")
def entries(ident: str) -> Response:
    """Everything that the user of a session can get, in policy order."""
    name, view = guest(), state().current()
    session = store().session(ident)
    if session is None or session.guest != name:
        raise PersonaError(Fault.NOT_FOUND, "no such session of this guest")
    found = view.snapshot.entries(session.subject, view.outlook)
    return jsonify(generation=view.generation, entries=[_entry(entry) for entry in found])


def _entry(entry: Entry) -> dict[str, Any]:
    reason = entry.unmet.reason if entry.unmet else None
    if entry.versioned is None:
        reason = Reason.INVALID_PERSONA
    return {
        "policy": entry.policy.name,
        "commands": [pattern.text for pattern in entry.policy.commands.patterns],
        "persona": to_mapping(entry.versioned.persona) if entry.versioned else None,
        "version": entry.versioned.version if entry.versioned else None,
        "holds": reason is None,
        "reason": reason,
        "detail": entry.unmet.detail if entry.unmet else "",
    }


@blueprint.post("/v1/records")
def records() -> tuple[str, int]:
    """What a guest decided and saw."""
    name = guest()
    value = codec.mapping(body(), "", ("records", "lost"))
    items = value["records"]
    if not isinstance(items, list) or len(items) > codec.MAX_RECORDS:
        raise PersonaError(Fault.BAD_REQUEST, f"records: expected a list of at most {codec.MAX_RECORDS}")
    parsed = [codec.decode_record(item, f"records[{index}]") for index, item in enumerate(items)]
    store().add_records(name, parsed, codec.integer(value["lost"], "lost"))
    return "", 204
