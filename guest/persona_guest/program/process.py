"""A process that runs already, as a whitelist would see it: its program by inode, its command line as it stands."""

import contextlib
import errno
import os
from dataclasses import dataclass

from persona.decisions import Program
from persona_guest.core.file_id import Image
from persona_guest.core.reassignment import Stage
from persona_guest.kernel.task import Task, living
from persona_guest.program.identity import Identified, Identifier
from persona_guest.program.own_home import Owner, as_own
from persona_guest.program.shebang import Format, Shebang
from persona_guest.settings import Settings

_ARGV_MAX = 65536
_OPEN_MAX = 4  # files at once, for one look
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of what the agent, or the machine, has no more


@dataclass(frozen=True, slots=True)
class Running:
    """``stages``: the script that an interpreter was started for, if any, then what really runs; never empty."""

    stages: tuple[tuple[Identified, tuple[str, ...]], ...]

    @property
    def image(self) -> Image:
        """The file that it runs."""
        return self.stages[-1][0].image

    @property
    def name(self) -> str:
        """What people call it, printable; of a script also what runs it, which its own command line cannot change."""
        first, last = self.stages[0][0], self.stages[-1][0]
        if last is _NOTHING:
            return last.program.path
        name = first.name(os.path.basename(first.program.path))
        return name if first is last else f"{name} (script, run by {last.name(os.path.basename(last.program.path))})"

    @property
    def path(self) -> str:
        """Which file it runs, for records: its resolved path, of a script the interpreter's.

        That a script runs is only what its command line says, which is its user's to change.
        """
        last = self.stages[-1][0]
        return last.program.path if last is _NOTHING else last.path

    @property
    def trusted(self) -> tuple[Stage, ...]:
        """Those of the stages that a persona can vouch for: program and command line of each."""
        return tuple(
            (found.as_called(called), argv)
            for found, argv in self.stages
            for called in (os.fsencode(argv[0]) if argv else b"",)  # of a script that is its path
            if found.vouchable and found.misnamed(called) is None
        )

    def plumbing(self, settings: Settings) -> bool:
        """Whether it is a program of ``gate.plumbing`` in guest.toml, or the user's own command."""
        found = self.stages[-1][0]
        return found.trusted and settings.gate.is_plumbing(found.program.path)


# What runs there cannot be told: a program like any other that no whitelist can vouch for.
_NOTHING = Identified(
    Image(0, 0), (0, 0), Program("unknown"), visible=False, trusted=False, multicall=False, format=Format.OTHER
)
UNKNOWN = Running(((_NOTHING, ()),))


def read_running(pid: int, identifier: Identifier, owner: Owner | None = None) -> Running:
    """What the process runs; ``UNKNOWN`` where it cannot be told.  ``owner`` is the user of its session.

    Raises ``ProcessLookupError`` where it is gone, any other ``OSError`` where the agent itself is short of descriptors
    or memory, which says nothing of the process.
    """
    for _ in range(2):
        with contextlib.suppress(OSError):
            return _read_stages(living(pid), identifier, owner)
        _open_several()
    living(pid)
    return UNKNOWN


def _open_several() -> None:
    """As many files as a look needs at once.  Raises ``OSError`` where the agent cannot have them.

    The error of the look itself does not tell: a file system of a user's own may say ENOMEM of their files for ever.
    """
    with contextlib.ExitStack() as opened:
        for _ in range(_OPEN_MAX):
            opened.callback(os.close, os.open("/proc/self/stat", os.O_RDONLY | os.O_CLOEXEC))


def _read_stages(task: Task, identifier: Identifier, owner: Owner | None) -> Running:
    program = _identify(task, b"/proc/self/exe", identifier, owner)
    words = task.command_line(_ARGV_MAX).split(b"\0")[:-1]
    argv = tuple(map(os.fsdecode, words))
    stages = [(program, argv)]
    for index in (1, 2):  # a shebang may bring one argument of its own
        if index < len(words) and words[index].startswith(b"/"):
            try:
                script = _identify(task, words[index], identifier)
            except OSError as error:
                if error.errno in _SHORT:
                    raise
                continue
            if isinstance(script.format, Shebang) and _interprets(task, program, script.format, identifier):
                stages.insert(0, (script, argv[index:]))
                break
    return Running(tuple(stages))


def _interprets(task: Task, program: Identified, shebang: Shebang, identifier: Identifier) -> bool:
    """A process may write any script's name over its own command line: its program must at least fit."""
    try:
        return _identify(task, shebang.interpreter, identifier).image == program.image
    except OSError as error:
        if error.errno in _SHORT:
            raise
        return False


def _identify(task: Task, path: bytes, identifier: Identifier, owner: Owner | None = None) -> Identified:
    try:
        fd = task.open_program(path)
        try:
            found = identifier.identify(fd)
            return found if owner is None else as_own(fd, found, task, owner)
        finally:
            os.close(fd)
    finally:
        task.let_go()
