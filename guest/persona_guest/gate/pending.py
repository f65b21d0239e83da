"""What the gate holds of an exec that is not answered yet."""

import time
from dataclasses import dataclass, field

from persona.decisions import Denied, Granted, Width
from persona_guest.core.file_id import Image
from persona_guest.kernel.task import Task
from persona_guest.lsm.layer import HangsOn
from persona_guest.program.exec_request import ExecRequest
from persona_guest.session.model import Login


@dataclass(slots=True)
class Pending:
    """An exec that is not answered yet.

    ``ident`` is its notification's id, ``slot`` where the notification is in ``InFlight``.  ``stage`` is the one that
    is being decided, ``denials`` are the answers to those before it.  ``leased``: nobody had to be asked.  ``since`` is
    monotonic seconds.
    """

    login: Login
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
        """What of the command line the kernel has to compare, since the answer depends on it.

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
