"""What guests have said and were told of changes."""

from collections.abc import Mapping

from persona_broker.policy.rollout import Seen
from persona_broker.store.database import Database


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
