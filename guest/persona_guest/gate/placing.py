"""Brings a task to where its persona binds it, before it goes on: what the gate knows of ``enforce``."""

from typing import Protocol

from persona.decisions import Granted
from persona_guest.gate.pending import Pending


class Placing(Protocol):
    """``enforce.enforcer.Enforcer`` where personas bind."""

    def read_task(self, pending: Pending) -> None:
        """Reads what ``place`` needs of the task.  May take as long as its user's file systems make it.

        Raises ``OSError`` when the task is gone.
        """

    def place(self, pending: Pending, granted: Granted | None) -> None:
        """Raises ``PersonaError`` where it cannot be bound (it must not start), ``OSError`` when it is gone."""


class NoPlacing:
    """Where personas bind nobody: in complain mode, and on a machine without cgroups and nftables."""

    def read_task(self, pending: Pending) -> None:
        """Reads nothing."""

    def place(self, pending: Pending, granted: Granted | None) -> None:
        """Leaves the task where it is."""
