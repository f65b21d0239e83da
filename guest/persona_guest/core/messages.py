"""The one line that a user sees when something is denied."""

import os

from persona.decisions import Denied
from persona.documents import Persona
from persona.problems import Reason

_LINE_MAX = 400


def denial_line(program: str, denied: Denied) -> str:
    """One printable line, no newline: what, why (with its code), under which persona and policy, what helps."""
    under = ""
    if denied.persona and denied.policy:
        under = f" under persona {denied.persona} (policy {denied.policy})"
    elif denied.policy:
        under = f" (policy {denied.policy})"
    tail = f": {denied.help}" if denied.help else ""
    return printable(f"persona: {program}: denied, {denied.reason}{under}{tail}")


def admission_line(user: str, vm: str, denied: Denied) -> str:
    """Why a login is refused."""
    tail = f": {denied.help}" if denied.help else ""
    return printable(f"persona: {user} may not log in to {vm}, {denied.reason}{tail}")


def limit_line(persona: Persona, reason: Reason) -> str:
    """Which limit was met, and what came of it."""
    limits = persona.resource_limits
    if reason is Reason.MEMORY_LIMIT:
        allowed = amount(limits.memory_bytes) if limits.memory_bytes else "what the machine has"
        return f"persona: out of memory, a program was killed: persona {persona.name} allows {allowed}"
    return f"persona: no more processes: persona {persona.name} allows {limits.pids} at once"


def refusal_line(persona: str, target: str) -> str:
    """Where a connection may not go, or come from: programs say 'connection refused', as if the peer had."""
    return printable(f"persona: {target}: denied, {Reason.NETWORK_REFUSED} under persona {persona}")


def amount(size: float) -> str:
    """Bytes for people: ``512 MiB``, ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def printable(text: str) -> str:
    """Control characters and undecodable bytes become '?', so that no name can drive a terminal."""
    clean = "".join(char if char.isprintable() and not "\ud800" <= char <= "\udfff" else "?" for char in text)
    return clean if len(clean) <= _LINE_MAX else clean[: _LINE_MAX - 1] + "…"


def shown_name(path: bytes, argv: tuple[bytes, ...]) -> str:
    """What people call the program: the last part of its path, or argv[0] where there is no path."""
    return os.path.basename(os.fsdecode(path)) or (os.fsdecode(argv[0]) if argv else "(no name)")
