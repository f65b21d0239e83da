"""What a persona needs on the VM: Debian packages, ``postgresql-client (>= 15)``, and services, ``service:cron``."""

import re
from dataclasses import dataclass

from persona.guesses import dependency_meant
from persona.parsing import Bad, shown

# Debian Policy 5.6.1 (names), 5.6.12 (versions), 7.1 (relations)
_PACKAGE = re.compile(
    r"([a-z0-9][a-z0-9+.-]{1,127})(?:\s*\(\s*(<<|<=|=|>=|>>)\s*([0-9][A-Za-z0-9.+:~-]{0,63})\s*\))?", re.ASCII
)
_UNIT = re.compile(r"[A-Za-z0-9:_\\-][A-Za-z0-9:_.@\\-]{0,199}", re.ASCII)
# The guest asks systemd for NAME.service: with one of these endings there is no such unit, ever (systemd.unit(5)).
_SUFFIXES = (
    "service", "socket", "device", "mount", "automount", "swap", "target", "path", "timer", "slice", "scope",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Package:
    """A Debian package; ``relation`` and ``version`` are empty for any version."""

    name: str
    relation: str = ""
    version: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.relation} {self.version})" if self.relation else self.name


@dataclass(frozen=True, slots=True)
class Service:
    """A systemd service, named without its suffix."""

    name: str

    def __str__(self) -> str:
        return f"service:{self.name}"


Dependency = Package | Service


def parse_dependency(value: object) -> Dependency:
    """Raises ``Bad``."""
    if isinstance(value, str):
        if value.startswith("service:") and _UNIT.fullmatch(value.removeprefix("service:")):
            return Service(_service(value.removeprefix("service:").removesuffix(".service")))
        match = _PACKAGE.fullmatch(value.strip())
        if match is not None and match[1].rpartition(".")[2] not in _SUFFIXES:
            return Package(match[1], match[2] or "", match[3] or "")
    raise Bad(f"expected a dependency, not {shown(value)}", dependency_meant(value))


def _service(name: str) -> str:
    """A name without ``.service``.  Raises ``Bad`` for one that can never be active."""
    stem, dot, suffix = name.rpartition(".")
    if dot and suffix in _SUFFIXES:
        raise Bad(f"'service:{name}' can never be active: {suffix} units are not services", f"like 'service:{stem}'")
    if name.endswith("@"):
        raise Bad(f"'service:{name}' can never be active: it is a template", f"name an instance: 'service:{name}tty1'")
    return name
