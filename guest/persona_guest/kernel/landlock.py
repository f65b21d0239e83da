"""Landlock, as far as the fallback needs it: programs start below some directories, and nowhere else.

Calls and constants are those of <linux/landlock.h>.  A rule set is a descriptor, which may be handed to the
process that is to be bound; once it is, its descendants are too, root among them, and none of them gets out.
"""

import os
import struct
from collections.abc import Iterable

from persona_guest.kernel.libc import LIBC, failure

# The same numbers on every architecture that Linux has had these calls on.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_EXECUTE, _REFER = 1 << 0, 1 << 13
_RULESET_ATTR = struct.Struct("=Q")
_PATH_BENEATH_ATTR = struct.Struct("=Qi")
# The first one knows no REFER: there, nobody who is bound could move a file from one directory to another.
_ABI_MIN = 2


def _call(number: int, what: str, *arguments: object) -> int:
    result: int = LIBC.syscall(number, *arguments)
    if result < 0:
        raise failure(what)
    return result


def is_usable() -> bool:
    """Whether this kernel has Landlock, switched on and recent enough (Linux 5.19)."""
    try:
        return _call(_CREATE_RULESET, "landlock_create_ruleset", None, 0, _CREATE_RULESET_VERSION) >= _ABI_MIN
    except OSError:
        return False


def starting_below(directories: Iterable[str]) -> int:
    """The descriptor of a rule set: execve(2) of files below ``directories`` only, as far as those are there.

    Files may be moved as before, except to where they could then be started.  Raises ``OSError``.
    """
    handled = _RULESET_ATTR.pack(_EXECUTE | _REFER)
    ruleset = _call(_CREATE_RULESET, "landlock_create_ruleset", handled, len(handled), 0)
    try:
        _allow(ruleset, "/", _REFER)
        for directory in directories:
            try:
                _allow(ruleset, directory, _EXECUTE)
            except FileNotFoundError:
                continue
    except BaseException:
        os.close(ruleset)
        raise
    return ruleset


def _allow(ruleset: int, path: str, access: int) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _call(_ADD_RULE, "landlock_add_rule", ruleset, _RULE_PATH_BENEATH, _PATH_BENEATH_ATTR.pack(access, parent), 0)
    finally:
        os.close(parent)


def restrict_self(ruleset: int) -> None:
    """Binds the calling thread.  Needs no_new_privs or CAP_SYS_ADMIN; raises ``OSError``."""
    _call(_RESTRICT_SELF, "landlock_restrict_self", ruleset, 0)
