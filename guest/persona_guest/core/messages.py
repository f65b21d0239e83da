"""The lines that a user sees when something is denied, or a limit is met."""

from persona.decisions import Denied
from persona.documents import Persona
from persona.problems import Reason
from persona.shown import amount, line, word

_LINE_MAX = 400


def denial_line(program: str, denied: Denied) -> str:
    """One printable line, no newline: what, why (with its code), under which persona and policy, what helps.

    ``program`` is the name of the file that was refused (``ExecRequest.name``), never its caller's text.
    """
    under = ""
    if denied.persona and denied.policy:
        under = f" under persona {denied.persona}{by_policy(denied.policy, denied.policy_origin)}"
    elif denied.policy:
        under = by_policy(denied.policy, denied.policy_origin)
    tail = f": {denied.help}" if denied.help else ""
    return printable(f"persona: {program}: denied, {denied.reason}{under}{tail}")


def by_policy(policy: str, origin: str) -> str:
    """Which policy it comes from, and where its operator finds it, if the broker says so."""
    return f", policy {policy} ({origin})" if origin else f" (policy {policy})"


def admission_line(user: str, vm: str, denied: Denied) -> str:
    """The line for a user whose login is refused: where, why, and what helps."""
    tail = f": {denied.help}" if denied.help else ""
    return printable(f"persona: {word(user)} may not log in to {vm}, {denied.reason}{tail}")


def limit_line(persona: Persona, reason: Reason, left: int = 0) -> str:
    """The line for a user who met a limit of their persona, and what came of it.

    ``left`` bytes of a memory limit are what earlier sessions of theirs left in memory.
    """
    limits = persona.resource_limits
    if reason is Reason.MEMORY_LIMIT:
        allowed = amount(limits.memory_bytes) if limits.memory_bytes else "what the machine has"
        return f"persona: out of memory, a program was killed: persona {persona.name} allows {allowed}" + (
            f", and files in memory (see /dev/shm) that you left there have {amount(left)} of it" if left else ""
        )
    return f"persona: no more processes: persona {persona.name} allows {limits.pids} at once"


def refusal_line(persona: str, target: str) -> str:
    """The line for a user whose connection is refused; their program only says 'connection refused'."""
    return printable(f"persona: {target}: denied, {Reason.NETWORK_REFUSED} under persona {persona}")


def printable(text: str) -> str:
    """One line without control characters and undecodable bytes, which are escaped: no name can drive a terminal."""
    clean = line(text)
    return clean if len(clean) <= _LINE_MAX else clean[: _LINE_MAX - 1] + "…"
