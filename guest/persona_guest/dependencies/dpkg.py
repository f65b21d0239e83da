"""What dpkg says is installed, through python-apt: deb822 files and the order of Debian versions.

Reads dpkg's status file (dpkg(1)) itself: opening apt's cache would cost the agent more memory than all
the rest of it.
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from persona.dependencies import Package
from persona_guest.dependencies.rules import Installed, Lacking

STATUS = Path("/var/lib/dpkg/status")
_PROVIDED = re.compile(rb"([a-z0-9][a-z0-9+.-]+)(?::\S+)?(?:\s*\(=\s*(\S+?)\s*\))?")
_HOLDS: dict[str, Callable[[int], bool]] = {
    "<<": lambda order: order < 0,
    "<=": lambda order: order <= 0,
    "=": lambda order: order == 0,
    ">=": lambda order: order >= 0,
    ">>": lambda order: order > 0,
}

Stamp = tuple[int, int, int]


class DpkgError(Exception):
    """dpkg's state cannot be read; says why."""


class Dpkg:
    """The packages of one status file, read again only when it changed.  Not for two threads."""

    def __init__(self, status: Path = STATUS) -> None:
        self._status = status
        self._read: tuple[Stamp, Installed] | None = None
        self._apt: Any = None

    def stamp(self) -> Stamp:
        """A value that differs after each change; costs one stat(2).  Zeros where there is no dpkg."""
        return stamp(self._status)

    def lacking(self, packages: Iterable[Package]) -> list[Lacking]:
        """Those of ``packages`` that are not installed, or in another version.  Raises ``DpkgError``."""
        packages = list(packages)
        installed = self.installed() if packages else Installed({}, {})
        return [Lacking(package, found) for package in packages if (found := self._instead(package, installed))]

    def _instead(self, package: Package, installed: Installed) -> str:
        """What there is instead of a package; empty where it is there."""
        own, provided = installed.versions.get(package.name, ()), installed.provided.get(package.name, ())
        if not own and not provided:
            return "not installed"
        if not package.relation:
            return ""
        compare, holds = self._library().version_compare, _HOLDS[package.relation]
        if any(version and holds(compare(version, package.version)) for version in (*own, *provided)):
            return ""
        return f"{own[0]} is installed" if own else "only provided by another package"

    def installed(self) -> Installed:
        """Everything that is installed.  Raises ``DpkgError``."""
        now = self.stamp()
        if self._read is None or self._read[0] != now:
            self._read = (now, self._parse())
        return self._read[1]

    def _parse(self) -> Installed:
        versions: dict[str, list[str]] = {}
        provided: dict[str, list[str]] = {}
        unfinished: set[str] = set()
        apt = self._library()
        try:
            # as bytes: one package whose control file is not UTF-8 must not hide the others
            with apt.TagFile(str(self._status), bytes=True) as sections:
                for section in sections:
                    name = os.fsdecode(section["Package"])
                    state = (section.get("Status") or b"").rpartition(b" ")[2]
                    if state not in (b"installed", b"not-installed", b"config-files"):
                        unfinished.add(name)
                    if state != b"installed":
                        continue
                    versions.setdefault(name, []).append(os.fsdecode(section.get("Version") or b""))
                    for match in _PROVIDED.finditer(section.get("Provides") or b""):
                        provided.setdefault(os.fsdecode(match[1]), []).append(os.fsdecode(match[2] or b""))
        except (OSError, KeyError, SystemError, apt.Error) as error:
            raise DpkgError(f"{self._status}: {error}") from error
        return Installed(
            {name: tuple(found) for name, found in versions.items()},
            {name: tuple(found) for name, found in provided.items()},
            frozenset(unfinished),
        )

    def _library(self) -> Any:
        if self._apt is None:
            try:
                import apt_pkg  # a guest has it, a trial may not; and only personas with dependencies pay for it
            except ImportError:
                raise DpkgError("python3-apt is not installed") from None
            apt_pkg.init_config()
            apt_pkg.init_system()
            self._apt = apt_pkg
        return self._apt


def stamp(status: Path) -> Stamp:
    """A value that differs after each change of a status file, which dpkg replaces at the end of each run."""
    try:
        found = status.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_size, found.st_mtime_ns
