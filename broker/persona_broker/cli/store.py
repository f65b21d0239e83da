"""The database that a command works on, and how its answer is printed.

Commands import what they need themselves, so that none waits for what only another one uses.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona.answers import as_json, refusal
from persona.problems import Fault
from persona_broker.settings import Settings

if TYPE_CHECKING:
    from persona_broker.store.sqlite import SqliteStore


UNCONFIRMED = 4  # an exit code: nobody said yes


def store_of(settings: Settings) -> "SqliteStore":
    """The database.  Raises ``StoreError``, ``OSError``."""
    from persona_broker.store.sqlite import SqliteStore

    return SqliteStore(Path(settings.db))


def existing(settings: Settings) -> "SqliteStore":
    """The database, for what changes or ends something that must be there.  Raises ``OSError`` where there is none."""
    must_exist(settings)
    return store_of(settings)


def for_reading(settings: Settings) -> "SqliteStore":
    """The database, of which not a byte is written.  Raises ``StoreError``, ``OSError`` where there is none."""
    from persona_broker.store.database import Access
    from persona_broker.store.sqlite import SqliteStore

    must_exist(settings)
    return SqliteStore(Path(settings.db), Access.READ)


def with_history(settings: Settings) -> "SqliteStore":
    """The same, with everything that was applied as a change-set.  Raises ``OlderSchemaError`` where it is not."""
    from persona_broker.store.schema import OlderSchemaError

    store = for_reading(settings)
    if store.is_behind():
        what = "what a broker that keeps no revisions applied last is no change-set yet"
        raise OlderSchemaError(f"{settings.db}: {what}; 'persona-broker migrate' makes it one")
    return store


def must_exist(settings: Settings) -> None:
    """Raises ``OSError`` where there is no database."""
    if not Path(settings.db).exists():
        raise FileNotFoundError(f"there is no database {settings.db}; 'persona-broker apply FILES' begins one")


def unconfirmed(arguments: argparse.Namespace, why: str) -> int:
    """Says that nothing was done, since nobody said yes; the exit code."""
    if arguments.json:
        print(refusal(Fault.BAD_REQUEST, why))
    else:
        print(f"persona-broker: {why}", file=sys.stderr)
    return UNCONFIRMED


def plural(count: int, what: str) -> str:
    """How many of something."""
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def say(arguments: argparse.Namespace, value: Any, text: str) -> None:
    """The answer: ``value`` as JSON where that is asked for, else ``text``."""
    print(as_json(value) if arguments.json else text)
