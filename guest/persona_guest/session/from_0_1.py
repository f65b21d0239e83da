"""Reads what an agent of 0.1.0 kept of a session, in three files, so that an upgrade takes open sessions up.

``sessions/ID.json`` is the session, ``places/ID.json`` where its processes live, ``bases.json`` the persona of each
session as a whole.
"""

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

from persona.decisions import PersonaRef
from persona_guest.core.reassignment import NO_PERSONA
from persona_guest.session.model import Admitted, Login, session_from_json
from persona_guest.session.placement import Placement

log = logging.getLogger("persona.agent")


def login(value: dict[str, Any], state: Path) -> Login:
    """The login of a session; ``value`` is what its own file has, the other files are in ``state``.

    Raises ``KeyError``, ``TypeError``.
    """
    session = session_from_json(value)
    persona = _default_persona(state / "bases.json", session.id)
    return Login(session, admitted=persona, placement=_placement(state / "places" / f"{session.id}.json"))


def _placement(path: Path) -> Placement | None:
    try:
        return Placement.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.error("%s: %s; its session is placed anew", path, error)
        return None


def _default_persona(path: Path, session_id: str) -> Admitted | None:
    try:
        _uid, name, version = json.loads(path.read_text())[session_id]
        ref = PersonaRef(str(name), int(version))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # until the broker says it, the user's own processes reach nothing
    return Admitted(None if ref == NO_PERSONA else ref, None)


def remove(state: Path) -> None:
    """Removes the files that are read no more, once every session was taken up.  Raises nothing."""
    for path in (state / "bases.json", *(state / "places").glob("*.json")):
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(OSError):
        (state / "places").rmdir()
