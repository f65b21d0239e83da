"""What a persona needs and this machine lacks, how that is said, and what passes between agent and installer."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from persona.dependencies import Dependency, Package, Service, parse_dependency
from persona.parsing import Bad
from persona.wildcards import matches

MESSAGE_MAX = 64 * 1024  # bytes
DEPENDENCIES_MAX = 256  # of one persona, as in its schema
_TEXT_MAX = 1000
_NAMED_MAX = 8


@dataclass(frozen=True, slots=True)
class Lacking:
    """A dependency that is not met, and what there is instead."""

    dependency: Dependency
    found: str

    def __str__(self) -> str:
        return f"{self.dependency} ({self.found})"


def named(lacking: Iterable[Lacking]) -> str:
    """What is lacking, for a message: the first eight, comma-separated."""
    words = [str(item) for item in lacking]
    return ", ".join(words[:_NAMED_MAX]) + (", ..." if len(words) > _NAMED_MAX else "")


def not_allowed(lacking: Iterable[Lacking], install: tuple[str, ...], start: tuple[str, ...]) -> list[Lacking]:
    """Those that the operator's patterns of packages and services do not cover."""

    def covered(dependency: Dependency) -> bool:
        if isinstance(dependency, Package):
            return any(matches(dependency.name, pattern) for pattern in install)
        return any(matches(dependency.name, pattern.removesuffix(".service")) for pattern in start)

    return [item for item in lacking if not covered(item.dependency)]


def remedy(lacking: Iterable[Lacking]) -> str:
    """What an operator can do by hand, for a message."""
    lacking = list(lacking)
    packages = [item.dependency.name for item in lacking if isinstance(item.dependency, Package)]
    services = [item.dependency.name for item in lacking if isinstance(item.dependency, Service)]
    words = []
    if packages:
        words.append(f"'apt-get install {' '.join(packages[:_NAMED_MAX])}'")
    if services:
        words.append(f"'systemctl start {' '.join(services[:_NAMED_MAX])}'")
    return " and ".join(words)


# --- between agent and installer: one JSON object a datagram --------------------------------------------


@dataclass(frozen=True, slots=True)
class Progress:
    """The installer's line on how far it is, for whoever waits."""

    line: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the installation ended; ``why`` has apt's own words, empty = everything is there now."""

    why: str


Message = Progress | Outcome


def encode_wish(dependencies: Iterable[Dependency]) -> bytes:
    """The agent's packet: install these."""
    return json.dumps({"dependencies": [str(dependency) for dependency in dependencies]}).encode()


def decode_wish(data: bytes) -> tuple[Dependency, ...]:
    """What the agent's packet asks for.  Raises ``ValueError`` for anything but a list of well-formed dependencies."""
    value = _object(data)
    items = value.pop("dependencies", None)
    if value or not isinstance(items, list) or not 0 < len(items) <= DEPENDENCIES_MAX:
        raise ValueError(f"expected 'dependencies', 1 to {DEPENDENCIES_MAX} of them, and nothing else")
    try:
        return tuple(parse_dependency(item) for item in items)
    except Bad as error:
        raise ValueError(error.message) from None


def encode_message(message: Message) -> bytes:
    """The installer's packet."""
    if isinstance(message, Progress):
        return json.dumps({"progress": message.line[:_TEXT_MAX]}).encode()
    return json.dumps({"outcome": message.why[:_TEXT_MAX]}).encode()


def decode_message(data: bytes) -> Message:
    """What the installer's packet says.  Raises ``ValueError``."""
    value = _object(data)
    kind, text = value.popitem() if len(value) == 1 else ("", None)
    if not isinstance(text, str) or kind not in ("progress", "outcome"):
        raise ValueError("expected 'progress' or 'outcome', a text")
    return Progress(text[:_TEXT_MAX]) if kind == "progress" else Outcome(text[:_TEXT_MAX])


def _object(data: bytes) -> dict[str, object]:
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    return value


# --- dpkg's state ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Installed:
    """Installed packages by name with their versions, one an architecture, and what they provide under other names.

    A provided name has the version that its provider states; most state none, which meets no versioned relation
    (Debian Policy 7.5).  ``unfinished`` are the names of those half-way: unpacked, half-configured and the like.
    """

    versions: Mapping[str, tuple[str, ...]]
    provided: Mapping[str, tuple[str, ...]]
    unfinished: frozenset[str] = frozenset()
