"""What a broker has in its audit, for tests that ask what arrived."""

from pathlib import Path
from typing import Any

from persona_broker.audit.chain import Chain
from persona_broker.audit.search import Wanted, each


def audited(directory: Path) -> list[dict[str, Any]]:
    """The guests' records in the audit beside the database in ``directory``, oldest first, each with its number."""
    found = each(Chain(directory / "audit"), Wanted())
    return [{**one.record, "number": one.row.counter} for one in found]
