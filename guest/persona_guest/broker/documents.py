"""The persona documents that this machine works by: fetched once, immutable, kept over restarts, bounded.

Whoever is granted something under a persona waits for its document, with the deadline of the question to the broker;
where it cannot be had, that is denied.  An agent of an older version may have kept a document without fields that it
did not know: it is fetched anew, and is used until then, since it allows no more than the whole.
"""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from persona import wire
from persona.canonical import to_mapping
from persona.decisions import Decision, Denied, Granted, Lease, PersonaRef, Width
from persona.documents import Persona, parse_document
from persona.problems import PersonaError, Reason
from persona.schema import NAME
from persona_guest import files
from persona_guest.core.reassignment import NO_PERSONA, NO_PERSONA_DOCUMENT

log = logging.getLogger("persona.agent")

_KEPT_MAX = 256  # in memory; and twice as many on disk
_NAME = re.compile(NAME)
_SIZE_MAX = 1 << 20

Fetched = Callable[[Any | Denied], None]


class Personas:
    """``fetch`` asks the broker for one version and calls back with its JSON, or why there is none."""

    def __init__(self, directory: Path, fetch: Callable[[PersonaRef, Fetched], None]) -> None:
        self._directory = directory
        self._fetch = fetch
        self._kept: dict[PersonaRef, Persona] = {}
        self._partial: set[PersonaRef] = set()  # of those, what an older version of this agent fetched
        self._waiting: dict[PersonaRef, list[Callable[[Denied | None], None]]] = {}
        files.clear_unfinished(directory)

    def get(self, ref: PersonaRef) -> Persona:
        """The document, where it is here; that of ``NO_PERSONA`` always is.

        Raises ``PersonaError`` (persona_unavailable).
        """
        if ref == NO_PERSONA:
            return NO_PERSONA_DOCUMENT
        persona = self._kept.get(ref) or self._load(ref)
        if persona is None:
            raise PersonaError(Reason.PERSONA_UNAVAILABLE, f"persona {ref.name} v{ref.version} is not here")
        return persona

    def ensure(self, ref: PersonaRef, done: Callable[[Denied | None], None]) -> None:
        """Calls ``done(None)`` once the document is here, at once if it is; else ``done`` with why it cannot be had."""
        if (ref in self._kept or self._load(ref) is not None) and ref not in self._partial:
            done(None)
            return
        waiting = self._waiting.get(ref)
        if waiting is not None:
            waiting.append(done)
            return
        self._waiting[ref] = [done]
        if not _NAME.match(ref.name):
            self._received(ref, _unavailable(ref, "that is not a valid name of a persona"))
        else:
            self._fetch(ref, lambda answer: self._received(ref, answer))

    def backed(self, decision: Decision, done: Callable[[Decision], None]) -> None:
        """Calls ``done`` with a grant once its persona's document is here, with a denial where it cannot be had."""
        if not isinstance(decision, Granted):
            done(decision)
            return
        self.ensure(decision.persona, lambda denied: done(decision if denied is None else denied))

    def _received(self, ref: PersonaRef, answer: Any | Denied) -> None:
        denied = answer if isinstance(answer, Denied) else None
        if denied is None:
            try:
                self._keep(ref, _read(ref, answer))
            except PersonaError as error:
                denied = _unavailable(ref, error.message)
        if denied is not None and ref in self._kept:
            log.warning("persona %s v%d stays as an older agent knew it: %s", ref.name, ref.version, denied.help)
            denied = None
        for done in self._waiting.pop(ref, ()):
            done(denied)

    def _keep(self, ref: PersonaRef, persona: Persona) -> None:
        self._remember(ref, persona)
        self._partial.discard(ref)
        value = {"version": ref.version, "document": to_mapping(persona), "wire": wire.CURRENT}
        try:
            files.write(self._path(ref), json.dumps(value))
            self._prune()
        except OSError as error:  # a full disk: until the next restart memory will do
            log.error("the document of persona %s v%d is in memory only: %s", ref.name, ref.version, error)

    def _remember(self, ref: PersonaRef, persona: Persona) -> None:
        while len(self._kept) >= _KEPT_MAX:
            gone = next(iter(self._kept))
            del self._kept[gone]
            self._partial.discard(gone)
        self._kept[ref] = persona

    def _load(self, ref: PersonaRef) -> Persona | None:
        if not _NAME.match(ref.name):
            return None
        try:
            with open(self._path(ref), "rb") as file:
                value = json.loads(file.read(_SIZE_MAX))
            persona = _read(ref, value)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError, PersonaError) as error:
            log.error("%s: %s; it is fetched anew", self._path(ref), error)
            return None
        self._remember(ref, persona)
        if value.get("wire") != wire.CURRENT:
            self._partial.add(ref)
        return persona

    def _prune(self) -> None:
        files = list(self._directory.iterdir())
        if len(files) > 2 * _KEPT_MAX:
            files.sort(key=lambda file: file.stat().st_mtime)
            for file in files[: len(files) - _KEPT_MAX]:
                file.unlink(missing_ok=True)

    def _path(self, ref: PersonaRef) -> Path:
        return self._directory / f"{ref.name}.{ref.version}.json"


def _read(ref: PersonaRef, value: Any) -> Persona:
    """Raises ``PersonaError`` for anything but this version of this persona."""
    if not isinstance(value, dict) or value.get("version") != ref.version:
        raise PersonaError(Reason.PERSONA_UNAVAILABLE, "the broker sent something else")
    document = parse_document(value.get("document"), accepted=True)
    if not isinstance(document, Persona) or document.name != ref.name:
        raise PersonaError(Reason.PERSONA_UNAVAILABLE, "the broker sent another document")
    return document


def _unavailable(ref: PersonaRef, why: str) -> Denied:
    help_ = f"the document of persona {ref.name} v{ref.version} cannot be had: {why}"
    return Denied(Reason.PERSONA_UNAVAILABLE, persona=ref.name, help=help_, lease=Lease(0.0, Width.ARGV))
