"""Decisions, admissions and sessions: what guests ask."""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flask import Blueprint, Response, jsonify

from persona import codec, json_fields, wire
from persona.canonical import to_mapping
from persona.decisions import Decision, Denied, Lease, Subject, Width
from persona.problems import Fault, PersonaError, Reason
from persona.sets import by_set
from persona_broker import metrics
from persona_broker.api.guests import asked, body, chosen_by, guest, own, state, store, wire_version
from persona_broker.policy.snapshot import Entry
from persona_broker.store.interface import SessionRow
from persona_broker.store.sessions import SESSIONS_KEPT
from persona_broker.view import View

blueprint = Blueprint("decisions", __name__)


@blueprint.post("/v1/decisions")
def decide() -> Response:
    """Decides whether one program may start, and under which persona."""
    started = time.perf_counter()
    name, version = guest(), wire_version()
    value = json_fields.mapping(body(), "", ("request",), ("min_generation", "explain", "groups_in_use"))
    request = codec.decode_request(value["request"])
    explain = json_fields.boolean(value.get("explain", False), "explain")
    own(request.subject.vm, name)
    view = _current(value, name)
    chosen_by(value, view, name)
    decision: Decision
    if name in view.quarantined:
        decision = _quarantined(name, view)
    elif request.session in view.revoked:
        help_ = "an operator revoked this session"
        decision = Denied(Reason.SESSION_REVOKED, help=help_, lease=_RETRY, generation=view.generation_for(name))
    else:
        decision = view.snapshot.for_wire(version).decide(request, view.condition_state)
    if not explain:  # a question, not a program start
        metrics.decided(decision, time.perf_counter() - started)
    return Response(json.dumps(codec.encode_decision(decision, version)), content_type="application/json")


_RETRY = Lease(30.0, Width.ARGV)


def _quarantined(vm: str, view: View) -> Denied:
    """Who was removed or revoked since the backup may be among those that it brought back: nobody is let in."""
    help_ = f"the broker was restored from a backup; an operator lets {vm} in again by 'persona-broker guest readmit'"
    return Denied(Reason.GUEST_QUARANTINED, help=help_, lease=_RETRY, generation=view.generation_for(vm))


def _current(value: Mapping[str, Any], name: str) -> View:
    """What to answer a guest from: nothing older than what it has been told.  Raises ``PersonaError``."""
    wanted = json_fields.integer(value.get("min_generation", 0), "min_generation")
    view = state().current(wanted)
    asked().note(name, wanted)
    if view.generation < wanted:
        raise PersonaError(Fault.NOT_READY, f"generation {wanted} is not here, the newest is {view.generation}")
    return view


@blueprint.post("/v1/admissions")
def admit() -> Response:
    """Says whether a user may log in; opens nothing."""
    return _admission(opening=False)


@blueprint.post("/v1/sessions")
def open_session() -> Response:
    """Says whether a user may log in; where they may, their session exists from now on."""
    return _admission(opening=True)


_OPTIONAL = ("min_generation", "groups_in_use")


def _admission(*, opening: bool) -> Response:
    name, version = guest(), wire_version()
    value = json_fields.mapping(body(), "", ("session", "subject", "service", "remote"), _OPTIONAL)
    subject = codec.decode_subject(value["subject"])
    ident = json_fields.string(value["session"], "session", 64)
    service, remote = (json_fields.string(value[field], field) for field in ("service", "remote"))
    own(subject.vm, name)
    view = _current(value, name)
    chosen_by(value, view, name)
    if name in view.quarantined:
        return jsonify(admitted=False, denied=codec.encode_decision(_quarantined(name, view), version))
    admission = view.snapshot.for_wire(version).admit(subject, view.condition_state)
    metrics.admitted(admission.admitted)
    if not admission.admitted:
        denied = Denied(
            Reason.NO_MATCHING_POLICY,
            help=f"no policy names {subject.user} on {subject.vm}; ask its operator for one",
            generation=view.generation_for(name),
        )
        return jsonify(admitted=False, denied=codec.encode_decision(denied, version))
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
        generation=view.generation_for(name),
    )
    answer.status_code = 201 if opening else 200
    return answer


@blueprint.post("/v1/sessions/open")
def open_sessions() -> tuple[str, int]:
    """Takes the list of all sessions that a guest has: its others, of which it could not say so, are over."""
    name = guest()
    value = json_fields.mapping(body(), "", ("sessions",))
    alive = json_fields.strings(value["sessions"], "sessions", SESSIONS_KEPT, 64)
    store().end_all_but(name, alive, time.time() - _OPENING_S)
    return "", 204


_OPENING_S = 60.0  # one that is younger may have been opened after the guest made its list


@blueprint.delete("/v1/sessions/<ident>")
def end_session(ident: str) -> tuple[str, int]:
    """Takes note that a session is over."""
    if not store().end_session(ident, guest()):
        raise PersonaError(Fault.NOT_FOUND, "no such session of this guest")
    return "", 204


@blueprint.get("/v1/sessions/<ident>/personas")
def entries(ident: str) -> Response:
    """Lists all policies for the user of a session, with their personas; by the groups named when it opened."""
    return _entries(_session(ident, guest()).subject, state().current())


@blueprint.post("/v1/sessions/<ident>/personas")
def entries_by_groups(ident: str) -> Response:
    """Lists all policies for the user of a session, by the groups that the guest names now.

    Since the session opened policies may name others.
    """
    name = guest()
    value = json_fields.mapping(body(), "", ("groups",), _OPTIONAL)
    groups = codec.groups(value["groups"], "groups")
    view = _current(value, name)
    chosen_by(value, view, name)
    return _entries(replace(_session(ident, name).subject, groups=groups), view)


def _session(ident: str, guest: str) -> SessionRow:
    session = store().session(ident)
    if session is None or session.guest != guest:
        raise PersonaError(Fault.NOT_FOUND, "no such session of this guest")
    return session


def _entries(subject: Subject, view: View) -> Response:
    version = wire_version()
    found = view.snapshot.for_wire(version).entries(subject, view.condition_state)
    return jsonify(generation=view.generation_for(subject.vm), entries=[_entry(entry, version) for entry in found])


def _entry(entry: Entry, version: int) -> dict[str, Any]:
    wrong = entry.flaw or entry.unmet
    sets = {"sets": by_set(entry.versioned.persona) if entry.versioned else {}} if version > wire.FIRST else {}
    return {
        "policy": entry.policy.name,
        "commands": [pattern.text for pattern in entry.policy.commands.patterns],
        "persona": wire.persona_for(to_mapping(entry.versioned.persona), version) if entry.versioned else None,
        "version": entry.versioned.version if entry.versioned else None,
        "holds": entry.holds,
        "reason": wire.reason_for(wrong.reason, version) if wrong else None,
        "detail": wrong.detail if wrong else "",
        **sets,  # 0.1.0 would refuse the whole answer
    }
