"""A gated session as the agent knows it, and its form on disk that outlives the agent."""

from dataclasses import asdict, dataclass
from typing import Any

from persona.decisions import Subject


@dataclass(frozen=True, slots=True)
class Session:
    """One PAM session (or one persona-shell), and every process descended from it.

    ``monitor`` is the pid of the program that opened it (sshd's privileged half, su, cron);
    ``audit`` its audit session id where the kernel has one; ``shell`` the user's login shell.
    """

    id: str
    subject: Subject
    uid: int
    service: str
    remote: str
    shell: str
    monitor: int
    audit: int | None
    opened_at: float  # Unix seconds
    monitor_started: int = 0  # clock ticks since boot; a number alone may come to mean another process


def to_json(session: Session) -> dict[str, Any]:
    """A mapping that ``from_json`` reads back to an equal value."""
    return asdict(session)


def from_json(value: dict[str, Any]) -> Session:
    """Raises ``KeyError`` or ``TypeError`` for anything but what ``to_json`` wrote."""
    subject = value["subject"]
    return Session(
        **{
            **value,
            "subject": Subject(str(subject["user"]), tuple(map(str, subject["groups"])), str(subject["vm"])),
        }
    )
