"""Personas and policies as they are applied, and the schema that they follow."""

from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Response, jsonify

from persona import wire
from persona.canonical import to_mapping
from persona.documents import Document, Persona, Policy
from persona.problems import Fault, PersonaError
from persona.schema import SCHEMA
from persona_broker.api.guests import guest, store, wire_version
from persona_broker.policy.unreadable import Unreadable

blueprint = Blueprint("documents", __name__)


def _show(document: Document, version: int, told: int) -> dict[str, Any] | wire.Unsuited:
    """A document as the caller, of version ``told`` of the protocol, can read it."""
    mapping: Mapping[str, Any] = to_mapping(document)
    if isinstance(document, Persona):
        reduced = wire.persona_for(mapping, told)
        if isinstance(reduced, wire.Unsuited):
            return reduced
        mapping = reduced
    return {"version": version, "document": mapping}


def _applied(kind: type[Document]) -> Response:
    guest()
    told = wire_version()
    shown, unreadable = [], []
    for document, version in store().documents():
        if isinstance(document, Unreadable):
            if document.kind == kind.__name__:
                unreadable.append({"name": document.name, "version": version, "problem": document.problem})
        elif type(document) is kind:
            item = _show(document, version, told)
            if isinstance(item, wire.Unsuited):
                unreadable.append({"name": document.name, "version": version, "problem": item.problem})
            else:
                shown.append(item)
    return jsonify(items=shown, unreadable=unreadable)


def _one(kind: str, name: str, version: int | None) -> Response:
    guest()
    found = store().version(kind, name, version)
    if found is None:
        raise PersonaError(Fault.NOT_FOUND, f"no {kind.lower()} of this name and version is stored")
    number, document = found
    if isinstance(document, Unreadable):
        raise PersonaError(Fault.BAD_DOCUMENT, str(document))
    shown = _show(document, number, wire_version())
    if isinstance(shown, wire.Unsuited):
        raise PersonaError(Fault.BAD_DOCUMENT, f"{kind} {name} (version {number}): {shown.problem}")
    return jsonify(shown)


@blueprint.get("/v1/personas")
def personas() -> Response:
    """Lists the personas that are applied."""
    return _applied(Persona)


@blueprint.get("/v1/personas/<name>")
@blueprint.get("/v1/personas/<name>/versions/<int:version>")
def persona(name: str, version: int | None = None) -> Response:
    """Shows a persona: its newest version, or the one that is named."""
    return _one("Persona", name, version)


@blueprint.get("/v1/policies")
def policies() -> Response:
    """Lists the policies that are applied, in order."""
    return _applied(Policy)


@blueprint.get("/v1/policies/<name>")
def policy(name: str) -> Response:
    """Shows the newest version of a policy."""
    return _one("Policy", name, None)


@blueprint.get("/v1/schema")
def schema() -> Response:
    """Shows the JSON Schema of the documents; public."""
    return jsonify(SCHEMA)
