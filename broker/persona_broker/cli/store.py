"""The database that a command works on, and how its answer is printed.

Commands import what they need themselves, so that none waits for what only another one uses.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona.answers import as_json
from persona_broker.settings import Settings

if TYPE_CHECKING:
    from persona_broker.store.sqlite import Store


def store_of(settings: Settings) -> "Store":
    """The database.  Raises ``sqlite3.Error``, ``OSError``."""
    from persona_broker.store.sqlite import Store

    return Store(Path(settings.db))


def existing(settings: Settings) -> "Store":
    """The database, for what only reads or ends something.  Raises ``OSError`` where there is none."""
    if not Path(settings.db).exists():
        raise FileNotFoundError(f"there is no database {settings.db}; 'persona-broker apply FILES' begins one")
    return store_of(settings)


def plural(count: int, what: str) -> str:
    """How many of something."""
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def say(arguments: argparse.Namespace, value: Any, text: str) -> None:
    """The answer: ``value`` as JSON where that is asked for, else ``text``."""
    print(as_json(value) if arguments.json else text)
