"""What the gate holds of a session, and of an exec that is not answered yet."""

import time
from dataclasses import dataclass, field

from persona.decisions import Denied, Granted, Width
from persona_guest.kernel.task import Task
from persona_guest.lsm.layer import HangsOn
from persona_guest.program.exec_request import ExecRequest
from persona_guest.program.identity import Image
from persona_guest.session.model import Session
from persona_guest.session.placement import Placement

_SAID_MAX = 64  # processes of a session, of which the last denial is known
_SEARCH_S = 1.0  # between two attempts of one search along PATH


@dataclass(slots=True)
class Gated:
    """A session with its listener, and what the gate needs at every exec."""

    session: Session
    listener: int
    holder: int
    shells: tuple[str, ...]  # the login shell's path; with persona-shell also that of the shell it becomes
    shell_files: tuple[Image, ...]  # what lay there when the session began, and may run on after an upgrade
    name: bytes  # the session's id, as the table of notifications in flight has it
    lines: int = 0
    lines_at: int = 0
    last: Granted | None = None
    placement: Placement | None = None  # where its processes live, once one has started
    confirmed: int = -1  # the generation in which the broker last answered for this very session
    revoked: Denied | None = None  # if that was the answer
    said: dict[int, tuple[int, float, bool]] = field(default_factory=dict)  # by process: the last denial's words, when

    def repeats(self, pid: int, words: int, since: float) -> bool:
        """Whether a denial, received at ``since``, is one that this process has just met.

        Shells and C libraries try one command at every directory of PATH that has it; in Debian /bin is /usr/bin.
        ``words`` stands for the line and the arguments.
        """
        before = self.said.get(pid)
        return before is not None and before[0] == words and since - before[1] < _SEARCH_S

    def has_said(self, pid: int, words: int, at: float, *, told: bool) -> None:
        """A denial was answered at ``at``; ``told``: its line was shown."""
        self.said.pop(pid, None)
        self.said[pid] = words, at, told
        if len(self.said) > _SAID_MAX:
            del self.said[next(iter(self.said))]


@dataclass(slots=True)
class Pending:
    """An exec that is not answered yet."""

    gated: Gated
    ident: int
    slot: int
    task: Task
    exec_request: ExecRequest
    stage: int = 0
    denials: tuple[Denied, ...] = ()
    leased: bool = True
    since: float = field(default_factory=time.monotonic)
    again: bool = False  # a denial of the same command as just before, by the same process
    _before: Image | None = None

    def before(self) -> Image:
        """The program that the task runs while it waits.  Raises ``OSError`` when it is gone."""
        if self._before is None:
            self._before = Image(*self.task.running())
        return self._before

    def hangs_on(self, granted: Granted | None) -> HangsOn:
        """What of the command line would make the answer another one.

        Of one that is too long to read, no argument can have mattered but the name of a file that is several programs.
        """
        if granted is not None and granted.lease.width is Width.ARGV and self.exec_request.complete:
            return HangsOn.ARGUMENTS
        for stage in self.exec_request.stages:
            if stage.found.multicall:
                return HangsOn.NAME
        return HangsOn.NOTHING

    def script(self, granted: Granted | None) -> int | None:
        """The stage that was allowed, where it is a script and its path must arrive as it was read.

        Its interpreter opens it again by that path.  ``None`` where no path matters.
        """
        stage = 0 if granted is None else self.stage
        if self.exec_request.stages[stage].is_script and self.exec_request.obstacles[stage] is None:
            return stage
        return None
