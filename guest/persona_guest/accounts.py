"""What the user database says of a uid.  It may ask the network (NSS): never while an exec is judged."""

import contextlib
import grp
import os
import pwd

from persona_guest.core.pam_wire import Caller


def caller_of(uid: int) -> Caller | None:
    """The user database's word on a uid; none where it knows nobody of that number."""
    groups = []
    try:
        entry = pwd.getpwuid(uid)
        for gid in os.getgrouplist(entry.pw_name, entry.pw_gid):
            with contextlib.suppress(KeyError):
                groups.append(grp.getgrgid(gid).gr_name)
    except (KeyError, OSError):
        return None
    return Caller(uid, "persona-shell", entry.pw_name, "", entry.pw_shell, tuple(groups))


def user_name(uid: int) -> str:
    """The login name of a uid, or the number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OSError):
        return str(uid)
