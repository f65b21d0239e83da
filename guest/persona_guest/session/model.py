"""A session as the agent knows it: what was known when it opened, and what has become of it since."""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from persona.decisions import Denied, Granted, PersonaRef, Subject
from persona_guest.core.file_id import Image
from persona_guest.session.placement import Placement

_SAID_MAX = 64  # processes of a session, of which the last denial is known
_LINES_PER_SECOND = 20  # a loop of denied commands must not flood its user's terminal
_SEARCH_S = 1.0  # between two attempts of one search along PATH


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


@dataclass(frozen=True, slots=True)
class Admitted:
    """The login may go on; ``persona`` and ``policy`` are what would apply right now, if anything."""

    persona: PersonaRef | None
    policy: str | None


class State(StrEnum):
    """How far a login is."""

    OPENING = "opening"  # the broker is asked whether its user may log in
    ADMITTED = "admitted"  # they may, or complain mode stops nobody; the filter is not in place yet
    GATED = "gated"  # the filter is in place: each program start is decided
    ENDED = "ended"  # its last process is gone, or it did not come to be gated


@dataclass(slots=True, eq=False)
class Login:
    """Everything that the agent knows of one session; the loop's thread alone changes it.

    ``admitted``: the session's default persona and its policy; ``None`` = the broker has not said.  ``announced``:
    whether the broker need not be told of it any more.  ``placement``: where its processes live, once one has started.

    What the gate needs at every exec: ``listener``, the descriptor on which the kernel asks; ``holder``, the number
    under which its subject's decisions are leased; ``shells``, the login shell's path, with persona-shell also that
    of the shell it becomes; ``shell_files``, what lay there when the session began, and may run on after an upgrade;
    ``last``, the last grant; ``confirmed``, the generation in which the broker last answered for this very session,
    and ``revoked``, if that was the answer.
    """

    session: Session
    state: State = State.OPENING
    admitted: Admitted | None = None
    announced: bool = True
    placement: Placement | None = None
    listener: int = -1
    holder: int = 0
    shells: tuple[str, ...] = ()
    shell_files: tuple[Image, ...] = ()
    last: Granted | None = None
    confirmed: int = -1
    revoked: Denied | None = None
    lines: int = 0  # that were shown to its user in the second ``lines_at``
    lines_at: int = 0
    said: dict[int, tuple[int, float, bool]] = field(default_factory=dict)  # by process: the last denial's words, when
    name: bytes = field(init=False)  # the session's id, as the table of notifications in flight has it

    def __post_init__(self) -> None:
        self.name = self.session.id.encode()

    @property
    def default_persona(self) -> PersonaRef | None:
        """The persona of whatever in the session has no grant of its own; ``None`` = none, or not known yet."""
        return self.admitted.persona if self.admitted is not None else None

    def repeats(self, pid: int, words: int, since: float) -> bool:
        """Whether a denial, received at ``since``, is one that this process has just met.

        Shells and C libraries try one command at every directory of PATH that has it; in Debian /bin is /usr/bin.
        ``words`` stands for the line and the arguments.
        """
        before = self.said.get(pid)
        return before is not None and before[0] == words and since - before[1] < _SEARCH_S

    def has_said(self, pid: int, words: int, at: float, *, told: bool) -> None:
        """Remembers a denial that was answered at ``at``; ``told``: its line was shown."""
        self.said.pop(pid, None)
        self.said[pid] = words, at, told
        if len(self.said) > _SAID_MAX:
            del self.said[next(iter(self.said))]

    def claim_line(self, now: float) -> bool:
        """Takes one of the lines that its user is shown in a second; false where none is left in this one."""
        if self.lines_at != int(now):
            self.lines_at, self.lines = int(now), 0
        self.lines += 1
        return self.lines <= _LINES_PER_SECOND


def to_json(login: Login) -> dict[str, Any]:
    """A mapping that ``from_json`` reads back to a login of the same session, persona and placement."""
    admitted, placement = login.admitted, login.placement
    persona = admitted.persona if admitted is not None else None
    return {
        "session": asdict(login.session),
        "admitted": None
        if admitted is None
        else {"persona": None if persona is None else [persona.name, persona.version], "policy": admitted.policy},
        "placement": None if placement is None else placement.to_json(),
    }


def from_json(value: dict[str, Any]) -> Login:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` for anything but what ``to_json`` wrote."""
    admitted, placement = value["admitted"], value["placement"]
    return Login(
        session_from_json(value["session"]),
        admitted=None if admitted is None else _admitted(admitted),
        placement=None if placement is None else Placement.from_json(placement),
    )


def session_from_json(value: dict[str, Any]) -> Session:
    """What ``dataclasses.asdict`` made of one.  Raises ``KeyError`` or ``TypeError``."""
    subject = value["subject"]
    return Session(
        **{
            **value,
            "subject": Subject(str(subject["user"]), tuple(map(str, subject["groups"])), str(subject["vm"])),
        }
    )


def _admitted(value: dict[str, Any]) -> Admitted:
    persona, policy = value["persona"], value["policy"]
    ref = None if persona is None else PersonaRef(str(persona[0]), int(persona[1]))
    return Admitted(ref, None if policy is None else str(policy))
