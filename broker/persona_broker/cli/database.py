"""The database's file: ``migrate``, ``backup`` and ``restore``."""

import argparse
import sqlite3
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from persona.answers import iso, local
from persona.shown import line, word
from persona_broker.audit.chain import Chain
from persona_broker.audit.files import beside
from persona_broker.audit.inbox import take_over
from persona_broker.audit.removals import recall, refuse_another
from persona_broker.cli.author import author
from persona_broker.cli.chain import Bar, hand_over
from persona_broker.cli.store import must_exist, plural, say, store_of, unconfirmed
from persona_broker.settings import Settings
from persona_broker.store.backup import Progress, backup_of, damaged, open_backup
from persona_broker.store.backup import backup as write_backup
from persona_broker.store.database import read_only
from persona_broker.store.restore import Removals, Restored
from persona_broker.store.restore import restore as write_restored
from persona_broker.store.schema import MIGRATIONS, version_of


def migrate(arguments: argparse.Namespace, settings: Settings) -> int:
    """``migrate``: brings the database to this version's schema, whole or not at all, and history and audit along."""
    must_exist(settings)
    with closing(read_only(Path(settings.db))) as db:
        before = version_of(db)
    with closing(store_of(settings)) as store:
        behind = store.is_behind()
        store.catch_up()
        revision = store.revision()
        with closing(Chain(beside(Path(settings.db)))) as chain:
            bar = Bar("moved into the audit")
            moved = take_over(store, chain, bar.show)
            bar.end()
    value = {"from": before, "to": len(MIGRATIONS), "revision": revision, "moved": moved}
    lines = [f"schema version {before} -> {len(MIGRATIONS)}"] if before != len(MIGRATIONS) else []
    lines += [f"revision {revision} has what a broker that keeps no revisions applied"] if behind else []
    lines += [f"{plural(moved, 'record')} moved into the audit"] if moved else []
    say(arguments, value, "\n".join(lines) or "nothing to do")
    return 0


def backup(arguments: argparse.Namespace, settings: Settings) -> int:
    """``backup FILE``: the whole database at one moment; 1 where it has documents that are not what was applied."""
    must_exist(settings)
    write_backup(Path(settings.db), arguments.file, _progress("copied"))
    with closing(open_backup(arguments.file)) as db:
        made, wrong = backup_of(db), [name for name, _ in damaged(db)]
    size = arguments.file.stat().st_size
    for name in wrong:
        print(f"persona-broker: {line(name)} is not what was applied: it is copied as it is", file=sys.stderr)
    value = {
        "file": str(arguments.file),
        "size": size,
        "at": iso(made.at) if made.at is not None else None,
        "revision": made.revision,
        "damaged": wrong,
    }
    apart = "keys, settings and guests' tokens are not in it (docs/backup.md)"
    say(arguments, value, f"{word(str(arguments.file))}: revision {made.revision}, {size} bytes; {apart}")
    return 1 if wrong else 0


def restore(arguments: argparse.Namespace, settings: Settings) -> int:
    """``restore FILE``: everything is checked, and then all of it is done or nothing."""
    database = Path(settings.db)
    with closing(open_backup(arguments.file)) as db:
        made = backup_of(db)
    when = local(made.at) if made.at is not None else "of a time that it does not say"
    print(f"{word(str(arguments.file))}: {when}, revision {made.revision}", file=sys.stderr)
    if not arguments.yes and (why := _unconfirmed()):
        return unconfirmed(arguments, why)
    chain = Chain(beside(database))
    recalled = partial(_recalled, chain, kept=arguments.audit_kept)
    done = write_restored(database, arguments.file, author(arguments.message), _progress("restored"), recalled)
    with closing(store_of(settings)) as store:
        hand_over(store, settings)
    value = {
        "revision": done.revision,
        "generation": done.generation,
        "backup_at": iso(done.backup_at) if done.backup_at is not None else None,
        "backup_revision": done.backup_revision,
        "gone": list(done.gone),
        "quarantined": list(done.quarantined),
    }
    say(arguments, value, "\n".join(_lines(done)))
    return 0


def _recalled(chain: Chain, backup: sqlite3.Connection, *, kept: bool) -> Removals:
    """What the audit says was taken since; with ``kept`` that must be all."""
    if kept:
        bar = Bar("verified")
        refuse_another(chain, backup, bar.show)
        bar.end()
    try:
        return replace(recall(chain, backup), complete=kept)
    except (sqlite3.Error, OSError) as error:
        if kept:
            raise
        why = "what was taken since the backup is not taken again"
        print(f"persona-broker: the audit cannot be read ({error}); {why}", file=sys.stderr)
        return Removals()


def _unconfirmed() -> str:
    """Why nothing is restored, or an empty string where somebody said yes."""
    if not sys.stdin.isatty():
        return "refused: a restore changes what is decided, and there is no terminal on which to ask; --yes does it"
    print("Restore it? [y/N] ", end="", file=sys.stderr, flush=True)
    return "" if sys.stdin.readline().strip().lower() in ("y", "yes") else "nothing was changed"


def _lines(done: Restored) -> list[str]:
    lines = [f"revision {done.revision}: the documents of revision {done.backup_revision}"]
    if done.gone:
        lines.append(f"guests that are gone: {', '.join(map(word, done.gone))}")
    if done.quarantined:
        lines += [
            f"{plural(len(done.quarantined), 'guest')} in quarantine, which are denied everything: nobody knows whether"
            " the audit has every guest that was removed, token renewed and session revoked since the backup",
            "'persona-broker guest list' shows them, 'guest remove' ends one, 'guest readmit' ends the quarantine",
        ]
    return lines


def _progress(done: str) -> Progress:
    """A word a second on standard error, of what takes longer."""
    begun = said = time.monotonic()

    def tell(share: float) -> None:
        nonlocal said
        now = time.monotonic()
        if now - begun >= 1 and now - said >= 1:
            print(f"persona-broker: {share:.0%} {done}", file=sys.stderr)
            said = now

    return tell
