"""How often guests denied what, in a span of time: what ``rollout`` compares."""

from collections import Counter
from contextlib import closing
from datetime import UTC, datetime

from persona_broker.audit.chain import Chain
from persona_broker.audit.lookup import Lookup
from persona_broker.policy.rollout import Denials

_LATE_S = 86_400.0  # records that come later than this after they were made do not count
COUNT = "SELECT reason, count(*) FROM entries WHERE decision = 'denied' AND at >= ? AND at < ? GROUP BY reason"


def denials(chain: Chain, begin: float, end: float, *, behind_max: int | None = None) -> Denials:
    """By reason, by the clocks of the guests (Unix seconds).  Raises ``sqlite3.Error``, ``OSError``.

    Only the files of the days in which such records can have come are looked at, and only their indexes, but for what
    those do not have yet; where that are more than ``behind_max`` records, it raises.
    """
    first, last = (datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d") for at in (begin, end + _LATE_S))
    found: Counter[str] = Counter()
    for path in chain.segments():
        if first <= path.stem <= last:
            with closing(Lookup(path, behind_max=behind_max)) as entries:
                for reason, count in entries.rows(COUNT, begin, end):
                    found[str(reason)] += count
    return Denials(end - begin, dict(found))
