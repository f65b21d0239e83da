"""Where one session's processes live, as the agent knows it and as it outlives the agent on disk."""

from dataclasses import dataclass, field
from typing import Any

from persona.decisions import PersonaRef
from persona_guest.core.file_id import Image
from persona_guest.core.persona_cgroups import MANAGED, PersonaCgroup, place_of
from persona_guest.core.reassignment import NO_PERSONA, Applicable


@dataclass(slots=True)
class Placement:
    """Where the processes of one session live.

    ``places`` has the places by their key.  ``found`` is the cgroup in which the session was first seen.  ``opener`` is
    the program that opened it: its forks have started nothing yet and are in no place.  ``default_persona`` is that of
    the login shell, and of whatever else starts without a grant of its own.  ``holding``: what the broker said last;
    ``None`` = nothing yet.  ``told``: its user knows that an operator revoked it.  ``unsaved``: the session's file does
    not say where it lives now.
    """

    session_id: str
    uid: int
    found: str
    opener: Image
    default_persona: PersonaRef = NO_PERSONA
    places: dict[str, PersonaCgroup] = field(default_factory=dict)
    only: PersonaRef | None = None  # every process that started anything lives under this one
    holding: tuple[Applicable, ...] | None = None
    told: bool = False
    unsaved: bool = field(default=False, compare=False)

    @property
    def managed(self) -> bool:
        """Whether all of the session is a user's service manager."""
        return MANAGED in self.places and len(self.places) == 1

    def add(self, place: PersonaCgroup) -> PersonaCgroup | None:
        """Sets the place with its key; returns the one before it."""
        before = self.places.get(place.key)
        self.places[place.key] = place
        self._settle()
        return before

    def drop(self, key: str) -> None:
        """Forgets the place with this key: nothing lives there any more."""
        self.places.pop(key, None)
        self._settle()

    def _settle(self) -> None:
        places = list(self.places.values())
        self.only = places[0].persona if len(places) == 1 and not places[0].withdrawn else None

    def to_json(self) -> dict[str, Any]:
        """A mapping that ``from_json`` reads back; what the broker said last is not in it, but asked for anew."""
        return {
            "session": self.session_id,
            "uid": self.uid,
            "found": self.found,
            "opener": list(self.opener),
            "base": [self.default_persona.name, self.default_persona.version],
            "places": [
                [place.persona.name, place.persona.version, place.shared, place.withdrawn]
                for place in self.places.values()
            ],
            "told": self.told,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Placement":
        """Raises ``ValueError``, ``KeyError`` or ``TypeError`` for anything but what ``to_json`` wrote."""
        placement = cls(
            session_id=str(value["session"]),
            uid=int(value["uid"]),
            found=str(value["found"]),
            opener=Image(*map(int, value["opener"])),
            default_persona=PersonaRef(str(value["base"][0]), int(value["base"][1])),
            told=value.get("told") is True,
        )
        for name, version, shared, withdrawn in value["places"]:
            placement.add(
                place_of(
                    placement.session_id,
                    placement.uid,
                    PersonaRef(str(name), int(version)),
                    placement.found,
                    shared=shared is True,
                    withdrawn=withdrawn is True,
                )
            )
        return placement
