"""The line that an interactive login begins with: which persona applies, and how much was denied lately."""

import time

from persona_guest.core.denials import Book
from persona_guest.session.model import Session
from persona_guest.session.registry import Registry
from persona_guest.settings import Mode, Settings

_LATELY_S = 86400.0


class Greeting:
    """Reads what the agent knows of a session; asks nobody."""

    def __init__(self, settings: Settings, registry: Registry, denials: Book) -> None:
        self._settings = settings
        self._registry = registry
        self._denials = denials

    def line(self, session: Session, reader: int) -> str | None:
        """The line, without a newline; ``None`` where the operator switched it off.

        What was denied is told to the session's own user only: ``reader`` is the uid of who reads it.
        """
        if not self._settings.gate.greeting:
            return None
        login = self._registry.get(session.id)
        persona = login.default_persona if login is not None else None
        now = f"{persona.name} v{persona.version}" if persona else "none right now"
        mode = "" if self._settings.mode is Mode.ENFORCE else " (complain mode: nothing is stopped)"
        denied = self._denials.since(reader, time.time() - _LATELY_S) if reader == session.uid else 0
        lately = f" ({denied} in the last day)" if denied else ""
        return (
            f"persona: {now} on {self._settings.vm.name}{mode}; 'persona list' shows what you may run, "
            f"'persona denials' what was refused{lately}"
        )
