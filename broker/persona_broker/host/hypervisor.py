"""What ``persona-host`` asks of a hypervisor, whatever its API: for now only to observe."""

from collections.abc import Sequence
from typing import Protocol

from persona_broker.host.core.readings import DomainReading, HostReading


class HypervisorError(Exception):
    """It cannot be reached, or did not answer in time; the connection is of no use any more."""


class Hypervisor(Protocol):
    """One open connection.  Whoever opened it calls ``close``; one thread calls its methods."""

    def domains(self) -> Sequence[DomainReading]:
        """All domains, running or not, within some seconds; one that hangs has a ``problem``, the others do not.

        Raises ``HypervisorError``.
        """

    def host(self) -> HostReading:
        """What the API itself tells of the host, for one that is another machine.  Raises ``HypervisorError``."""

    def close(self) -> None:
        """Ends the connection, also one that is broken."""
