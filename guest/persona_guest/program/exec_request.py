"""One execve as the kernel will see it: the program file, for a script the chain of its interpreters, the loader.

Beside what each file is, an exec request says for each whether an allowance of it may be used (``obstacles``).
The kernel resolves every path of the chain for the *task*, in mounts and a root that may be its user's own;
so what is allowed is tied to what the same paths lead to for the agent.
"""

import errno
import os
from typing import NamedTuple

from persona.called_names import called_name
from persona.decisions import Denied
from persona.problems import Reason
from persona.shown import word
from persona_guest.core.file_id import Image
from persona_guest.core.leases import Question
from persona_guest.kernel import memory, seccomp
from persona_guest.kernel.task import Task, View
from persona_guest.program.identity import Identified, Identifier
from persona_guest.program.own_home import Owner, as_own
from persona_guest.program.shebang import NESTING_MAX, Format, Shebang, interpreter_argv

_AT_FDCWD = -100


class Stage(NamedTuple):
    """One file of the chain, under the path and the command line by which the kernel comes to it."""

    found: Identified
    argv: tuple[bytes, ...]
    path: bytes

    @property
    def called(self) -> bytes:
        """What the program takes its name from: ``argv[0]``; of a script the kernel hands on the path instead."""
        return self.path if self.is_script else self.argv[0] if self.argv else b""

    @property
    def is_script(self) -> bool:
        """Whether another program, the next stage, reads it."""
        return isinstance(self.found.format, Shebang)


class ExecRequest(NamedTuple):
    """What a task is about to run.

    ``stages`` is the file itself, then, for a script, the same start seen as its interpreter's: any
    of them may be what a whitelist names.  The last stage is what really runs; ``loader`` is the ELF
    interpreter that maps it, ``None`` for a static program.  ``obstacles`` has for each stage why no
    allowance of it can be used, or ``None``; ``foreign`` is why nothing that was decided of the first file
    alone holds for the others, or ``None``.
    """

    path: bytes
    argv: tuple[bytes, ...]
    complete: bool
    stages: tuple[Stage, ...]
    loader: Identified | None = None
    obstacles: tuple[Denied | None, ...] = (None,)
    foreign: Denied | None = None

    @property
    def final(self) -> Image:
        """The file that the task runs once the exec is done."""
        return self.stages[-1].found.image

    @property
    def final_argv(self) -> tuple[bytes, ...]:
        """The command line that the task has once the exec is done."""
        return self.stages[-1].argv

    @property
    def program(self) -> str:
        """Which file was to be started, for records: its resolved path, of a script the script's own."""
        return self.stages[0].found.path

    @property
    def command(self) -> tuple[bytes, ...]:
        """The command line, for records: its caller's text.

        A script's is the one that the kernel makes of it, and begins with the resolved path of the interpreter.
        """
        if len(self.stages) == 1:
            return self.argv
        return (os.fsencode(self.stages[-1].found.path), *self.final_argv[1:])

    @property
    def name(self) -> str:
        """What people call the program that was to be started, printable, and of a script also what runs it."""
        first, last = self.stages[0], self.stages[-1]
        name = first.found.name(os.path.basename(os.fsdecode(self.path)))
        if last is first:
            return name
        return f"{name} (script, run by {last.found.name(os.path.basename(os.fsdecode(last.path)))})"

    def question(self, stage: int, holder: int) -> Question:
        """What to ask about one stage."""
        found, argv, _ = self.stages[stage]
        program, name = found.program, b""
        if program.home:  # a decision is about this path: it tells hard links of one file apart
            name = os.fsencode(program.home)
        elif found.multicall:
            called = self.stages[stage].called
            program, name = found.as_called(called), os.fsencode(called_name(os.fsdecode(called)))
        return Question(holder, found.version, name, argv, self.complete, program)

    @property
    def told_stage(self) -> int:
        """The stage whose denial the user is told: a user's own script is its interpreter's start."""
        return 0 if self.stages[0].found.vouchable else len(self.stages) - 1


def read(task: Task, notification: seccomp.Notification, identifier: Identifier, owner: Owner) -> ExecRequest:
    """Reads and identifies what the waiting task is about to run; ``owner`` is its session's user.

    Raises ``OSError`` with the errno to fail the exec with: what the kernel would say (ENOENT,
    EACCES, EFAULT, ENOEXEC, ...), or EACCES where it cannot be told.
    """
    abi = seccomp.ABI_BY_ARCH[notification.arch]
    args = notification.args
    mask = (1 << 8 * abi.word) - 1
    if notification.nr == abi.execve:
        dirfd, path_at, argv_at = _AT_FDCWD, args[0] & mask, args[1] & mask
    elif notification.nr == abi.execveat:
        dirfd, path_at, argv_at = _signed(args[0]), args[1] & mask, args[2] & mask
    else:
        raise OSError(errno.ENOSYS, "not an exec")
    path, (argv, complete) = memory.read_call(notification.tid, path_at, argv_at, abi.word)
    if path is None:
        raise OSError(errno.ENAMETOOLONG, "path too long")
    try:
        here = dirfd == _AT_FDCWD or path.startswith(b"/")
        fd = task.open_program(path) if here else task.open_program_at(dirfd, path)
        return request_for(task, fd, path or b"/dev/fd/%d" % dirfd, argv, identifier, owner, complete=complete)
    finally:
        task.let_go()


def request_for(
    task: Task,
    fd: int,
    path: bytes,
    argv: tuple[bytes, ...],
    identifier: Identifier,
    owner: Owner | None = None,
    *,
    complete: bool = True,
) -> ExecRequest:
    """The request to start the program behind ``fd``, which this closes.  Raises ``OSError`` as ``read``."""
    try:
        stages = _stages(task, fd, path, argv, identifier, owner)
        found = stages[-1].found
        named = found.elf_interpreter
        loader = _identify(task.open_program(named), identifier) if named is not None else None
        if (
            len(stages) == 1
            and found.trusted
            and (loader is None or _is_the_machines(loader, named, identifier))
            and found.misnamed(stages[0].called) is None
        ):
            return ExecRequest(path, argv, complete, stages, loader)  # most are so, and this is done at every exec
        return ExecRequest(path, argv, complete, stages, loader, *_obstacles(task, stages, loader, identifier))
    finally:
        task.let_go()


def _stages(
    task: Task, fd: int, path: bytes, argv: tuple[bytes, ...], identifier: Identifier, owner: Owner | None
) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    while True:
        # only the file that the task names can be a program in a home: none is the interpreter of another
        found = _identify(fd, identifier, (task, owner) if owner is not None and not stages else None)
        stages.append(Stage(found, argv, path))
        if not isinstance(found.format, Shebang):
            break
        if len(stages) > NESTING_MAX:
            raise OSError(errno.ELOOP, "interpreters nested too deeply")
        argv = interpreter_argv(path, found.format, argv)
        path = found.format.interpreter
        fd = task.open_program(path)
    last = stages[-1].found
    if last.format is Format.OTHER and not last.trusted:
        # What the kernel would say, unless binfmt_misc knew it: shells then read the file themselves.
        raise OSError(errno.ENOEXEC, "no program format")
    return tuple(stages)


def _identify(fd: int, identifier: Identifier, named_by: tuple[Task, Owner] | None = None) -> Identified:
    """What is behind ``fd``, which this closes; ``named_by`` is the task that starts it, and its session's user."""
    try:
        found = identifier.identify(fd)
        return found if found.trusted or named_by is None else as_own(fd, found, *named_by)
    finally:
        os.close(fd)


# --- whether an allowance may be used ---------------------------------------------------------------


def _obstacles(
    task: Task, stages: tuple[Stage, ...], loader: Identified | None, identifier: Identifier
) -> tuple[tuple[Denied | None, ...], Denied | None]:
    """For each stage why its allowance cannot be used, or ``None``; and whether a file after the first is foreign.

    An allowance of a stage speaks for the later ones too, which nobody asks the broker about: so each of
    them must be the file that the machine has at its path.  And a script's interpreter opens the script
    again, by its path: who may run the script may make it run whatever they put there.  A file that is several
    programs, called by a name that it does not have, is none that a whitelist could name.
    """
    foreign = _foreign_loader(stages[-1], loader, identifier)
    found: list[Denied | None] = []
    view: View | None = None
    for stage in reversed(stages):
        obstacle = untrusted(stage.found) if not stage.found.vouchable else foreign
        if obstacle is None and stage.is_script:
            view = view or task.view()
            obstacle = _moving_script(stage, view, identifier)
        found.append(obstacle or stage.found.misnamed(stage.called))
        if foreign is None and stage is not stages[0] and not _is_the_machines(stage.found, stage.path, identifier):
            foreign = _foreign(stage.found, stage.path)
    return tuple(reversed(found)), foreign


def _foreign_loader(last: Stage, loader: Identified | None, identifier: Identifier) -> Denied | None:
    path = last.found.elf_interpreter
    if loader is None or path is None or _is_the_machines(loader, path, identifier):
        return None
    return _foreign(loader, path)


def _is_the_machines(found: Identified, path: bytes | None, identifier: Identifier) -> bool:
    return path is not None and found.trusted and identifier.is_at(path, found.image)


def _foreign(found: Identified, path: bytes) -> Denied:
    name = f"{word(os.fsdecode(path))}, its interpreter or loader,"
    help = f"{name} is not the file that this machine has at that path; is this a sandbox or a mount of your own?"
    if not found.trusted and found.visible:
        help = f"{name} could be changed by others than root"
    return Denied(Reason.PROGRAM_NOT_TRUSTED, help=help)


def _moving_script(stage: Stage, view: View, identifier: Identifier) -> Denied | None:
    """Whether a script's path leads to it when its interpreter opens it, too."""
    if view in identifier.views and identifier.is_fixed(stage.path) and identifier.is_at(stage.path, stage.found.image):
        return None
    help = f"its interpreter opens it again by its path: start it as {word(stage.found.path)}, outside of any sandbox"
    return Denied(Reason.PROGRAM_NOT_TRUSTED, help=help)


def untrusted(found: Identified) -> Denied:
    """The denial of a program that no whitelist can vouch for, whatever the whitelist says."""
    if not found.visible:
        why = "it is not a file of this machine that a whitelist could name"
    else:
        why = f"others than root could change {word(found.path)}, so no whitelist can vouch for it"
    return Denied(Reason.PROGRAM_NOT_TRUSTED, help=why)


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value & 0x80000000 else value
