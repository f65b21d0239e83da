"""Units of systemd, over its D-Bus interface: org.freedesktop.systemd1(5).

Through jeepney, which is plain Python over a socket; without it, or without a bus, nothing is known.
Every call has a deadline.
"""

import contextlib
import logging
from typing import Any

log = logging.getLogger("persona.health")

_TIMEOUT_S = 5.0
_BUS = "org.freedesktop.systemd1"
_MANAGER = "org.freedesktop.systemd1.Manager"
_UNIT = "org.freedesktop.systemd1.Unit"
_PATH = "/org/freedesktop/systemd1"


class UnitsError(Exception):
    """systemd could not be asked, or refused; says why."""


class Units:
    """One kept connection to the system bus, made when it is first needed.  Not for two threads."""

    def __init__(self) -> None:
        self._connection: Any = None

    def failed(self) -> tuple[str, ...]:
        """The names of all units that failed.  Raises ``UnitsError``."""
        (units,) = self._call(_PATH, _MANAGER, "ListUnitsFiltered", "as", (["failed"],))
        return tuple(sorted(str(unit[0]) for unit in units))

    def state(self, service: str) -> str:
        """ActiveState of a service, ``active`` when it runs; or ``not-found``, ``masked``.  Raises ``UnitsError``."""
        (path,) = self._call(_PATH, _MANAGER, "LoadUnit", "s", (f"{service}.service",))
        loaded, active = self._property(path, "LoadState"), self._property(path, "ActiveState")
        return active if loaded == "loaded" else loaded

    def start(self, service: str) -> None:
        """Has a service started; ``state`` says what becomes of it.  Raises ``UnitsError``."""
        self._call(_PATH, _MANAGER, "StartUnit", "ss", (f"{service}.service", "replace"))

    def _property(self, path: str, name: str) -> str:
        ((_, value),) = self._call(path, "org.freedesktop.DBus.Properties", "Get", "ss", (_UNIT, name))
        return str(value)

    def close(self) -> None:
        """Drops the connection; the next call makes a new one."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.close()
            self._connection = None

    def _call(self, path: str, interface: str, method: str, signature: str, body: tuple[Any, ...]) -> Any:
        try:
            # a guest has it, a trial may not; and only who asks pays for it
            from jeepney import DBusAddress, DBusErrorResponse, new_method_call
            from jeepney.io.blocking import open_dbus_connection
            from jeepney.wrappers import unwrap_msg
        except ImportError:
            raise UnitsError("python3-jeepney is not installed") from None
        message = new_method_call(DBusAddress(path, _BUS, interface), method, signature, body)
        try:
            if self._connection is None:
                self._connection = open_dbus_connection("SYSTEM")
            return unwrap_msg(self._connection.send_and_get_reply(message, timeout=_TIMEOUT_S))
        except DBusErrorResponse as error:
            raise UnitsError(str(error)) from error
        except Exception as error:  # the library raises what its parser and the socket do
            self.close()
            raise UnitsError(str(error) or type(error).__name__) from error
