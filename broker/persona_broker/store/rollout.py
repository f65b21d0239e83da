"""What guests have said and were told of changes, and what was denied in a time."""

from collections.abc import Mapping

from persona_broker.policy.rollout import Denials, Seen
from persona_broker.store.database import Database

RECORDS_MAX = 50_000  # the newest, that are looked at: half a second of one core
_NEWEST = (
    "WITH newest AS MATERIALIZED (SELECT json_extract(body, '$.at') AS at, json_extract(body, '$.reason') AS reason,"
    " json_extract(body, '$.decision') AS decision FROM (SELECT body FROM records ORDER BY id DESC LIMIT ?)"
    " WHERE json_valid(body))"
)
_DENIED = f"{_NEWEST} SELECT reason, count(*) FROM newest WHERE decision = 'denied'"  # noqa: S608 - constants
_BOUNDS = f"{_NEWEST} SELECT count(*), min(at) FROM newest"  # noqa: S608 - constants


class Rollout(Database):
    """The part of the database that says how far a change has come."""

    def put_told(self, generations: Mapping[str, int], now: float) -> None:
        """What was written to the event streams of these guests; each is open."""
        self._put_seen("told", generations, now)

    def put_asked(self, generations: Mapping[str, int], now: float) -> None:
        """What these guests said that they know."""
        self._put_seen("asked", generations, now)

    def _put_seen(self, what: str, generations: Mapping[str, int], now: float) -> None:
        query = (
            f"INSERT INTO seen (guest, {what}, {what}_at) SELECT ?1, ?2, ?3"  # noqa: S608 - one of two words
            " WHERE ?1 IN (SELECT name FROM guests)"
            f" ON CONFLICT (guest) DO UPDATE SET {what} = max({what}, ?2), {what}_at = ?3"
        )
        with self.writing() as db:
            db.executemany(query, [(guest, generation, now) for guest, generation in generations.items()])

    def seen(self) -> dict[str, Seen]:
        """By guest, of those that were ever connected."""
        rows = self.rows("SELECT guest, told, told_at, asked, asked_at FROM seen")
        return {guest: Seen(*values) for guest, *values in rows}

    def denials(self, begin: float, end: float) -> Denials:
        """Of the newest records, by the clocks of the guests; less than the span where they do not go back so far."""
        with self.reading():
            rows = self.rows(f"{_DENIED} AND at >= ? AND at < ? GROUP BY reason", RECORDS_MAX, begin, end)
            ((count, oldest),) = self.rows(_BOUNDS, RECORDS_MAX)
        whole = count < RECORDS_MAX or not isinstance(oldest, int | float)
        return Denials(end - (begin if whole else min(end, max(begin, oldest))), {str(name): n for name, n in rows})
