"""Brings a task to where its persona binds it, before it goes on: what the gate knows of ``enforce``."""

from typing import Protocol

from persona.decisions import Granted
from persona_guest.gate.pending import Pending


class Placing(Protocol):
    """Moves a task to its place: ``enforce.enforcer.Enforcer`` where personas bind, else ``NoPlacing``."""

    def read_task(self, pending: Pending) -> None:
        """Reads what ``place`` needs of the task.  May take as long as its user's file systems make it.

        Raises ``OSError`` when the task is gone.
        """

    def place(self, pending: Pending, granted: Granted | None) -> None:
        """Moves the task to the place of the persona that it was granted under, else of the session's default persona.

        Raises ``PersonaError`` where it cannot be bound (it must not start), ``OSError`` when it is gone.
        """


class NoPlacing:
    """Where personas bind nobody: in complain mode, and on a machine without cgroups and nftables."""

    def read_task(self, pending: Pending) -> None:
        """Reads nothing."""

    def place(self, pending: Pending, granted: Granted | None) -> None:
        """Leaves the task where it is."""
