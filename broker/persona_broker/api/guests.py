"""Who calls: every request bears a guest's token, and a guest may ask only about itself."""

import json
from typing import Any

from flask import current_app, request

from persona.codec import MAX_BODY
from persona.problems import Fault, PersonaError
from persona_broker.state import State, View
from persona_broker.store.sqlite import hash_token


def state() -> State:
    """This process's state."""
    found: State = current_app.extensions["persona"]
    return found


def guest() -> str:
    """The calling guest's name.  Raises ``PersonaError`` (unauthenticated)."""
    return caller()[0]


def caller() -> tuple[str, View]:
    """The calling guest's name, and the view to answer it from.  Raises ``PersonaError`` (unauthenticated)."""
    view = state().current()
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    name = view.guests.get(hash_token(token)) if scheme == "Bearer" and token else None
    if name is None:
        raise PersonaError(Fault.UNAUTHENTICATED, "no guest has this token; 'persona-broker guest add NAME' makes one")
    return name, view


def own(vm: str, caller: str) -> None:
    """Raises ``PersonaError`` (not_your_vm) where a guest speaks of another."""
    if vm != caller:
        raise PersonaError(Fault.NOT_YOUR_VM, f"{caller} may ask only about itself, not about {vm[:64]!r}")


def body() -> Any:
    """The request's JSON.  Raises ``PersonaError`` (bad_request, too_large)."""
    if request.mimetype != "application/json":
        raise PersonaError(Fault.BAD_REQUEST, "expected content type application/json")
    # read by hand: a body in chunks names no length, and older werkzeug then has no bound
    data = b""
    while len(data) <= MAX_BODY and (request.content_length or 0) <= MAX_BODY:
        block = request.stream.read(MAX_BODY + 1 - len(data))
        if not block:
            break
        data += block
    else:
        raise PersonaError(Fault.TOO_LARGE, f"at most {MAX_BODY} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PersonaError(Fault.BAD_REQUEST, f"not JSON: {error}") from None
