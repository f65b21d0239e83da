"""What operators took since a backup, as the audit tells it: a restore of a lost database takes it again.

So it does with which domain a guest is: by that of the backup, another host's load might be taken for the guest's.

That is all that was taken only if the audit was not lost as well: a copy of it that is older than the loss looks whole.
No program can tell, so the operator says it (``refuse_another`` checks what can be checked).
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

from persona.problems import Fault, PersonaError
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.checkpoint import Checkpoint, parse
from persona_broker.audit.core.format import joined
from persona_broker.audit.lookup import Lookup
from persona_broker.audit.verify import Progress, verify
from persona_broker.store.backup import backup_of
from persona_broker.store.restore import Removals

_SLACK_S = 5.0  # so long may a transaction take: what it took has an earlier time than the backup that lacks it
_OWN = (
    "SELECT r.facts, r.person FROM entries e CROSS JOIN segment.records r ON r.number = e.number"
    " WHERE e.guest IS NULL ORDER BY e.number"
)


def recall(chain: Chain, backup: sqlite3.Connection) -> Removals:
    """What was taken since an open backup was made, and what waits in it and is in the audit already.

    Of a backup that does not say when it was made, nothing is known to be since.

    Raises ``sqlite3.Error``, ``OSError``.
    """
    made, waits = backup_of(backup).at, _waiting(backup)
    since = made - _SLACK_S if made is not None else float("inf")
    guests: set[str] = set()
    revoked: set[str] = set()
    ending: set[str] = set()
    held: dict[tuple[str, str], tuple[float, str, str] | None] = {}
    bound: dict[str, str | None] = {}
    told: set[tuple[str, float]] = set()
    for said in _said(chain, min([since, *waits])):
        event, at = str(said["event"]), float(said["at"])
        told.add((event, at))
        if at < since:
            continue
        if event in ("guest_bound", "guest_unbound", "guest_removed"):
            name = str(said.get("vm"))
            bound.pop(name, None)  # the last one comes last
            bound[name] = str(said.get("uuid")) if event == "guest_bound" else None
        if event == "guest_added" and made is not None and at < made and said.get("renewed") is False:
            guests.discard(str(said.get("vm")))  # the backup has it, or had not had it before either
        elif event in ("guest_added", "guest_removed"):  # the token of one that was added anew is not the backup's
            guests.add(str(said.get("vm")))
        elif event == "session_revoked":
            (ending if said.get("end") is True else revoked).add(str(said.get("session")))
        elif event in ("audit_held", "audit_released") and "name" in said:
            why = (at, str(said.get("author")), str(said.get("message")))
            held[str(said.get("kind")), str(said["name"])] = why if event == "audit_held" else None
    return Removals(frozenset(guests), frozenset(revoked), frozenset(ending), held, bound, frozenset(told))


def refuse_another(chain: Chain, backup: sqlite3.Connection, progress: Progress) -> None:
    """Raises ``PersonaError`` where the chain is not whole, or is not the one that a backup has checkpoints of."""
    try:
        query = "SELECT body FROM audit_checkpoints"
        known: list[Checkpoint] = [parse(json.loads(body)) for (body,) in backup.execute(query)]
    except (sqlite3.Error, ValueError, RecursionError):
        known = []
    if not known:
        _refuse(chain, "the backup has no checkpoint that says which audit is its own")
    kinds = ("changed", "cut", "reordered", "broken", "checkpoint")
    wrong = [item for item in verify(chain, known, progress).findings if item.kind in kinds]
    if wrong:
        _refuse(chain, f"{wrong[0].kind}: {wrong[0].text}")


def _refuse(chain: Chain, why: str) -> None:
    fix = "without --audit-kept guests are quarantined"
    raise PersonaError(Fault.CONFLICT, f"{chain.directory} cannot tell all that was taken: {why}; {fix}")


def _waiting(backup: sqlite3.Connection) -> list[float]:
    """The times of what waits in a backup for the audit."""
    if not backup.execute("SELECT 1 FROM sqlite_master WHERE name = 'audit_pending'").fetchone():
        return []
    query = "SELECT json_extract(body, '$.at') FROM audit_pending WHERE json_valid(body)"
    return [float(at) for (at,) in backup.execute(query) if isinstance(at, int | float)]


def _said(chain: Chain, since: float) -> Iterator[Mapping[str, Any]]:
    """What the broker itself has said since, in order; of days before nothing is read."""
    if since == float("inf"):
        return
    first = datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%d")
    for path in chain.segments():
        if path.stem < first:
            continue
        with closing(Lookup(path)) as entries:
            for facts, person in entries.rows(_OWN):
                try:
                    said = joined(facts, person)
                except (ValueError, TypeError, RecursionError):
                    continue  # 'audit verify' finds it
                if "event" in said and isinstance(said.get("at"), int | float) and said["at"] >= since:
                    yield said
