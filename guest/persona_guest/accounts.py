"""What the user database says of a uid.  It may ask the network (NSS): never while an exec is judged."""

import contextlib
import grp
import os
import pwd

from persona.problems import Fault, PersonaError
from persona_guest.core.pam_wire import Caller


def caller_of(uid: int, shell: str = "") -> Caller:
    """The user database's word on a uid.  Raises ``PersonaError`` for one that it does not know."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise PersonaError(Fault.NOT_FOUND, f"uid {uid} is in no user database") from None
    groups = []
    for gid in os.getgrouplist(entry.pw_name, entry.pw_gid):
        with contextlib.suppress(KeyError):
            groups.append(grp.getgrgid(gid).gr_name)
    return Caller(uid, "persona-shell", entry.pw_name, "", shell or entry.pw_shell, tuple(groups))


def user_name(uid: int) -> str:
    """The login name of a uid, or the number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
