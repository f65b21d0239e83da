"""What becomes of the processes under a persona when a session's personas change.  Values in, values out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from persona.decisions import PersonaRef, Program
from persona.documents import Persona, ResourceLimits
from persona.patterns import Whitelist

# A session whose user no persona is for right now still has its shell, which is admission's: with
# enough to type, and to be told why a command is denied, and nothing else.
NO_PERSONA = PersonaRef("_nobody", 0)
NO_PERSONA_DOCUMENT = Persona(
    name=NO_PERSONA.name,
    command_whitelist=Whitelist(()),
    resource_limits=ResourceLimits(cpu_percent=20.0, memory_bytes=256 << 20, pids=32),
    priority=1,
)


@dataclass(frozen=True, slots=True)
class Applicable:
    """A policy that names a session's user and holds now, with the persona that it hands out."""

    ref: PersonaRef
    policy: str
    commands: Whitelist


class Revocation(Enum):
    """Whether an operator revoked a session, and what then becomes of what runs in it."""

    NONE = "nothing: policies decide"
    REVOKED = "no policy holds for it"
    END = "the same, and what runs in it ends whatever its persona's on_revoke says"


Stage = tuple[Program, tuple[str, ...]]


def choose(stages: Sequence[Stage], holding: Sequence[tuple[Applicable, Persona]]) -> PersonaRef | None:
    """Under which persona something that runs might be started now; ``None`` = under none.

    As the broker decides: of the script first, then of its interpreter, the first policy in order that
    speaks for it and whose persona allows it.
    """
    for program, argv in stages:
        for held, persona in holding:
            if held.commands.speaks_for(program, argv) and persona.allows(program, argv):
                return held.ref
    return None


def bereft(persona: Persona) -> Persona:
    """The document for what was withdrawn and may still finish, or lies frozen: the same limits, no network."""
    return replace(persona, network_access=())


def named(ref: PersonaRef | None) -> str:
    """What people call a version of a persona, or that there is none."""
    return "no persona" if ref is None or ref == NO_PERSONA else f"{ref.name} v{ref.version}"
