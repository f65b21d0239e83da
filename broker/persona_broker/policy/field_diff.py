"""What differs between two versions of a document, field by field, as a person reads it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FieldChange:
    """A field by its path, and its value before and after: ``None`` where it is not there.

    Of a list there is one for each entry that is only in one of the two, and one with both lists where those
    that are in both come in another order.
    """

    path: str
    before: Any
    after: Any


def compare(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> Iterator[FieldChange]:
    """Of two canonical mappings.  ``kind`` and ``name`` are what they have in common."""
    for key in dict.fromkeys([*before, *after]):
        here = f"{path}.{key}" if path else key
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if isinstance(old, Mapping | None) and isinstance(new, Mapping | None):
            yield from compare(old or {}, new or {}, here)
        elif isinstance(old, list | None) and isinstance(new, list | None):
            yield from _lists(old or [], new or [], here)
        else:
            yield FieldChange(here, old, new)


def _lists(old: list[Any], new: list[Any], path: str) -> Iterator[FieldChange]:
    before, after = ({json.dumps(item): item for item in items} for items in (old, new))
    gone = [item for key, item in before.items() if key not in after]
    come = [item for key, item in after.items() if key not in before]
    yield from (FieldChange(path, item, None) for item in gone)
    yield from (FieldChange(path, None, item) for item in come)
    if [key for key in before if key in after] != [key for key in after if key in before]:
        yield FieldChange(path, old, new)
