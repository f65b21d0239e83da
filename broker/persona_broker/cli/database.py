"""The database's file: ``migrate``."""

import argparse
from contextlib import closing
from pathlib import Path

from persona_broker.cli.store import must_exist, say, store_of
from persona_broker.settings import Settings
from persona_broker.store.database import read_only
from persona_broker.store.schema import MIGRATIONS, version_of


def migrate(arguments: argparse.Namespace, settings: Settings) -> int:
    """``migrate``: brings the database to this version's schema, whole or not at all, and its history up to date."""
    must_exist(settings)
    with closing(read_only(Path(settings.db))) as db:
        before = version_of(db)
    with closing(store_of(settings)) as store:
        behind = store.is_behind()
        store.catch_up()
        revision = store.revision()
    value = {"from": before, "to": len(MIGRATIONS), "revision": revision}
    lines = [f"schema version {before} -> {len(MIGRATIONS)}"] if before != len(MIGRATIONS) else []
    lines += [f"revision {revision} has what a broker that keeps no revisions applied"] if behind else []
    say(arguments, value, "\n".join(lines) or "nothing to do")
    return 0
