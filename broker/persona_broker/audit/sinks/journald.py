"""The journal of this machine, by its native protocol: a datagram of fields (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""

import json
import socket
from collections.abc import Sequence
from typing import Any

from persona_broker.audit.sinks.interface import Line

SOCKET = "/run/systemd/journal/socket"
_TIMEOUT_S = 5.0
_FIELDS = ("user", "program", "decision", "reason", "persona", "policy", "event", "session")


class Journald:
    """Each record is an entry with fields to search by, as ``journalctl PERSONA_USER=alice``."""

    name = "journald"

    def __init__(self, path: str = SOCKET) -> None:
        self._path = path
        self._socket: socket.socket | None = None

    def send(self, lines: Sequence[Line]) -> None:
        """Raises ``OSError``."""
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.settimeout(_TIMEOUT_S)
        try:
            for line in lines:
                self._socket.sendto(_datagram(line), self._path)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Ends the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _datagram(line: Line) -> bytes:
    fields: dict[str, str] = {
        "MESSAGE": line.text,
        "PRIORITY": str(line.severity),
        "SYSLOG_IDENTIFIER": "persona-broker",
        "PERSONA_KIND": line.kind,
        "PERSONA_NUMBER": str(line.number),
    }
    if line.kind == "record":
        said: dict[str, Any] = json.loads(line.text)
        fields |= {f"PERSONA_{name.upper()}": str(said["record"][name]) for name in _FIELDS if said["record"].get(name)}
        if said["vm"]:
            fields["PERSONA_VM"] = said["vm"]
    return b"".join(_field(name, value) for name, value in fields.items())


def _field(name: str, value: str) -> bytes:
    """With the value's length before it: it may hold anything."""
    data = value.encode("utf-8", "surrogateescape")
    return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
