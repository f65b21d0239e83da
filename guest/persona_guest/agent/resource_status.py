"""What binds a session, as ``persona status`` and ``persona-agent plan`` show it."""

from collections.abc import Callable
from typing import Any

from persona.canonical import to_mapping
from persona.decisions import PersonaRef
from persona.problems import PersonaError
from persona_guest.core.persona_cgroups import PersonaCgroup
from persona_guest.enforce import plan as plans
from persona_guest.enforce.cgroups.usage import Sample, rates, sample
from persona_guest.enforce.cgroups.user_memory import lacking
from persona_guest.enforce.enforcer import Enforcer
from persona_guest.loop import Loop
from persona_guest.session.registry import Registry

_BETWEEN_S = 0.25  # two samples make a rate


class ResourceStatus:
    """Reads cgroups and documents for ``persona status`` and ``persona-agent plan``; changes nothing."""

    def __init__(self, loop: Loop, registry: Registry, enforcer: Enforcer) -> None:
        self._loop = loop
        self._registry = registry
        self._enforcer = enforcer

    def stated(self, ref: dict[str, Any]) -> dict[str, Any]:
        """``limits`` and ``network`` as the persona's document has them; empty where the document is not here."""
        try:
            document = to_mapping(self._enforcer.document(PersonaRef(ref["name"], ref["version"])))
        except PersonaError:
            return {}
        return {"limits": document.get("resource_limits", {}), "network": document.get("network_access", [])}

    def use(self, session_id: str, done: Callable[[list[dict[str, Any]]], None]) -> None:
        """Calls ``done`` a moment later with each place of a session: its limits, its use, and how hard it waits."""
        placement = self._registry.placement(session_id)
        before = self._sample(list(placement.places.values())) if placement else {}
        if not before:
            done([])
            return

        def later() -> None:
            after = self._sample(list(before))
            done([self._shown(place, before[place], taken) for place, taken in after.items()])

        self._loop.call_later(_BETWEEN_S, later)

    def _sample(self, places: list[PersonaCgroup]) -> dict[PersonaCgroup, Sample]:
        found = {}
        for place in places:
            try:
                found[place] = sample(self._enforcer.tree, place.parent if place.shared else place.cgroup)
            except OSError:
                continue  # it was left meanwhile
        return found

    def _shown(self, place: PersonaCgroup, before: Sample, after: Sample) -> dict[str, Any]:
        ref = {"name": place.persona.name, "version": place.persona.version}
        return {
            "persona": ref,
            "cgroup": place.cgroup,
            "withdrawn": place.withdrawn,
            "limits": self.stated(ref).get("limits", {}),
            "use": rates(before, after, _BETWEEN_S),
            "left": self._left(place),
        }

    def _left(self, place: PersonaCgroup) -> int:
        try:
            return lacking(self._enforcer.tree, place, self._enforcer.document(place.persona))
        except PersonaError:
            return 0

    def plan(self) -> dict[str, Any]:
        """Every place in use, and the operations that would be applied now.  Raises ``PersonaError``."""
        places = [
            {
                "session": place.session_id,
                "persona": {"name": place.persona.name, "version": place.persona.version},
                "cgroup": place.cgroup,
                "uid": place.uid,
            }
            for place in self._enforcer.wanted()
        ]
        steps = [{"facility": name, **step} for name, plan in self._enforcer.plan() for step in plans.describe(plan)]
        return {"places": places, "plan": steps}
