"""The broker's settings: flags over broker.toml over these defaults, each with its reason."""

import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from persona.problems import Fault, PersonaError


@dataclass(frozen=True, slots=True)
class Settings:
    """``broker.toml`` has exactly these keys."""

    db: str = "/var/lib/persona-broker/broker.db"  # the unit's StateDirectory
    bind: str = "0.0.0.0:8443"
    events_bind: str = "0.0.0.0:8444"
    tls_cert: str = "/etc/persona/broker.crt"
    tls_key: str = "/etc/persona/broker.key"
    load_source: str = "psutil"  # the broker runs on the host that it judges
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
            raise PersonaError(Fault.BAD_DOCUMENT, f"{path}: {key}: expected {known[key]}")
    return replace(Settings(), **values)


def check_binds(settings: Settings) -> None:
    """Raises ``PersonaError`` where a bind would speak plainly to the network."""
    if settings.load_source not in ("psutil", "set"):
        raise PersonaError(Fault.BAD_DOCUMENT, "load_source: expected 'psutil' or 'set'")
    for bind in (settings.bind, settings.events_bind):
        if bind.startswith("unix:"):
            continue
        if not re.fullmatch(r"[0-9A-Za-z.:\[\]-]*:\d{1,5}", bind):
            raise PersonaError(Fault.BAD_DOCUMENT, f"bind: {bind!r}: expected HOST:PORT or unix:/PATH")
        if settings.insecure_loopback and not bind.startswith("127."):
            raise PersonaError(Fault.BAD_DOCUMENT, f"bind: {bind!r}: without TLS only 127.0.0.1 is served")
