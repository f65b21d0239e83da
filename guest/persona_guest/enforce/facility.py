"""The family of facilities: what each part that binds a persona offers the agent.

A facility makes plans and applies nothing by itself.  The agent applies the plans of all facilities in
the order of one list (``agent/build.py``), cgroups first, and takes them back in reverse, all in the loop's
thread: planning and applying must be quick, and whatever could wait is a thread of the facility's own.
"""

from collections.abc import Mapping
from typing import Protocol

from persona.documents import Persona
from persona_guest.core.persona_cgroups import PersonaCgroup
from persona_guest.enforce.plan import Plan

Wanted = Mapping[PersonaCgroup, Persona]
"""What should be: every place in use and the document that it is under."""


class Facility(Protocol):
    """One kind of thing that a persona binds.  Its plans may read the system; only applying changes it."""

    name: str

    def enter(self, place: PersonaCgroup, persona: Persona) -> Plan:
        """Brings ``place`` under ``persona``: for the first time, or from another version of it.

        Called before a task is moved there; the place's cgroup exists, or the plan of the facility
        before this one makes it.  Nothing to do is an empty plan.  Raises ``PersonaError``.
        """

    def leave(self, place: PersonaCgroup) -> Plan:
        """Takes back what was made for ``place``.  Its cgroup may be gone: systemd ends scopes by itself."""

    def reconcile(self, wanted: Wanted) -> Plan:
        """From whatever is found, left by any crash, to what should be; an empty ``wanted`` = nobody is bound now."""

    def release(self) -> Plan:
        """From whatever is found, left by any crash, to nothing of ours at all."""
