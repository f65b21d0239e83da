"""The agent's settings: one frozen value, read once from guest.toml; each default with its reason.

Unknown keys and wrong types are refused by name: a misspelt key must not silently mean its default.
"""

import os
import re
import socket
import tomllib
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, get_type_hints

from persona.patterns import SECURE_PATH
from persona.problems import Fault, PersonaError
from persona.wildcards import matches
from persona_guest.core.accounts import UID_MIN, uid_min_of
from persona_guest.core.mask_rules import MaskError
from persona_guest.core.masks import Masks


class Mode(StrEnum):
    """complain: everything is decided and recorded, nothing is stopped; enforce: no persona, no command."""

    COMPLAIN = "complain"
    ENFORCE = "enforce"


class WhenFull(StrEnum):
    """What becomes of records that find no room while the broker takes none."""

    DROP = "drop"  # they are lost, and the broker is told which
    DENY = "deny"  # and in enforce mode, who has no room left starts nothing more


class SettingsError(PersonaError):
    """guest.toml says something that is not understood; the message names file and key."""

    def __init__(self, message: str) -> None:
        super().__init__(Fault.BAD_DOCUMENT, message)


@dataclass(frozen=True, slots=True)
class Vm:
    """What this machine is called when the broker is asked."""

    name: str = field(default_factory=lambda: socket.gethostname().partition(".")[0])


@dataclass(frozen=True, slots=True)
class Broker:
    """Where decisions come from."""

    url: str = ""  # https://host:8443 or unix:/path; empty = no broker yet, which denies in enforce
    events_url: str = ""  # the stream is a process, and so a port, of its own
    ca_file: str = "/etc/persona/ca.pem"
    token_file: str = "/etc/persona/token"  # noqa: S105 - a file's name, not a token
    timeout_s: float = 2.0  # a person waits for this at the prompt: longer is a hang, shorter flaps
    grace_s: float = 0.0  # how long a lease outlives its end while the broker is away; 0 = closed


@dataclass(frozen=True, slots=True)
class Gate:
    """Who is gated, and what a program must be to be run."""

    never_gate_root: bool = True  # a trial, which gates whoever starts it, sets this to false; a machine must not
    uid_min: int = UID_MIN  # ``load`` takes what /etc/login.defs says: below are system accounts
    break_glass_group: str = "persona-break-glass"  # shipped empty
    secure_path: tuple[str, ...] = SECURE_PATH  # where a bare name in a pattern is looked for
    # Files that are several programs, of which argv[0] says one, beside those of persona/called_names.py.
    multicall: tuple[str, ...] = ("busybox", "toybox", "coreutils")
    # Files (any of their names) that do the same under each name, so that an entry with one allows them under all.
    same_by_any_name: tuple[str, ...] = ()
    # Programs (paths with the wildcards of docs/patterns.md) that need not be root's own and unwritable for
    # others.  Debian ships at(1) as a setuid program of the system user daemon.
    trusted_writable: tuple[str, ...] = ("/usr/bin/at",)
    # What the session's own machinery starts (user manager, sshd's environment hooks) before and
    # beside any command.  Each is root-owned and everything it starts is gated again.
    plumbing: tuple[str, ...] = (
        "/usr/lib/systemd/systemd",
        "/usr/lib/systemd/systemd-executor",
        "/usr/lib/systemd/user-environment-generators/*",
        "/usr/lib/systemd/user-generators/*",
        "/usr/bin/dbus-daemon",
        "/usr/bin/dbus-update-activation-environment",
        "/usr/bin/systemd-tmpfiles",
    )
    # The user's own command says what is denied and why: never denied, as machinery is not.
    user_command: str = "/usr/bin/persona"
    greeting: bool = True  # one line at an interactive login that names the persona
    # Without the kernel layer, whatever is raced, programs start below these only; it takes mount(2) away, and with it
    # every container and sandbox, hence not the default.
    landlock_execute: tuple[str, ...] = ()
    require_kernel_layer: bool = False  # refuse sessions without it; not every kernel has it, hence not the default

    def is_plumbing(self, path: str) -> bool:
        """Whether it is the user's own command, or ``plumbing`` names the program."""
        return path == self.user_command or any(matches(path, pattern) for pattern in self.plumbing)


@dataclass(frozen=True, slots=True)
class Dependencies:
    """What the installer may do for personas that need what is not there; names with wildcards (docs/patterns.md).

    Documents come from the broker, and installing is root's work: who wants a broker to have it says so here.
    """

    install: tuple[str, ...] = ()  # packages, from the machine's own apt sources; ["*"] = any
    start: tuple[str, ...] = ()  # services
    deadline_s: float = 300.0  # how long a command waits; the installation itself goes on


@dataclass(frozen=True, slots=True)
class Audit:
    """What becomes of the records of what is decided, on their way to the broker."""

    spool_mib: int = 64  # on disk, until the broker has them: some 200,000 records
    mask: tuple[str, ...] = ()  # what is secret in command lines, beside what core/masks.py knows
    when_full: WhenFull = WhenFull.DROP  # a broker that is away for long must not stop a machine unasked


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the agent keeps its sockets and its state; a trial moves them to a private directory."""

    runtime_dir: str = "/run/persona"
    state_dir: str = "/var/lib/persona"
    cgroup_root: str = "/sys/fs/cgroup"  # empty = no limits at all: a trial has no rights to set any
    bpf_dir: str = "/sys/fs/bpf/persona"  # where the kernel layer is pinned; empty = none (a trial)
    bpf_object: str = "/usr/lib/persona/persona.bpf.o"


@dataclass(frozen=True, slots=True)
class Settings:
    """All of guest.toml."""

    mode: Mode = Mode.COMPLAIN  # a fresh install must never lock anybody out
    vm: Vm = field(default_factory=Vm)
    broker: Broker = field(default_factory=Broker)
    gate: Gate = field(default_factory=Gate)
    dependencies: Dependencies = field(default_factory=Dependencies)
    audit: Audit = field(default_factory=Audit)
    paths: Paths = field(default_factory=Paths)


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LOGIN_DEFS = Path("/etc/login.defs")


def load(path: Path, login_defs: Path = LOGIN_DEFS) -> Settings:
    """Reads guest.toml; a missing file is all defaults.  Raises ``SettingsError``.

    Where guest.toml has no ``gate.uid_min``, it is the ``UID_MIN`` of ``login_defs``.
    """
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        document = {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from error
    settings = parse(document, str(path))
    if "uid_min" in document.get("gate", {}):
        return settings
    return replace(settings, gate=replace(settings.gate, uid_min=_uid_min(login_defs)))


def _uid_min(login_defs: Path) -> int:
    """A machine whose login.defs cannot be read must not lose its agent for that: then Debian's own number."""
    try:
        return uid_min_of(login_defs.read_bytes())
    except OSError:
        return UID_MIN


def parse(document: dict[str, Any], source: str) -> Settings:
    """The settings of a parsed document.  Raises ``SettingsError`` naming ``source`` and the key."""
    try:
        settings: Settings = _table(Settings, document, "")
    except SettingsError as error:
        raise SettingsError(f"{source}: {error.message}") from None
    for key, ok, want in (
        ("vm.name", bool(_NAME.fullmatch(settings.vm.name)), "letters, digits, '.', '_', '-'; at most 64"),
        ("broker.timeout_s", 0.1 <= settings.broker.timeout_s <= 30, "0.1 to 30 seconds"),
        ("broker.grace_s", 0 <= settings.broker.grace_s <= 86400, "0 to 86400 seconds"),
        ("broker.url", _is_url(settings.broker.url), "https://HOST:PORT or unix:/PATH"),
        ("broker.events_url", _is_url(settings.broker.events_url), "https://HOST:PORT or unix:/PATH"),
        ("dependencies.deadline_s", 1 <= settings.dependencies.deadline_s <= 3600, "1 to 3600 seconds"),
        ("audit.spool_mib", 1 <= settings.audit.spool_mib <= 65536, "1 to 65536"),
        ("gate.uid_min", 0 <= settings.gate.uid_min <= 0x7FFFFFFF, "0 or more"),
        ("gate.secure_path", all(map(os.path.isabs, settings.gate.secure_path)), "absolute directories"),
        ("gate.user_command", os.path.isabs(settings.gate.user_command), "an absolute path"),
        ("gate.landlock_execute", _are_directories(settings.gate.landlock_execute), "at most 64 absolute directories"),
        ("paths.cgroup_root", settings.paths.cgroup_root[:1] in ("", "/"), "an absolute directory, or none"),
        ("paths.bpf_dir", _is_below_bpffs(settings.paths.bpf_dir), "a directory below /sys/fs/bpf, or nothing"),
        ("gate.break_glass_group", bool(_NAME.fullmatch(settings.gate.break_glass_group)), "a group name"),
    ):
        if not ok:
            raise SettingsError(f"{source}: {key}: expected {want}")
    try:
        Masks(settings.audit.mask)
    except MaskError as error:
        raise SettingsError(f"{source}: audit.mask: {error}") from None
    return settings


def _is_below_bpffs(directory: str) -> bool:
    return not directory or (os.path.normpath(directory) == directory and directory.startswith("/sys/fs/bpf/"))


def _are_directories(names: tuple[str, ...]) -> bool:
    return len(names) <= 64 and all(os.path.isabs(name) and "\0" not in name for name in names)


def _is_url(url: str) -> bool:
    return not url or bool(re.fullmatch(r"https://[^/\s]+|unix:/\S+", url))


def _table(kind: type[Any], document: object, prefix: str) -> Any:
    if not isinstance(document, dict):
        raise SettingsError(f"{prefix.rstrip('.')}: expected a table")
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}
    unknown = sorted(set(document) - set(known))
    if unknown:
        raise SettingsError(f"{prefix}{unknown[0]}: unknown key; known here: {', '.join(sorted(known))}")
    values = {key: _value(hints[key], value, prefix + key) for key, value in document.items()}
    missing = [
        name
        for name, item in known.items()
        if name not in values and item.default is MISSING and item.default_factory is MISSING
    ]
    if missing:
        raise SettingsError(f"{prefix}{missing[0]}: missing")
    return kind(**values)


def _value(hint: Any, value: object, key: str) -> Any:
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        if not isinstance(value, str) or value not in list(hint):
            raise SettingsError(f"{key}: expected one of {', '.join(hint)}, not {value!r}")
        return hint(value)
    if hint is bool or hint is str:
        if type(value) is not hint:
            raise SettingsError(f"{key}: expected {'true or false' if hint is bool else 'a string'}")
        return value
    if hint is int or hint is float:
        if type(value) not in (int, float) or (hint is int and type(value) is float):
            raise SettingsError(f"{key}: expected a number")
        return value
    if hint == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise SettingsError(f"{key}: expected a list of strings")
        return tuple(value)
    return _table(hint, value, key + ".")
