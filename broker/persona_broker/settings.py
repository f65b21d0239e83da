"""The broker's settings: flags over broker.toml over these defaults, each with its reason."""

import ipaddress
import os
import re
import socket
import tomllib
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from persona.problems import Fault, PersonaError

WORKERS_MAX = 32
HOSTS_MAX = 64
_NAME_MAX = 63  # as of a DNS label
_URI_MAX = 500
KEEP_DAYS_MAX = 36_500
T = TypeVar("T")
_UNIX_PATH_MAX = 107  # bytes: unix(7), the kernel takes no longer one


@dataclass(frozen=True, slots=True)
class Audit:
    """The table ``[audit]``."""

    when_full: str = "refuse"  # guests keep what they cannot deliver; "drop" is for whom decisions' memory matters more
    journald: bool = False
    syslog: str = ""
    syslog_ca: str = "/etc/ssl/certs/ca-certificates.crt"  # Debian's own, of every authority that it trusts
    json_lines: str = ""
    keep_days: int = 0  # 0: for ever, since what is deleted cannot be had back


@dataclass(frozen=True, slots=True)
class Host:
    """The table ``[host]``: what ``persona-host`` watches, and where the broker finds what it saw."""

    uris: tuple[str, ...] = ("qemu:///system",)  # libvirt on this very machine
    names: tuple[str, ...] = ()  # as the URIs say: the machine in it, or this one
    directory: str = "/run/persona-host"  # the unit's RuntimeDirectory


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
    audit: Audit = field(default_factory=Audit)
    host: Host = field(default_factory=Host)


def load(path: Path) -> Settings:
    """Reads broker.toml; a missing file is all defaults.  Raises ``PersonaError`` naming file and key."""
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PersonaError(Fault.BAD_DOCUMENT, f"{path}: {error}") from error
    return _read(Settings(), values, path, "")


def _read(defaults: T, values: dict[str, Any], path: Path, table: str) -> T:
    """``defaults`` (a dataclass) with the values of one table of the file."""
    known = {item.name: getattr(defaults, item.name) for item in fields(defaults)}  # type: ignore[arg-type]
    read: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise PersonaError(Fault.BAD_DOCUMENT, f"{path}: {table}{key}: unknown key; known: {', '.join(known)}")
        if is_dataclass(known[key]) and isinstance(value, dict):
            read[key] = _read(known[key], value, path, f"{table}{key}.")
        elif isinstance(known[key], tuple):
            read[key] = _texts(value, f"{path}: {table}{key}")
        elif type(value) is not type(known[key]):
            wanted = "a table" if is_dataclass(known[key]) else type(known[key]).__name__
            raise PersonaError(Fault.BAD_DOCUMENT, f"{path}: {table}{key}: expected {wanted}, not {value!r}")
        else:
            read[key] = value
    return replace(defaults, **read)  # type: ignore[type-var]


def _texts(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise PersonaError(Fault.BAD_DOCUMENT, f"{where}: expected a list of texts, not {value!r}")
    return tuple(value)


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
    _check_audit(settings.audit)
    hosts_of(settings.host)
    if not settings.host.directory.startswith("/"):
        raise PersonaError(
            Fault.BAD_DOCUMENT, f"host.directory: {settings.host.directory!r}: expected an absolute path"
        )


def hosts_of(host: Host) -> dict[str, str]:
    """The URI of each host by its name.  Raises ``PersonaError``.

    Without ``names`` a host is called as the machine in its URI, or as this one, up to the first dot.
    """
    if not 1 <= len(host.uris) <= HOSTS_MAX:
        raise PersonaError(Fault.BAD_DOCUMENT, f"host.uris: expected 1 to {HOSTS_MAX} URIs of libvirt")
    for uri in host.uris:
        if not re.fullmatch(r"[a-z][a-z0-9+]*://[\x21-\x7e]*", uri) or len(uri) > _URI_MAX:
            raise PersonaError(
                Fault.BAD_DOCUMENT, f"host.uris: {uri!r}: expected a URI of libvirt, like 'qemu:///system'"
            )
    names = host.names or tuple(_as_name(_machine_of(uri)) for uri in host.uris)
    if len(names) != len(host.uris):
        problem = f"host.names: {len(names)} names for {len(host.uris)} URIs: expected one for each, in their order"
        raise PersonaError(Fault.BAD_DOCUMENT, problem)
    for name in names:
        if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z-]*", name) or len(name) > _NAME_MAX:
            fix = f"letters, digits and '-', at most {_NAME_MAX}"
            raise PersonaError(Fault.BAD_DOCUMENT, f"host.names: {name!r} is not a valid name of a host: {fix}")
        if names.count(name) > 1:
            fix = "names tells them apart" if not host.names else "each needs its own"
            raise PersonaError(Fault.BAD_DOCUMENT, f"host.names: {name!r} is the name of two hosts; {fix}")
    return dict(zip(names, host.uris, strict=True))


def watched_hosts(host: Host) -> tuple[str, ...]:
    """The names of the hosts that an operator wants to be watched: none where nobody wrote the table."""
    return () if host == Host() else tuple(hosts_of(host))


def is_local(uri: str) -> bool:
    """Whether a URI names no machine, and so means this one."""
    return not _authority(uri)


def _authority(uri: str) -> str:
    return uri.partition("://")[2].partition("/")[0].partition("?")[0].rpartition("@")[2]


def _as_name(machine: str) -> str:
    """A machine's name made a host's: the broker starts whatever the machine is called."""
    return re.sub(r"[^0-9A-Za-z-]", "-", machine).strip("-")[:_NAME_MAX] or "host"


def _machine_of(uri: str) -> str:
    machine = _authority(uri)
    if not machine:
        return socket.gethostname().partition(".")[0]
    if machine.startswith("["):  # an IPv6 address, whose colons no name may have
        return machine.partition("]")[0].strip("[").replace(":", "-").strip("-")
    name = machine.partition(":")[0]
    return name.replace(".", "-") if re.fullmatch(r"[0-9.]+", name) else name.partition(".")[0]


def _check_audit(audit: Audit) -> None:
    if audit.when_full not in ("refuse", "drop"):
        raise PersonaError(Fault.BAD_DOCUMENT, "audit.when_full: expected 'refuse' or 'drop'")
    if audit.syslog and not re.fullmatch(r"(tcp|tls)://([0-9A-Za-z.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}", audit.syslog):
        raise PersonaError(
            Fault.BAD_DOCUMENT, f"audit.syslog: {audit.syslog!r}: expected tcp://HOST:PORT or tls://HOST:PORT"
        )
    if not 0 <= audit.keep_days <= KEEP_DAYS_MAX:
        raise PersonaError(Fault.BAD_DOCUMENT, f"audit.keep_days: expected 0 (for ever) to {KEEP_DAYS_MAX}")
    if audit.json_lines and not audit.json_lines.startswith("/"):
        raise PersonaError(Fault.BAD_DOCUMENT, f"audit.json_lines: {audit.json_lines!r}: expected an absolute path")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: who knows where it leads tomorrow
        return False
