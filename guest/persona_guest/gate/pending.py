"""What the gate holds of a session, and of an exec that is not answered yet."""

from dataclasses import dataclass

from persona.decisions import Denied, Granted, Width
from persona_guest.core.sessions import Session
from persona_guest.enforce.home import Home
from persona_guest.gate.attempt import Attempt
from persona_guest.gate.identity import Image
from persona_guest.kernel.task import Task


@dataclass(slots=True)
class Gated:
    """A session with its listener, and what the gate needs at every exec."""

    session: Session
    listener: int
    holder: int
    shells: tuple[Image, ...]  # the login shell's file; with persona-shell also that of the shell it becomes
    name: bytes  # the session's id, as the table of notifications in flight has it
    lines: int = 0
    lines_at: int = 0
    last: Granted | None = None
    home: Home | None = None  # where its processes live, once one has started
    confirmed: int = -1  # the generation in which the broker last answered for this very session
    revoked: Denied | None = None  # if that was the answer


@dataclass(slots=True)
class Pending:
    """An exec that is not answered yet."""

    gated: Gated
    ident: int
    slot: int
    task: Task
    attempt: Attempt
    stage: int = 0
    denials: tuple[Denied, ...] = ()
    leased: bool = True
    _before: Image | None = None

    def before(self) -> Image:
        """The program that the task runs while it waits.  Raises ``OSError`` when it is gone."""
        if self._before is None:
            self._before = Image(*self.task.running())
        return self._before

    def hangs_on_arguments(self, granted: Granted | None) -> bool:
        """Whether the answer would be another one for other arguments.

        Of a command line too long to read, no argument can have mattered but the name of a multi-call program.
        """
        if granted is not None and granted.lease.width is Width.ARGV and self.attempt.complete:
            return True
        for found, _ in self.attempt.stages:  # noqa: SIM110 - a generator costs more, and this is asked at every exec
            if found.multicall:
                return True
        return False
