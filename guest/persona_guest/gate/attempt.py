"""One execve as the kernel will see it: the program file, and for a script the chain of its interpreters."""

import errno
import os
from typing import NamedTuple

from persona_guest.core.leases import Question
from persona_guest.core.script import NESTING_MAX, Format, Shebang, interpreter_argv
from persona_guest.gate.identity import Identified, Identifier, Image
from persona_guest.kernel import memory, seccomp
from persona_guest.kernel.task import Task

_AT_FDCWD = -100


class Attempt(NamedTuple):
    """What a task is about to run.

    ``stages`` is the file itself, then, for a script, the same start seen as its interpreter's: any
    of them may be what a whitelist names.  The last stage is what really runs.
    """

    path: bytes
    argv: tuple[bytes, ...]
    complete: bool
    stages: tuple[tuple[Identified, tuple[bytes, ...]], ...]

    @property
    def final(self) -> Image:
        """The file that the task runs once the exec is done."""
        return self.stages[-1][0].image

    @property
    def final_argv(self) -> tuple[bytes, ...]:
        """The command line that the task has once the exec is done."""
        return self.stages[-1][1]

    def question(self, stage: int, holder: int) -> Question:
        """What to ask about one stage."""
        found, argv = self.stages[stage]
        argv0 = argv[0] if argv else b""
        return Question(
            holder,
            found.image,
            argv0 if found.multicall else b"",
            argv,
            self.complete,
            found.as_called(argv0),
        )


def read(task: Task, notification: seccomp.Notification, identifier: Identifier) -> Attempt:
    """Reads and identifies what the waiting task is about to run.

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
    here = dirfd == _AT_FDCWD or path.startswith(b"/")
    fd = task.open_program(path) if here else task.open_program_at(dirfd, path)
    shown = path or b"/dev/fd/%d" % dirfd
    return look(task, fd, shown, argv, identifier, complete=complete)


def look(
    task: Task,
    fd: int,
    path: bytes,
    argv: tuple[bytes, ...],
    identifier: Identifier,
    *,
    complete: bool = True,
) -> Attempt:
    """The attempt to start the program behind ``fd``, which this closes.  Raises ``OSError`` as ``read``."""
    return Attempt(path, argv, complete, _stages(task, fd, path, argv, identifier))


def _stages(
    task: Task, fd: int, path: bytes, argv: tuple[bytes, ...], identifier: Identifier
) -> tuple[tuple[Identified, tuple[bytes, ...]], ...]:
    stages: list[tuple[Identified, tuple[bytes, ...]]] = []
    while True:
        try:
            found = identifier.identify(fd)
        finally:
            os.close(fd)
        stages.append((found, argv))
        if not isinstance(found.format, Shebang):
            break
        if len(stages) > NESTING_MAX:
            raise OSError(errno.ELOOP, "interpreters nested too deeply")
        argv = interpreter_argv(path, found.format, argv)
        path = found.format.interpreter
        fd = task.open_program(path)
    last = stages[-1][0]
    if last.format is Format.OTHER and not last.trusted:
        # What the kernel would say, unless binfmt_misc knew it: shells then read the file themselves.
        raise OSError(errno.ENOEXEC, "no program format")
    return tuple(stages)


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value & 0x80000000 else value
