"""What a persona needs on the VM: Debian packages, ``postgresql-client (>= 15)``, and services, ``service:cron``."""

import re
from dataclasses import dataclass

from persona.parsing import Bad

# Debian Policy 5.6.1 (names), 5.6.12 (versions), 7.1 (relations)
_PACKAGE = re.compile(
    r"([a-z0-9][a-z0-9+.-]{1,127})(?:\s*\(\s*(<<|<=|=|>=|>>)\s*([0-9][A-Za-z0-9.+:~-]{0,63})\s*\))?", re.ASCII
)
_UNIT = re.compile(r"[A-Za-z0-9:_.@\\-]{1,200}", re.ASCII)


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
            return Service(value.removeprefix("service:").removesuffix(".service"))
        match = _PACKAGE.fullmatch(value.strip())
        if match is not None:
            return Package(match[1], match[2] or "", match[3] or "")
    raise Bad(f"expected a dependency, not {value!r}", "like 'postgresql-client (>= 15)' or 'service:cron'")
