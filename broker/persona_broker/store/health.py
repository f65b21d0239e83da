"""What VMs report of their health: one row each, replaced, with a number that says which rows are new."""

import json
import logging
from collections.abc import Collection, Iterable, Mapping

from persona.health import Bound, Report, decode_report, encode_report
from persona.problems import Fault, PersonaError
from persona_broker.policy.vm_health import Reported, past_bounds
from persona_broker.store.database import Database
from persona_broker.store.interface import ReportRow, Store

log = logging.getLogger("persona.record")

EVERY_S = 0.5  # no guest reports more often; its agent looks every few seconds


class Health(Database):
    """The part of the database that has what VMs said last of themselves."""

    def put_report(self, guest: str, report: Report, bounds: Iterable[Bound], now: float) -> None:
        """Replaces the guest's report, and what it is past of all bounds that there are.

        Raises ``PersonaError`` (overloaded) for one that reports all the time.
        """
        body = json.dumps(encode_report(report))
        with self.writing() as db:
            row = db.execute("SELECT at, past FROM health WHERE guest = ?", (guest,)).fetchone()
            if row is not None and 0 <= now - row[0] < EVERY_S:
                raise PersonaError(Fault.OVERLOADED, f"at most one report every {EVERY_S:g} s")
            every = frozenset(bounds)
            past = past_bounds(every, report, _past_before(row[1], every) if row is not None else frozenset())
            kept = json.dumps(sorted([bound.figure, bound.number, bound.percent] for bound in past))
            values = (guest, now, body, kept)
            db.execute("INSERT OR REPLACE INTO health (guest, at, report, past) VALUES (?, ?, ?, ?)", values)

    def reports_after(self, number: int) -> list[ReportRow]:
        """Those that were put after the one of this number, in order."""
        query = "SELECT seq, guest, at, report, past FROM health WHERE seq > ? ORDER BY seq"
        return [ReportRow(*row) for row in self.rows(query, number)]


def _past_before(text: str, every: frozenset[Bound]) -> frozenset[Bound]:
    try:
        return _past(text)
    except (ValueError, TypeError) as error:  # not known: as if it were past all of them
        log.error("what a VM was past before cannot be read: %s", error)
        return every


def _past(text: str) -> frozenset[Bound]:
    return frozenset(Bound(*item) for item in json.loads(text))


class Reports:
    """All reports, of which each look reads only those that are new.  One per reader, not for two threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen = 0
        self._known: dict[str, Reported] = {}

    def look(self, guests: Collection[str]) -> Mapping[str, Reported]:
        """By guest, of those that are registered; the same object while nothing is new."""
        rows = self._store.reports_after(self._seen)
        gone = self._known.keys() - guests
        if rows or gone:
            known = {guest: reported for guest, reported in self._known.items() if guest not in gone}
            for row in rows:
                self._seen = row.number
                try:
                    known[row.guest] = Reported(row.at, decode_report(json.loads(row.report)), _past(row.past))
                except (PersonaError, ValueError, TypeError) as error:  # another version of the broker wrote it
                    log.error("the report of %s cannot be read: %s", row.guest, error)
                    known.pop(row.guest, None)
            self._known = known
        return self._known
