"""What the user database says of a uid.  It may ask the network (NSS): never while an exec is judged."""

import contextlib
import grp
import os
import pwd
import time
from collections.abc import Callable

from persona_guest.core.pam_protocol import Caller

_KNOWN_S = 60.0
_KNOWN_MAX = 1024


def caller_of(uid: int) -> Caller | None:
    """A user as the user database has them, with all groups that have a name; ``None`` where it has no answer."""
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


class Names:
    """Login names, or numbers, of which each is looked up once a minute at most: a look-up that fails may take long.

    For one thread.
    """

    def __init__(self, look_up: Callable[[int], str] = user_name, clock: Callable[[], float] = time.monotonic) -> None:
        self._look_up = look_up
        self._clock = clock
        self._known: dict[int, tuple[float, str]] = {}  # by uid: until when, and the name; the oldest first

    def of(self, uid: int) -> str:
        """The name of one user; may wait for the network."""
        until, name = self._known.get(uid, (0.0, ""))
        if self._clock() < until:
            return name
        self._known.pop(uid, None)
        name = self._look_up(uid)
        if len(self._known) >= _KNOWN_MAX:
            del self._known[next(iter(self._known))]
        self._known[uid] = self._clock() + _KNOWN_S, name
        return name
