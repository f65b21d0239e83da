"""Which shell a user gets, by files that root alone writes.  Imports next to nothing: persona-shell pays for it."""

import os

SHELLS = "/etc/persona/shells"  # lines "USER SHELL": whose real shell is not DEFAULT
DEFAULT = "/bin/bash"


def real_shell(user: str, recorded: str) -> str:
    """The shell to become: the user's line in SHELLS, else the user database's, else bash."""
    name = os.fsencode(user)
    try:
        with open(SHELLS, "rb") as file:  # bytes: a name may hold white space of another script
            for line in file:
                words = line.split()
                if len(words) == 2 and words[0] == name and words[1].startswith(b"/"):
                    return os.fsdecode(words[1])
    except OSError:
        pass  # most machines have none
    return recorded if recorded and os.path.basename(recorded) != "persona-shell" else DEFAULT


def login_shells() -> list[str]:
    """The login shells that shells(5) lists; empty where there is no such file."""
    try:
        with open("/etc/shells", "rb") as file:
            return [os.fsdecode(line) for line in file.read().split(b"\n") if line.startswith(b"/")]
    except OSError:
        return []
