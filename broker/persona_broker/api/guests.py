"""Who calls: every request bears a guest's token, and a guest may ask only about itself."""

import json
from typing import Any

from flask import current_app, request

from persona.codec import MAX_BODY
from persona.problems import Fault, PersonaError
from persona_broker.state import State
from persona_broker.store.sqlite import Store, hash_token


def state() -> State:
    """This process's state."""
    found: State = current_app.extensions["state"]
    return found


def store() -> Store:
    """The record, to look things up and to write; whoever writes may have to wait."""
    found: Store = current_app.extensions["store"]
    return found


def guest() -> str:
    """The calling guest's name.  Raises ``PersonaError`` (unauthenticated)."""
    scheme, _, token = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    name = state().current().guests.get(hash_token(token)) if scheme == "Bearer" and token else None
    if name is None:
        raise PersonaError(Fault.UNAUTHENTICATED, "no guest has this token; 'persona-broker guest add NAME' makes one")
    return name


def own(vm: str, caller: str) -> None:
    """Raises ``PersonaError`` (not_your_vm) where a guest speaks of another."""
    if vm != caller:
        raise PersonaError(Fault.NOT_YOUR_VM, f"{caller} may ask only about itself, not about {vm[:64]!r}")


def body() -> Any:
    """The request's JSON.  Raises ``PersonaError`` (bad_request, too_large)."""
    environ = request.environ  # and no properties of the request: they cost more than the decision
    if environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() != "application/json":
        raise PersonaError(Fault.BAD_REQUEST, "expected content type application/json")
    length = environ.get("CONTENT_LENGTH")
    if length is None:  # in chunks; older werkzeug then has no bound, newer ends at it in silence
        data = b""
        while len(data) <= MAX_BODY and (block := request.stream.read(MAX_BODY + 1 - len(data))):
            data += block
    else:
        data = environ["wsgi.input"].read(min(int(length), MAX_BODY + 1))
    if len(data) > MAX_BODY:
        raise PersonaError(Fault.TOO_LARGE, f"at most {MAX_BODY} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PersonaError(Fault.BAD_REQUEST, f"not JSON: {error}") from None
