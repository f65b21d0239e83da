"""What the agent tells systemd, and what systemd keeps for it: sd_notify(3), sd_listen_fds(3), FDSTORE.

The notify protocol is a datagram; the journal's fields go through python3-systemd where it is
installed and to standard error where it is not (a trial).
"""

import contextlib
import json
import os
import socket
import sys

from persona.shown import line

_LISTEN_FDS_START = 3


def notify(message: str, fds: tuple[int, ...] = ()) -> bool:
    """Sends ``message`` to $NOTIFY_SOCKET, with descriptors to store; false where it cannot be sent."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.settimeout(1.0)
            channel.connect("\0" + address[1:] if address.startswith("@") else address)
            socket.send_fds(channel, [message.encode()], list(fds))
    except OSError:
        return False
    return True


def store(name: str, fd: int) -> bool:
    """Gives systemd a copy of ``fd`` to keep over a restart under ``name`` (FileDescriptorStoreMax=)."""
    return notify(f"FDSTORE=1\nFDNAME={name}", (fd,))


def forget(name: str) -> None:
    """Takes the copies under ``name`` back; systemd drops a listener whose session ended by itself."""
    notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def inherited() -> dict[str, int]:
    """The descriptors that systemd kept, by name; closes what has no name of its own."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, int] = {}
    for offset in range(int(os.environ.get("LISTEN_FDS", "0"))):
        fd = _LISTEN_FDS_START + offset
        name = names[offset] if offset < len(names) else ""
        if not name or name in found:
            os.close(fd)
            continue
        os.set_inheritable(fd, False)
        found[name] = fd
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)
    return found


def watchdog_interval() -> float | None:
    """Seconds between two signs of life, half of WatchdogSec=; ``None`` without a watchdog."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    usec = os.environ.get("WATCHDOG_USEC", "")
    return int(usec) / 2e6 if usec.isascii() and usec.isdigit() else None


def journal(message: str, fields: dict[str, str]) -> None:
    """One structured entry; field names are upper case, as journald wants them.  Raises nothing.

    Bytes in a text that are not UTF-8 (a user chooses names of files) are escaped: journald's client cannot send them.

    What journald does not take (a long entry needs a descriptor of its own) goes to standard error, which is
    journald's as well under systemd.
    """
    message, fields = line(message), {name: line(value) for name, value in fields.items()}
    try:
        from systemd import journal as native  # type: ignore[attr-defined,import-not-found,unused-ignore]  # only a guest has it

        native.send(message, SYSLOG_IDENTIFIER="persona-agent", **fields)
    except (ImportError, OSError):
        with contextlib.suppress(OSError):
            print(json.dumps({"MESSAGE": message, **fields}), file=sys.stderr, flush=True)
