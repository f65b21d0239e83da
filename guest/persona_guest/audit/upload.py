"""Every decision on its way to the journal and to the broker's record, never in the way of an exec.

The loop appends to a bounded queue.  A thread writes: to the journal first, then to the spool, and has the disk keep it
every half second.  Another thread sends what is in the spool (sender.py).  What finds no room is numbered all the same,
and the broker is told which numbers: nothing is lost silently.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable

from persona.decisions import Denied
from persona.problems import Reason
from persona.record_codec import Record
from persona_guest.audit.sender import Sender
from persona_guest.audit.spool import Spool
from persona_guest.settings import Broker

log = logging.getLogger("persona.record")

_QUEUE_MAX = 20_000
_COMMIT_S = 0.5
_LAST_TRY_S = 3.0
_END_S = 2.0  # with the last try, of systemd's TimeoutStopSec=10s


_FULL = "this machine has no room left to record what you start until its broker takes records again; tell its operator"


# One that is there, or what makes it in the recorder's thread, where it may wait for others.
Recordable = Record | Callable[[], Record]


class Recorder:
    """``add`` and ``refusal`` from the loop's thread, all else in the recorder's own.

    Every record is in the journal within a moment, and a moment later in the spool, also while the broker is away.
    """

    def __init__(self, settings: Broker, journal: Callable[[Record], None], spool: Spool | None = None) -> None:
        """Without a ``spool`` records wait in memory."""
        self._queue: deque[Recordable] = deque()  # from the loop to the journal
        self._added: Counter[str] = Counter()  # by user; the loop's thread alone writes these three
        self._dropped = 0
        self._taken: Counter[str] = Counter()  # by user; the recorder's alone writes these two
        self._told = 0  # of those dropped
        self._journal = journal
        self.spool = Spool() if spool is None else spool
        self._sender = Sender(settings, self.spool)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def add(self, record: Recordable) -> None:
        """Takes a record; where too many wait for the journal already, counts it as lost instead."""
        user = _user(record)
        if self._has_room(user, grant=_is_start(record)):
            self._queue.append(record)
            self._added[user] += 1
        else:
            self._dropped += 1

    def refusal(self, user: str) -> Denied | None:
        """The denial of one more start of this user's that might not be recorded; ``None`` while there is room."""
        full = self.spool.is_full(user) or not self._has_room(user, grant=True)
        return Denied(Reason.AUDIT_FULL, help=_FULL) if full else None

    def close(self) -> None:
        """One last try to send, for a few seconds at most; afterwards journal and spool have every record."""
        self._stop.set()
        self._thread.join(_END_S)
        if self._thread.is_alive():  # in the journal, on a disk, or in a look-up of a name
            log.error("the recorder hangs; %d records may be in no journal", len(self._queue))
            self._sender.finish(0.0)
            return
        self._sender.finish(_LAST_TRY_S)
        self._commit()  # what was added last, and what the broker refused last
        self.spool.close()

    def _has_room(self, user: str, *, grant: bool) -> bool:
        """As in a spool (room.py), once a quarter is taken."""
        waiting = len(self._queue)
        if waiting < _QUEUE_MAX // 4:
            return True
        most = _QUEUE_MAX * 3 // 4 if grant else _QUEUE_MAX
        return self._added[user] - self._taken[user] < (most - waiting) // 4

    def _run(self) -> None:
        self.spool.open()
        self._sender.start()
        while not self._stop.wait(_COMMIT_S):
            self._commit()
        self._commit()

    def _commit(self) -> None:
        records: list[Record] = []
        while self._queue and len(records) < _QUEUE_MAX:
            taken = self._queue.popleft()
            self._taken[_user(taken)] += 1
            record = taken() if callable(taken) else taken
            self._journal(record)
            records.append(record)
        dropped = self._dropped
        self.spool.add(records, dropped - self._told)
        self._told = dropped
        if self.spool.status().waiting:
            self._sender.wake()
        self.spool.sync()


def _user(record: Recordable) -> str:
    return record.user if isinstance(record, Record) else ""


def _is_start(record: Recordable) -> bool:
    """As in a spool: what started, also what complain mode let go on."""
    return isinstance(record, Record) and record.event == "exec" and (record.decision == "granted" or record.complain)
