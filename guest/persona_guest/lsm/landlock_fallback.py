"""What bounds a session where the kernel layer is missing and guest.toml says so: Landlock, whatever is raced.

It binds a session for as long as it lives and cannot follow a persona, so it knows directories, not personas.
Decision 0010 says what it costs, and why it is not the default.
"""

import logging

from persona_guest.kernel import landlock
from persona_guest.lsm.layer import KernelLayer
from persona_guest.settings import Mode, Settings

log = logging.getLogger("persona.kernel")


class Fallback:
    """Says whether a session that opens is bound by Landlock, and to which directories."""

    def __init__(self, settings: Settings, kernel_layer: KernelLayer) -> None:
        self._kernel_layer = kernel_layer
        self._directories = settings.gate.landlock_execute if settings.mode is Mode.ENFORCE else ()
        self._usable = bool(self._directories) and landlock.is_usable()
        if self._directories and not self._usable:
            log.error("guest.toml has gate.landlock_execute, and this kernel no Landlock of Linux 5.19 or later")

    @property
    def missing(self) -> bool:
        """Whether a session that opens now would have to be bound, and this kernel cannot."""
        return bool(self._directories) and not self._usable and not self._kernel_layer.layer.active

    @property
    def active(self) -> bool:
        """Whether a session that opens now is bound.  Safe to call from any thread."""
        return self._usable and not self._kernel_layer.layer.active

    def layers(self) -> dict[str, bool]:
        """Whether it is active, where it is asked for."""
        return {"landlock": self.active} if self._directories else {}

    @property
    def directories(self) -> tuple[str, ...]:
        """Below which a session that opens now may start programs; empty = anywhere."""
        return self._directories if self.active else ()

    def ruleset(self) -> int | None:
        """For a session that opens now, made anew: what is mounted meanwhile counts.  Raises ``OSError``."""
        return landlock.starting_below(self._directories) if self.active else None
