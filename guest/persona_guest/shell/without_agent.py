"""Whether ``persona-shell`` goes on where the agent cannot be asked: as the PAM module does, by what the agent left.

Root, system accounts and the break-glass group are let in, and everybody in complain mode.
"""

import grp
import syslog
from enum import StrEnum
from pathlib import Path

from persona_guest.core.accounts import UID_MIN, is_root_or_system, uid_min_of
from persona_guest.core.state_line import SIZE_MAX, GateFile, parse

STATE = Path("/var/lib/persona/gate.state")
LOGIN_DEFS = Path("/etc/login.defs")


class Why(StrEnum):
    """Why a login goes on without a gate."""

    NEVER_GATED = "never_gated"
    BREAK_GLASS = "break_glass"
    COMPLAIN = "complain"


def why_let_in(uid: int, gids: list[int], state: Path = STATE, login_defs: Path = LOGIN_DEFS) -> Why | None:
    """``None``: the login must be refused.  ``gids`` are all groups of the process."""
    left = _read(state, login_defs)
    if is_root_or_system(uid, left.uid_min):
        return Why.NEVER_GATED
    if left.break_glass and _gid(left.break_glass) in gids:
        syslog.syslog(syslog.LOG_ALERT, f"BREAK GLASS: uid {uid} logs in ungated by persona-shell, without an agent")
        return Why.BREAK_GLASS
    return None if left.enforce else Why.COMPLAIN


def _read(state: Path, login_defs: Path) -> GateFile:
    """A missing file is a fresh installation, or a gate that was released: complain."""
    try:
        uid_min = uid_min_of(login_defs.read_bytes())
    except OSError:
        uid_min = UID_MIN
    try:
        with state.open("rb") as file:
            content = file.read(SIZE_MAX + 1)
    except FileNotFoundError:
        return GateFile(False, uid_min)
    except OSError:
        return GateFile(True, uid_min)
    return parse(content.decode("ascii", "replace") if len(content) <= SIZE_MAX else "", uid_min)


def _gid(group: str) -> int | None:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None
