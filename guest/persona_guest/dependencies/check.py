"""Which dependencies of a persona are not met: packages by dpkg's state, services by systemd's."""

from collections.abc import Iterable

from persona.dependencies import Dependency, Package, Service
from persona_guest.dependencies.dpkg import Dpkg
from persona_guest.dependencies.rules import Lacking
from persona_guest.system.units import Units, UnitsError

_RUNNING = ("active", "reloading")


class DependencyCheck:
    """Asks dpkg and systemd, and may wait for both.  Not for two threads."""

    def __init__(self, dpkg: Dpkg, units: Units) -> None:
        self._dpkg = dpkg
        self._units = units

    def lacking(self, dependencies: Iterable[Dependency]) -> tuple[Lacking, ...]:
        """What is not there.  Raises ``DpkgError``; a service that cannot be asked about is not there."""
        dependencies = list(dependencies)
        packages = self._dpkg.lacking(item for item in dependencies if isinstance(item, Package))
        services = [
            Lacking(item, state)
            for item in dependencies
            if isinstance(item, Service)
            if (state := self._not_running(item))
        ]
        return (*packages, *services)

    def _not_running(self, service: Service) -> str:
        try:
            state = self._units.state(service.name)
        except UnitsError as error:
            return f"systemd cannot be asked: {error}"
        return "" if state in _RUNNING else state
