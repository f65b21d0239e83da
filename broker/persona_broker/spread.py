"""How far a change-set has come, and whether more is denied since: what ``rollout`` and the metrics say."""

import logging
import sqlite3
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from persona_broker.policy.rollout import SPAN_MAX_S, Denials, Moved, Seen, Taken, moved, taken
from persona_broker.store.interface import ChangeSet, Store, StoreError

log = logging.getLogger("persona.audit")

_FRESH_S = 30.0  # it counts records, and is asked for by whoever scrapes
Counted = Callable[[float, float], Denials]  # denials from a moment until before another, as the audit has them


@dataclass(frozen=True, slots=True)
class Spread:
    """``guests`` are all that are registered; the spans of ``before`` and ``since`` end and begin at the change."""

    guests: Mapping[str, Taken]
    seen: Mapping[str, Seen]
    before: Denials
    since: Denials

    @property
    def without(self) -> list[str]:
        """Guests that do not have it."""
        return [name for name, state in self.guests.items() if state in (Taken.BEHIND, Taken.NEVER)]

    @property
    def denials(self) -> list[Moved]:
        """By reason, the one with most denials first."""
        return moved(self.before, self.since)


def spread(store: Store, denials: Counted, change: ChangeSet, generation: int, now: float) -> Spread:
    """Of a change-set, which guests learn of by ``generation``: until the next one, and of a day at most."""
    later = store.change_set_after(change.revision)
    end = max(change.at, min(now, later.at if later else now, change.at + SPAN_MAX_S))
    before = denials(change.at - (end - change.at), change.at)
    seen = store.seen()
    guests = {name: taken(seen.get(name), generation) for name in store.guests()}
    return Spread(guests, seen, before, denials(change.at, end))


class Newest:
    """The spread of the newest change-set, looked at again after half a minute.  May be called from any thread."""

    def __init__(self, store: Store, denials: Counted) -> None:
        self._store = store
        self._denials = denials
        self._lock = threading.Lock()
        self._found: Spread | None = None
        self._until = 0.0

    def look(self, now: float) -> Spread | None:
        """``None`` where there is no change-set, nobody wrote down when it took effect, or the audit cannot be read.

        Raises ``StoreError``.
        """
        with self._lock:
            if not self._until - _FRESH_S <= now < self._until:  # the clock may be set back
                change, self._found = self._store.change_set(self._store.revision()), None
                if change is not None and change.generation is not None:
                    try:
                        self._found = spread(self._store, self._denials, change, change.generation, now)
                    except StoreError:
                        raise
                    except (sqlite3.Error, OSError) as error:
                        log.error("denials cannot be counted, and no metric says how far a change is: %s", error)
                self._until = now + _FRESH_S
            return self._found
