"""What operators do, on its way to the audit: written in the transaction that does it, moved to the chain later."""

import json
import sqlite3
import time
from typing import Any


def note(db: sqlite3.Connection, event: str, **members: Any) -> None:
    """Has one of ``EVENTS`` (``audit.core.events``) put on the record, where the caller's transaction ends well."""
    body = json.dumps({"event": event, "at": time.time(), **members})
    db.execute("INSERT INTO audit_pending (body) VALUES (?)", (body,))
