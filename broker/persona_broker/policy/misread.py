"""Whitelist entries that only a shell would understand, or that can never allow anything: they do not do what they say.

A pattern names one program and its arguments.  People also write lines for a shell into it; those are read, and
match nothing that a shell would make of them.
"""

import re
import shlex
from collections.abc import Iterator
from enum import StrEnum

from persona.patterns import Pattern
from persona.program_facts import BUILTINS


class Misread(StrEnum):
    """Why an entry does nothing, or something else."""

    SHELL_SYNTAX = "shell_syntax"  # a word that a shell would act upon; here it is an argument like any other
    SHELL_BUILTIN = "shell_builtin"  # no program starts for it
    USERS_OWN = "users_own_program"  # lies where people keep files of their own


_OPERATOR = re.compile(r"\|\|?|&&?|;|[0-9&]?(?:>>?|<<?<?)[^'\"\\]*|[^'\"\\]+;")
_EXPANDED = re.compile(r"~(?:/.*)?|\$(?:[A-Za-z_{(].*)")
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*")
_ARGUMENTS_OF = {"find": ";", "fd": ";"}  # -exec CMD ;

_FOLDERS_OF_USERS = re.compile(r"/(?:home|root|tmp|var/tmp|dev/shm|run/user)/.*")


def misread(pattern: Pattern) -> Iterator[tuple[Misread, str]]:
    """What is wrong with the entry, in words with what to write instead; at most one of each kind."""
    text = pattern.text.removeprefix("!")
    program = str(pattern.words[0])
    if program in BUILTINS:
        yield (
            Misread.SHELL_BUILTIN,
            f"'{program}' is what a shell does itself: no program starts for it, and nothing decides it; leave it out, "
            "but where a program of this name is installed",
        )
    elif _FOLDERS_OF_USERS.fullmatch(program) and not pattern.negative:
        yield (
            Misread.USERS_OWN,
            "a program that its user can change never starts by a whitelist, whatever it says; for those in the "
            "user's own home write home_programs, else let root own the file and its folders "
            "(or see trusted_writable of guest.toml)",
        )
    if _ASSIGNMENT.fullmatch(program):
        yield (
            Misread.SHELL_SYNTAX,
            f"'{program}' sets a variable in a shell, and here it would be the program's name; begin with the "
            "program: no pattern looks at the environment",
        )
        return
    for word in _arguments(text):
        if _OPERATOR.fullmatch(word) and _ARGUMENTS_OF.get(program) != word:
            yield (
                Misread.SHELL_SYNTAX,
                f"'{word}' is an argument here: no shell reads a pattern, and each program of a line is decided by "
                f"itself; write an entry for each, or '\"{word}\"' in quotes of its own where it is meant",
            )
            return
        if _EXPANDED.fullmatch(word):
            yield (
                Misread.SHELL_SYNTAX,
                f"'{word}' stands for itself: nothing is expanded in a pattern, but in what the user's shell "
                "starts; write what it expands to, or a wildcard",
            )
            return


def _arguments(text: str) -> list[str]:
    """The words behind the program's, with their quotes."""
    try:
        return shlex.split(text, posix=False)[1:]
    except ValueError:  # an apostrophe behind a backslash: its author knows about quoting
        return []
