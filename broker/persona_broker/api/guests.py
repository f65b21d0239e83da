"""Who calls: every request bears a guest's token, and a guest may ask only about itself."""

import json
from collections.abc import Mapping
from typing import Any

from flask import current_app, request

from persona import codec, wire
from persona.codec import MAX_BODY
from persona.problems import Fault, PersonaError
from persona_broker.problems import GroupsChanged
from persona_broker.store.interface import Store
from persona_broker.store.sessions import hash_token
from persona_broker.view import State, View


def state() -> State:
    """This process's state."""
    found: State = current_app.extensions["state"]
    return found


def store() -> Store:
    """The database, to look things up and to write; whoever writes may have to wait."""
    found: Store = current_app.extensions["store"]
    return found


class Asked:
    """The newest generation that each guest has told this process it knows; health reports write it down."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._new: dict[str, int] = {}

    def note(self, guest: str, generation: int) -> None:
        """On the way of each decision: no lock, and nothing is written."""
        if generation > self._known.get(guest, 0):
            self._known[guest] = self._new[guest] = generation

    def write_down(self, store: Store, now: float) -> None:
        """What is new since the last time.  Raises ``StoreError``, and keeps it for the next time then."""
        new = dict(self._new)
        if new:
            store.put_asked(new, now)
        self._new = {guest: known for guest, known in self._new.items() if known != new.get(guest)}


def asked() -> Asked:
    """What guests said to this process."""
    found: Asked = current_app.extensions["asked"]
    return found


def guest() -> str:
    """The calling guest's name.  Raises ``PersonaError`` (unauthenticated)."""
    scheme, _, token = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    name = state().current().guests.get(hash_token(token)) if scheme == "Bearer" and token else None
    if name is None:
        raise PersonaError(Fault.UNAUTHENTICATED, "no guest has this token; 'persona-broker guest add NAME' makes one")
    return name


def wire_version() -> int:
    """The newest version of the protocol that both the caller and this broker know.  Raises ``PersonaError``."""
    return wire.common(request.environ.get("HTTP_PERSONA_WIRE"))


def own(vm: str, caller: str) -> None:
    """Raises ``PersonaError`` (not_your_vm) where a guest speaks of another."""
    if vm != caller:
        raise PersonaError(Fault.NOT_YOUR_VM, f"{caller} may ask only about itself, not about {vm[:64]!r}")


def chosen_by(value: Mapping[str, Any], view: View, vm: str) -> None:
    """Raises ``GroupsChanged`` where a guest chose its users' groups by a list that is not the view's.

    Without ``groups_in_use`` the groups that a guest names are all that there are.
    """
    if "groups_in_use" in value:
        groups = view.snapshot.groups_in_use(vm)
        if codec.tag(value["groups_in_use"], "groups_in_use") != groups.tag:
            raise GroupsChanged(groups, view.generation_for(vm))


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
