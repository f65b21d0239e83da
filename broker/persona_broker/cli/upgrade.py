"""``persona-broker check --upgrade``: which documents mean another thing to this version than to 0.1.

To be asked of the new version before its broker decides by them: of the database (``--db``), or of files.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from persona.answers import as_json
from persona_broker.cli.documents import documents_of
from persona_broker.cli.store import must_exist
from persona_broker.policy.upgrade import Found, compare, refused
from persona_broker.settings import Settings
from persona_broker.store.documents import applied_texts

Compared = tuple[str, str, int | None, Found]  # kind, name, version where it is stored


def check_upgrade(arguments: argparse.Namespace, settings: Settings) -> int:
    """Prints each entry with its old and its new meaning.  Returns 1 where there is any, else 0.

    Entries that name one of a file's several names are notes, which do not count.
    """
    found = list(_of_files(arguments) if arguments.files else _of_record(settings))
    changed = [item for item in found if item[3].differences]
    if arguments.json:
        print(as_json({
            "documents": len(found),
            "changed": [entry for item in changed for entry in _entries(item, names=False)],
            "notes": [entry for item in found for entry in _entries(item, names=True)],
        }))  # fmt: skip
        return 1 if changed else 0
    for kind, name, _, both in found:
        for difference in both.differences:
            print(f"{kind} {name}: {difference}")
        for difference in both.names:
            print(f"{kind} {name}: note: {difference}")
    whole = f"{len(found)} document{'' if len(found) == 1 else 's'}"
    ends = "" if len(changed) != 1 else "s"
    print(f"{len(changed) or 'none'} of {whole} mean{ends} another thing than to version 0.1 (docs/patterns.md)")
    return 1 if changed else 0


def _entries(item: Compared, *, names: bool) -> Iterator[dict[str, Any]]:
    kind, name, version, both = item
    for difference in both.names if names else both.differences:
        yield {"kind": kind, "name": name, "version": version, **asdict(difference)}


def _of_files(arguments: argparse.Namespace) -> Iterator[Compared]:
    from persona.canonical import to_mapping

    for document in documents_of(arguments.files):
        kind = type(document).__name__
        yield kind, document.name, None, compare(kind, to_mapping(document))


def _of_record(settings: Settings) -> Iterator[Compared]:
    must_exist(settings)
    for kind, name, version, text in applied_texts(Path(settings.db)):
        try:
            body = json.loads(text or "")
        except (ValueError, RecursionError):
            body = None  # 'check' tells of it
        both = compare(kind, body)
        yield kind, name, version, replace(both, differences=both.differences + refused(kind, body))
