"""Personas and policies as they are applied, and the schema that they follow."""

from typing import Any

from flask import Blueprint, Response, jsonify

from persona.documents import Document, Persona, Policy, to_mapping
from persona.problems import Fault, PersonaError
from persona.schema import SCHEMA
from persona_broker.api.guests import guest, store

blueprint = Blueprint("documents", __name__)


def _show(document: Document, version: int) -> dict[str, Any]:
    return {"version": version, "document": to_mapping(document)}


def _applied(kind: type[Document]) -> Response:
    guest()
    shown = [_show(document, version) for document, version in store().documents() if type(document) is kind]
    return jsonify(items=shown)


def _one(kind: str, name: str, version: int | None) -> Response:
    guest()
    for number, document in reversed(store().versions(kind, name)):
        if version in (None, number):
            return jsonify(_show(document, number))
    raise PersonaError(Fault.NOT_FOUND, f"there is no such {kind.lower()}")


@blueprint.get("/v1/personas")
def personas() -> Response:
    """All that are applied."""
    return _applied(Persona)


@blueprint.get("/v1/personas/<name>")
@blueprint.get("/v1/personas/<name>/versions/<int:version>")
def persona(name: str, version: int | None = None) -> Response:
    """The newest version, or one."""
    return _one("Persona", name, version)


@blueprint.get("/v1/policies")
def policies() -> Response:
    """All that are applied, in order."""
    return _applied(Policy)


@blueprint.get("/v1/policies/<name>")
def policy(name: str) -> Response:
    """The newest version."""
    return _one("Policy", name, None)


@blueprint.get("/v1/schema")
def schema() -> Response:
    """The JSON Schema of the documents; public."""
    return jsonify(SCHEMA)
