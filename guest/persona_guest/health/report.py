"""Measures this machine's health and reports it to the broker: at an interval, and at once what is news.

A thread of its own, with a connection of its own: whatever it waits for, no exec does.  When it hangs, so do its
reports, and the broker takes the machine's health for unknown.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any

from persona import wire
from persona.health import MOUNTS_MAX, RESOURCES, UNITS_MAX, Report, Space, encode_report
from persona_guest.broker.http import BrokerError, Connection
from persona_guest.health import rules
from persona_guest.settings import Broker
from persona_guest.system.units import Units, UnitsError

log = logging.getLogger("persona.health")

MEASURE_S = 5.0
REPORT_S = 15.0  # the broker forgets after three times that
_ENTRIES_AT_ONCE = 2000
_PRIORITIES = range(4)  # emerg, alert, crit, err: syslog(3)


class Journal:
    """Counts the journal's errors, through python3-systemd; ``None`` where it cannot be read."""

    def __init__(self, uid_min: int) -> None:
        self._uid_min = uid_min
        self._errors = rules.Errors()
        self._reader: Any = None

    def count(self, now: float) -> int | None:
        """Errors of the machine's own in the minute before ``now`` (Unix seconds)."""
        try:
            if self._reader is None:
                self._reader = self._open(now)
            self._read(now)
        except (ImportError, OSError, ValueError) as error:
            log.debug("the journal cannot be read: %s", error)
            self._reader = None
            return None
        return self._errors.count(now)

    def _open(self, now: float) -> Any:
        from systemd import journal  # type: ignore[attr-defined,import-not-found,unused-ignore]  # only a guest has it

        reader = journal.Reader(journal.LOCAL_ONLY | journal.SYSTEM)
        for priority in _PRIORITIES:  # the same field again means 'or'
            reader.add_match(PRIORITY=str(priority))
        reader.seek_realtime(now - rules.WINDOW_S)
        return reader

    def _read(self, now: float) -> None:
        self._reader.wait(0)  # takes notice of files that came or went
        for _ in range(_ENTRIES_AT_ONCE):
            try:
                entry = self._reader.get_next()
            except OSError:
                raise
            except Exception as error:  # python3-systemd converts fields that any sender may set, and is past it then
                log.debug("an entry of the journal cannot be read: %r", error)
                continue
            if not entry:
                return
            if rules.counts(entry, self._uid_min):
                self._errors.add(entry["__REALTIME_TIMESTAMP"].timestamp(), now)
        self._reader.seek_realtime(now)  # a flood: what is left of it would only be more of the same


class Watch:
    """Measures; each figure that cannot be had is left out, and says nothing of the others."""

    def __init__(
        self,
        uid_min: int,
        layers: Callable[[], Mapping[str, bool]],
        proc: Path = Path("/proc"),
        dmi: Path = Path("/sys/class/dmi/id"),
    ) -> None:
        self._journal = Journal(uid_min)
        self._units = Units()
        self._layers = layers
        self._proc = proc
        self._dmi = dmi

    def measure(self, clock_skew_s: float | None) -> Report:
        """All figures as they are now.  May wait, for systemd or a disk."""
        cpus = os.cpu_count() or 1
        pressures = {name: self._figure(f"pressure/{name}", rules.pressure) for name in RESOURCES}
        return Report(
            disks=self._disks(),
            memory=self._figure("meminfo", rules.memory),
            pressure={name: some for name, some in pressures.items() if some is not None},
            load=self._figure("loadavg", lambda text: rules.load_average(text, cpus)),
            failed_units=self._failed_units(),
            errors=self._journal.count(time.time()),
            clock_skew_s=clock_skew_s,
            layers=dict(self._layers()),
            wire=wire.CURRENT,
            uuid=self._uuid(),
        )

    def _uuid(self) -> str:
        """That of the firmware, which only root may read; nothing where there is none."""
        try:
            text = (self._dmi / "product_uuid").read_text("ascii").strip()
        except (OSError, ValueError):
            return ""
        return rules.firmware_uuid(text)

    def _disks(self) -> dict[str, Space]:
        found = {}
        for path in self._figure("self/mountinfo", rules.real_mounts) or ():
            try:
                status = os.statvfs(path)
            except OSError as error:
                log.debug("%s: %s", path, error)
                continue
            # as df(1): of what is neither root's reserve nor taken
            usable = status.f_blocks - status.f_bfree + status.f_bavail
            shown = os.fsencode(path).decode("utf-8", "backslashreplace")  # the report is text
            found[shown] = Space(usable * status.f_frsize, status.f_bavail * status.f_frsize)
        return dict(sorted(found.items(), key=lambda item: item[1].free_percent)[:MOUNTS_MAX])

    def _failed_units(self) -> tuple[str, ...] | None:
        try:
            return tuple(unit for unit in self._units.failed() if not rules.is_users(unit))[:UNITS_MAX]
        except UnitsError as error:
            log.debug("failed units cannot be told: %s", error)
            return None

    def _figure(self, name: str, parse: Callable[[bytes], Any]) -> Any:
        try:
            return parse((self._proc / name).read_bytes())
        except (OSError, ValueError):
            return None


class Reporter:
    """Measures and reports for as long as the agent runs, in a thread of its own."""

    def __init__(self, settings: Broker, watch: Watch) -> None:
        self._settings = settings
        self._watch = watch
        self._connection = Connection(settings)
        self._skew: float | None = None
        self._sent: tuple[float, Report] | None = None
        self._refused = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Asks the thread to end; it does after its next measurement at the latest, and sends no more."""
        self._stop.set()
        self._connection.end()

    def _run(self) -> None:
        self.round(time.monotonic())
        wait_s = 1.0  # the second report follows soon: only the answer to the first tells how the clock goes
        while not self._stop.wait(wait_s):
            self.round(time.monotonic())
            wait_s = MEASURE_S

    def round(self, now: float) -> None:
        """Measures once, and reports where it is due; ``now`` is monotonic."""
        report = self._watch.measure(self._skew)
        if self._sent is None or now - self._sent[0] >= REPORT_S or rules.is_news(self._sent[1], report):
            self._send(report, now)

    def _send(self, report: Report, now: float) -> None:
        deadline = time.monotonic() + self._settings.timeout_s * 5
        sent = time.time()
        try:
            status, _ = self._connection.call("POST", "/v1/health", partial(encode_report, report), deadline)
        except BrokerError as error:
            log.debug("no report: %s", error.message)
            self._sent = None  # after the next measurement again
            return
        if status != 204 and status != self._refused:
            log.error("the broker does not take the report of this machine's health: HTTP status %d", status)
        self._refused = 0 if status == 204 else status
        self._sent = (now, report)
        self._note_clock(sent, time.time())

    def _note_clock(self, sent: float, received: float) -> None:
        try:
            answered = parsedate_to_datetime(self._connection.dated or "").timestamp()
        except ValueError:
            return
        skew = rules.clock_skew(sent, received, answered)
        if skew is not None:
            self._skew = skew
