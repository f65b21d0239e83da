"""The broker's settings: flags over broker.toml over these defaults, each with its reason."""

import ipaddress
import os
import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from persona.problems import Fault, PersonaError

WORKERS_MAX = 32
_UNIX_PATH_MAX = 107  # bytes: unix(7), the kernel takes no longer one


@dataclass(frozen=True, slots=True)
class Settings:
    """``broker.toml`` has exactly these keys."""

    db: str = "/var/lib/persona-broker/broker.db"  # the unit's StateDirectory
    bind: str = "0.0.0.0:8443"
    events_bind: str = "0.0.0.0:8444"
    tls_cert: str = "/etc/persona/broker.crt"
    tls_key: str = "/etc/persona/broker.key"
    load_source: str = "psutil"  # the broker runs on the host that it judges
    load_max_age_s: int = 15  # seven missed samples: the watcher is gone, not late
    health_max_age_s: int = 45  # three missed reports: the VM is out of reach, or its agent is gone
    workers: int = 2  # decisions are CPU: about one a core on a small host
    insecure_loopback: bool = False  # HTTP without TLS, on 127.0.0.1 only


def load(path: Path) -> Settings:
    """Reads broker.toml; a missing file is all defaults.  Raises ``PersonaError`` naming file and key."""
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PersonaError(Fault.BAD_DOCUMENT, f"{path}: {error}") from error
    known = {item.name: item.type for item in fields(Settings)}
    for key, value in values.items():
        if key not in known:
            raise PersonaError(Fault.BAD_DOCUMENT, f"{path}: {key}: unknown key; known: {', '.join(known)}")
        if type(value) is not known[key]:
            wanted = getattr(known[key], "__name__", known[key])
            raise PersonaError(Fault.BAD_DOCUMENT, f"{path}: {key}: expected {wanted}, not {value!r}")
    return replace(Settings(), **values)


def check(settings: Settings) -> None:
    """What no type says.  Raises ``PersonaError``, also where a bind would speak plainly to the network."""
    if settings.load_source not in ("psutil", "set"):
        raise PersonaError(Fault.BAD_DOCUMENT, "load_source: expected 'psutil' or 'set'")
    if not 3 <= settings.load_max_age_s <= 3600:  # it is sampled every 2 s
        raise PersonaError(Fault.BAD_DOCUMENT, "load_max_age_s: expected 3 to 3600")
    if not 20 <= settings.health_max_age_s <= 3600:  # a guest reports every 15 s
        raise PersonaError(Fault.BAD_DOCUMENT, "health_max_age_s: expected 20 to 3600")
    if not 1 <= settings.workers <= WORKERS_MAX:
        raise PersonaError(Fault.BAD_DOCUMENT, f"workers: expected 1 to {WORKERS_MAX}")
    for key, bind in (("bind", settings.bind), ("events_bind", settings.events_bind)):
        if bind.startswith("unix:/"):
            if len(os.fsencode(bind.removeprefix("unix:"))) > _UNIX_PATH_MAX:
                raise PersonaError(Fault.BAD_DOCUMENT, f"{key}: {bind!r}: longer than {_UNIX_PATH_MAX} bytes")
            continue
        host, _, port = bind.rpartition(":")
        if not re.fullmatch(r"[0-9A-Za-z.-]*|\[[0-9A-Fa-f:.]+\]", host) or not re.fullmatch(r"[0-9]{1,5}", port):
            raise PersonaError(Fault.BAD_DOCUMENT, f"{key}: {bind!r}: expected HOST:PORT or unix:/PATH")
        if settings.insecure_loopback and not _is_loopback(host.strip("[]")):
            raise PersonaError(Fault.BAD_DOCUMENT, f"{key}: {bind!r}: without TLS only loopback is served")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: who knows where it leads tomorrow
        return False
