"""Errors over HTTP: RFC 9457 problem documents with our stable codes."""

from http import HTTPStatus
from typing import Any

from flask import Flask, Response, jsonify
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from persona.codec import GroupsInUse, encode_groups_in_use
from persona.problems import Fault, PersonaError, Reason
from persona_broker.store.interface import StoreError

_STATUS: dict[Reason | Fault, HTTPStatus] = {
    Fault.BAD_REQUEST: HTTPStatus.BAD_REQUEST,
    Fault.BAD_DOCUMENT: HTTPStatus.UNPROCESSABLE_ENTITY,
    Fault.TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Fault.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    Fault.NOT_YOUR_VM: HTTPStatus.FORBIDDEN,
    Fault.NOT_FOUND: HTTPStatus.NOT_FOUND,
    Fault.CONFLICT: HTTPStatus.CONFLICT,
    Fault.GROUPS_CHANGED: HTTPStatus.CONFLICT,
    Fault.NOT_READY: HTTPStatus.SERVICE_UNAVAILABLE,
    Fault.OVERLOADED: HTTPStatus.SERVICE_UNAVAILABLE,
}
_CODE = {413: Fault.TOO_LARGE, 404: Fault.NOT_FOUND, 401: Fault.UNAUTHENTICATED, 405: Fault.BAD_REQUEST}


class GroupsChanged(PersonaError):
    """A guest chose its users' groups by another list than this one; it asks again by this one."""

    def __init__(self, groups: GroupsInUse, generation: int) -> None:
        super().__init__(Fault.GROUPS_CHANGED, "policies name other groups by now; ask again by this list")
        self.groups = groups
        self.generation = generation


def problem(status: int, code: str, detail: str, **more: Any) -> Response:
    """One problem document; ``more`` are members of its own (RFC 9457, 3.2)."""
    response = jsonify(
        type="about:blank", title=HTTPStatus(status).phrase, status=status, code=str(code), detail=detail, **more
    )
    response.status_code = status
    response.content_type = "application/problem+json"
    return response


def register(app: Flask) -> None:
    """Every error of the app becomes a problem; what is not ours says nothing of the inside."""

    def ours(error: PersonaError) -> Response:
        status = _STATUS.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR)
        more: dict[str, Any] = {}
        if isinstance(error, GroupsChanged):
            more = {"groups_in_use": encode_groups_in_use(error.groups), "generation": error.generation}
        response = problem(status, error.code, error.message, **more)
        if error.code is Fault.UNAUTHENTICATED:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response

    def record(error: StoreError) -> Response:
        app.logger.error("the database cannot be used: %s", error)
        return problem(503, Fault.NOT_READY, "the broker's record cannot be used; its log says why")

    def http(error: HTTPException) -> Response:
        status = error.code or 500
        response = problem(status, _CODE.get(status, Fault.BAD_REQUEST), error.description or "")
        if isinstance(error, MethodNotAllowed) and error.valid_methods:
            response.allow.update(error.valid_methods)
        return response

    def unexpected(error: Exception) -> Response:
        app.logger.exception("unexpected error", exc_info=error)
        return problem(500, Fault.INTERNAL, "the broker failed; its log says why")

    app.register_error_handler(PersonaError, ours)
    app.register_error_handler(StoreError, record)
    app.register_error_handler(HTTPException, http)
    app.register_error_handler(Exception, unexpected)
