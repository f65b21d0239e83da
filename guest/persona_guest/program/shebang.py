"""What the first bytes of a program file say about how the kernel will start it."""

from enum import Enum
from typing import NamedTuple

HEAD_SIZE = 256  # BINPRM_BUF_SIZE: the kernel looks at no more
NESTING_MAX = 5  # exec_binprm(): an interpreter may itself be a script, so often and then ELOOP


class Shebang(NamedTuple):
    """The interpreter line: a path, and everything after it as one argument (execve(2))."""

    interpreter: bytes
    argument: bytes | None


class Format(Enum):
    """A program file that is not a script."""

    ELF = "elf"
    OTHER = "other"  # the kernel says ENOEXEC, unless binfmt_misc knows it


def parse_head(head: bytes) -> Shebang | Format:
    """Reads the head as load_script() in fs/binfmt_script.c does."""
    if head.startswith(b"\x7fELF"):
        return Format.ELF
    if not head.startswith(b"#!"):
        return Format.OTHER
    line, newline, _ = head[2:HEAD_SIZE].partition(b"\n")
    text = line.split(b"\0", 1)[0]
    stripped = text.strip(b" \t")
    if not stripped:
        return Format.OTHER
    words = stripped.replace(b"\t", b" ").split(b" ", 1)
    truncated = not newline and b"\0" not in line and len(head) >= HEAD_SIZE
    if truncated and len(words) == 1:
        return Format.OTHER  # the interpreter's path itself may be cut: the kernel refuses it too
    interpreter = words[0]
    argument = stripped[len(interpreter) :].strip(b" \t")
    return Shebang(interpreter, argument or None)


def interpreter_argv(script: bytes, shebang: Shebang, argv: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """The command line that the kernel makes for a script: interpreter, its argument, the script, the rest."""
    middle = (shebang.argument,) if shebang.argument is not None else ()
    return (shebang.interpreter, *middle, script, *argv[1:])
