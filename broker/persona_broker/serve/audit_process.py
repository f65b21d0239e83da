"""The audit's own process: takes over what waits in the database, makes checkpoints, and feeds the sinks.

It is ended after those that append, so that its last checkpoint is of the last record.  Whatever fails here is told and
tried again; no decision and no append waits for it.
"""

import logging
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from persona.problems import PersonaError
from persona.version import VERSION
from persona_broker import metrics
from persona_broker.audit import checkpoints, keys
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.checkpoint import Checkpoint
from persona_broker.audit.core.events import event
from persona_broker.audit.core.loss import Loss
from persona_broker.audit.files import beside
from persona_broker.audit.inbox import take_over
from persona_broker.audit.index import Indexer
from persona_broker.audit.loss import acknowledged
from persona_broker.audit.prune import older, prune_one
from persona_broker.audit.sinks.interface import Sink
from persona_broker.audit.sinks.journald import Journald
from persona_broker.audit.sinks.json_lines import JsonLines
from persona_broker.audit.sinks.runner import Runner
from persona_broker.audit.sinks.syslog import Syslog
from persona_broker.settings import Audit, Settings
from persona_broker.store.sqlite import SqliteStore

log = logging.getLogger("persona.audit")

CHECKPOINT_EVERY_S = 60.0
_LOOK_EVERY_S = 0.5
_PRUNE_EVERY_S = 86_400.0
_CLOCK_OFF_MAX_S = 7 * 86_400
_SAY_EVERY_S = 60.0
_PRUNE = "prune "  # the name of a step, before that of the day
_SINKS_END_S = 1.5  # of the 5 s that a part has to end


def run(settings: Settings) -> None:
    """Until SIGTERM; its last act is a checkpoint."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    metrics.use_row(metrics.AUDIT_ROW)
    worker = Worker(settings)
    worker.begin()
    while not stop.wait(_LOOK_EVERY_S):
        worker.look()
    worker.end()


class Worker:
    """What the process does, step by step."""

    def __init__(self, settings: Settings) -> None:
        db = Path(settings.db)
        self._store = SqliteStore(db)
        self._chain = Chain(beside(db))
        self._key: keys.SigningKey | None = None
        self._seen = -1  # the database's data_version
        self._checkpointed = 0  # number of the record of the last checkpoint
        self._checkpoint_at = 0.0  # monotonic: when the next is due
        self._keep_days = settings.audit.keep_days
        self._prune_at = 0.0  # monotonic: when old days are looked for next
        self._old: list[str] = []  # days that are still to be looked at
        self._began = time.time()
        # when the newest record from before this start came, and monotonic: when it was read; None: not yet
        self._newest: tuple[float, float] | None = None
        self._clock_said = False
        self._failing: dict[str, float] = {}  # steps that failed when last tried, and monotonic: when that was said
        # what a start does once: before the first record is taken over, and after the first checkpoint
        self._first: list[tuple[str, Callable[[], object]]] = [
            ("start", self._say_started),
            ("sweep", self._chain.sweep),
            ("compare", self._compare),
            ("key", self._load_key),
        ]
        self._then: list[tuple[str, Callable[[], object]]] = [("compare earlier", self._compare_earlier)]
        self._indexer = Indexer(self._chain)
        self._runners = [
            Runner(sink, self._chain, SqliteStore(db), partial(metrics.sink, sink.name))
            for sink in sinks_of(settings.audit)
        ]

    def begin(self) -> None:
        """The first look, which says that the broker started."""
        self.look()
        self._indexer.start()
        for runner in self._runners:
            runner.start()

    def look(self) -> None:
        """Takes over what waits, and makes a checkpoint where one is due; first what the start has still to do."""
        self._do(self._first)
        self._try("take over", self._take_over)
        if self._newest is None:  # only pruning waits for it
            self._try("newest", self._read_newest)
        if self._key is not None and time.monotonic() >= self._checkpoint_at:
            self._try("checkpoint", partial(self._checkpoint, self._key))
        if not self._first:
            self._do(self._then)
        due = self._old or time.monotonic() >= self._prune_at
        if self._keep_days and due and self._key is not None and self._newest is not None:
            self._prune(self._key, *self._newest)
        self._try("number", self._tell_number)

    def end(self) -> None:
        """Takes over what waits still, and makes the last checkpoint; the sinks get it where they are quick."""
        self._indexer.stop(_SINKS_END_S)
        self._do(self._first)
        self._try("take over", self._take_over)
        self._try("stop", lambda: self._chain.add([event("broker_stopped", time.time())]))
        if self._key is not None:
            self._try("checkpoint", partial(self._checkpoint, self._key))
        for runner in self._runners:
            runner.stop(_SINKS_END_S)

    def _read_newest(self) -> None:
        at = self._chain.newest_before(self._began)  # records may have come before it could be read
        self._newest = (at or time.time(), time.monotonic())  # a new chain has none

    def _say_started(self) -> None:
        self._chain.add([event("broker_started", time.time(), version=VERSION)])

    def _load_key(self) -> None:
        self._key, made = keys.load_or_make(keys.key_file(self._chain.directory))
        if made:
            self._chain.add([event("audit_key_made", time.time(), key=self._key.public.id)])

    def _compare(self) -> None:
        """Says at once where the chain does not reach the last checkpoint: somebody took its end away."""
        here, number = self._chain.id(), self._chain.head()[0]
        beyond = [item for item in checkpoints.newest_of_each(self._store) if item.number > number]
        self._gone([item for item in beyond if item.chain == here])

    def _compare_earlier(self) -> None:
        """Says it of chains before this one as well, unless somebody acknowledged that they are gone.

        To know that, the chain is searched, which takes long where its days have no index.
        """
        here, number = self._chain.id(), self._chain.head()[0]
        beyond = [item for item in checkpoints.newest_of_each(self._store) if item.number > number]
        earlier = [item for item in beyond if item.chain != here]
        if earlier:
            told = self._acknowledged()
            self._gone([item for item in earlier if not any(loss.covers(item.chain, item.number) for loss in told)])

    def _acknowledged(self) -> list[Loss]:
        """None where the chain cannot be searched: a damaged day must not hide that records are gone."""
        try:
            return acknowledged(self._chain, [self._key.public] if self._key is not None else [])
        except (sqlite3.Error, OSError, ValueError) as error:
            log.warning("whether the loss of an earlier chain was acknowledged cannot be read: %s", error)
            return []

    def _gone(self, proven: Sequence[Checkpoint]) -> None:
        if proven:
            log.critical(
                "the audit in %s ends before record %d, of which there is a checkpoint: records are gone"
                " ('persona-broker audit verify' says which)",
                self._chain.directory,
                max(item.number for item in proven),
            )

    def _take_over(self) -> None:
        written = self._store.data_version()
        if written != self._seen:
            take_over(self._store, self._chain)
            self._seen = written

    def _checkpoint(self, key: keys.SigningKey) -> None:
        self._checkpoint_at = time.monotonic() + CHECKPOINT_EVERY_S
        metrics.audit_missing(self._chain.missing())
        self._chain.settle()
        made = checkpoints.make(self._chain, key)
        if made is None or made.number == self._checkpointed:
            return
        checkpoints.put(self._store, [made])
        self._checkpointed = made.number
        metrics.checkpoint_made(made.at_us / 1e6)

    def _tell_number(self) -> None:
        metrics.audit_number(self._chain.head()[0])

    def _prune(self, key: keys.SigningKey, newest_at: float, since: float) -> None:
        """Looks at the next day that is older than ``audit.keep_days``; one, since records and SIGTERM wait for it."""
        if not self._clock_is_right(newest_at, since):
            self._old = []
            self._prune_at = time.monotonic() + _PRUNE_EVERY_S
        elif self._old:
            name = self._old.pop(0)
            self._try(_PRUNE + name, partial(self._prune_day, key, name))
        else:
            self._try("look for old days", self._look_for_old)

    def _look_for_old(self) -> None:
        self._prune_at = time.monotonic() + _PRUNE_EVERY_S
        self._old = older(self._chain, self._keep_days, time.time())
        for step in list(self._failing):
            if step.startswith(_PRUNE) and step.removeprefix(_PRUNE) not in self._old:
                del self._failing[step]  # the day is gone, by other hands

    def _prune_day(self, key: keys.SigningKey, name: str) -> None:
        day = prune_one(self._store, self._chain, key, name, self._keep_days, time.time())
        if day is not None:
            log.warning("audit.keep_days: %s %s", name, f"stays: {day.stays}" if day.stays else "was deleted")

    def _clock_is_right(self, newest_at: float, since: float) -> bool:
        """Whether it agrees with the newest record from before this start: by a wrong one everything would go."""
        if abs(time.time() - newest_at - (time.monotonic() - since)) <= _CLOCK_OFF_MAX_S:
            return True
        if not self._clock_said:
            self._clock_said = True
            log.warning(
                "audit.keep_days: nothing is deleted, since the newest record from before this start is more than"
                " %d days from what the clock says; where the clock is right, restart the broker",
                _CLOCK_OFF_MAX_S // 86_400,
            )
        return False

    def _do(self, steps: list[tuple[str, Callable[[], object]]]) -> None:
        """Each of these in turn, once; the one that fails, and those after it, are left for the next look."""
        while steps and self._try(*steps[0]):
            steps.pop(0)

    def _try(self, name: str, step: Callable[[], object]) -> bool:
        """Whether it worked; the audit fails while any step does, and each says so by itself."""
        try:
            step()
        except Exception as error:  # a bug here must not end the parts that decide, as the end of this one would
            now, said = time.monotonic(), self._failing.get(name)
            if said is None or now - said > _SAY_EVERY_S:
                said = now
                foreseen = isinstance(error, sqlite3.Error | OSError | PersonaError)
                log.critical("the audit does not work: %s", error, exc_info=None if foreseen else error)
            self._failing[name] = said
        else:
            self._failing.pop(name, None)
        metrics.audit_failing(bool(self._failing))
        return name not in self._failing


def sinks_of(audit: Audit) -> list[Sink]:
    """What the settings name."""
    found: list[Sink] = []
    if audit.journald:
        found.append(Journald())
    if audit.syslog:
        scheme, _, address = audit.syslog.partition("://")
        host, _, port = address.rpartition(":")
        ca_file = audit.syslog_ca if scheme == "tls" else None
        found.append(Syslog(host.strip("[]"), int(port), ca_file, _hostname()))
    if audit.json_lines:
        found.append(JsonLines(Path(audit.json_lines)))
    return found


def _hostname() -> str:
    """This machine's name as a syslog message may have it."""
    name = "".join(char for char in socket.gethostname() if 33 <= ord(char) <= 126)
    return name[:255] or "-"
