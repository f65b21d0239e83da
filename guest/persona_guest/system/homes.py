"""Where users have their homes, by the account database, never by ``$HOME``.

The database may ask the network (NSS), so it is asked in a thread, one user after the other, and no exec waits for it:
until there is an answer a user has no home here, and nothing in it is allowed.
"""

import logging
import pwd
import threading
import time
from collections.abc import Callable

log = logging.getLogger("persona.gate")

_KNOWN_S = 60.0  # an answer is asked for again after this
_UNKNOWN_S = 5.0  # and that there was none after this: a directory server may have been away
_KNOWN_MAX = 4096


def home_in_database(uid: int) -> str:
    """The home directory of a uid; empty where the database knows none."""
    try:
        return pwd.getpwuid(uid).pw_dir
    except (KeyError, OSError):
        return ""


class Homes:
    """Answers from what is known, for the loop's thread; ``deliver`` runs a callback there."""

    def __init__(
        self,
        deliver: Callable[[Callable[[], None]], None],
        look_up: Callable[[int], str] = home_in_database,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deliver = deliver
        self._look_up = look_up
        self._clock = clock
        self._known: dict[int, tuple[float, str]] = {}  # by uid: until when, and the home
        self._wanted: dict[int, None] = {}  # in the order in which they are asked for; the first is under way

    def of(self, uid: int) -> str:
        """The home of a uid as far as it is known; one that is not, or not lately, is asked for meanwhile."""
        until, home = self._known.get(uid, (0.0, ""))
        if self._clock() >= until:
            self.want(uid)
        return home

    def want(self, uid: int) -> None:
        """Asks for a home that will be needed soon."""
        if uid not in self._wanted:
            self._wanted[uid] = None
            if len(self._wanted) == 1:
                self._begin(uid)

    def _begin(self, uid: int) -> None:
        try:
            threading.Thread(target=self._ask, args=(uid,), name="home", daemon=True).start()
        except RuntimeError:  # no thread to be had now: whoever needs one of them asks again
            self._wanted.clear()

    def _ask(self, uid: int) -> None:
        home = self._look_up(uid)
        self._deliver(lambda: self._answered(uid, home))

    def _answered(self, uid: int, home: str) -> None:
        if len(self._known) >= _KNOWN_MAX:
            self._known.clear()
        self._known[uid] = self._clock() + (_KNOWN_S if home else _UNKNOWN_S), home
        self._wanted.pop(uid, None)
        if self._wanted:
            self._begin(next(iter(self._wanted)))
