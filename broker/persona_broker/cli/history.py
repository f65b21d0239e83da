"""What was applied when, and by whom: ``history``, ``show``, ``export``, ``diff`` and ``rollback``."""

import argparse
from typing import Any

from persona.answers import as_json, iso, local
from persona.canonical import as_written
from persona.documents import Document
from persona.problems import Fault, PersonaError
from persona.shown import line, word
from persona_broker.cli import documents
from persona_broker.cli.store import existing, say
from persona_broker.policy.field_diff import compare
from persona_broker.policy.merge import WHOLE
from persona_broker.policy.unreadable import Unreadable
from persona_broker.settings import Settings
from persona_broker.store.change_sets import ChangeSet, Item
from persona_broker.store.sqlite import Store

_KINDS = ("CommandSet", "Persona", "Policy")


def history(arguments: argparse.Namespace, settings: Settings) -> int:
    """``history [NAME]``: the newest change-sets, the newest first."""
    found = existing(settings).history(arguments.n, arguments.name)
    if arguments.json:
        print(as_json([_value(item) for item in found]))
        return 0
    for item in found:
        author = word(item.author.name) if item.author.name else "somebody unknown"
        message = f"  {line(item.author.message)}" if item.author.message else ""
        print(f"{item.revision:>4}  {local(item.at)}  {author}{message}")
        for change in item.items:
            print(f"        {_what(change)}")
        if not item.items:
            print("        the order of policies")
    if not found:
        print(f"no document {arguments.name!r} was ever applied" if arguments.name else "nothing was ever applied")
    return 0


def show(arguments: argparse.Namespace, settings: Settings) -> int:
    """``show NAME``: the document as YAML, the version that is applied or another one."""
    from persona_broker.policy_files.writer import as_yaml  # only these two pay for it

    store = existing(settings)
    applied = {(kind, name): version for kind, name, version, _ in store.texts()}
    kinds = [arguments.kind] if arguments.kind else _KINDS
    found: list[tuple[Document, int]] = []
    for kind in kinds:
        version = applied.get((kind, arguments.name)) if arguments.version is None else arguments.version
        stored = store.version(kind, arguments.name, version) if version is not None else None
        if stored is not None:
            if isinstance(stored[1], Unreadable):
                raise PersonaError(Fault.BAD_DOCUMENT, str(stored[1]))
            found.append((stored[1], stored[0]))
    if not found:
        what = "is applied" if arguments.version is None else f"has a version {arguments.version}"
        fix = f"'persona-broker history {word(arguments.name)}' shows what there was"
        raise PersonaError(Fault.NOT_FOUND, f"no document {arguments.name!r} {what}; {fix}")
    value = [{"version": version, "document": as_written(document)} for document, version in found]
    heads = [f"# {type(document).__name__} {document.name}, version {version}" for document, version in found]
    texts = [f"{head}\n{as_yaml([document])}" for head, (document, _) in zip(heads, found, strict=True)]
    say(arguments, value, "---\n".join(texts).rstrip("\n"))
    return 0


def export(arguments: argparse.Namespace, settings: Settings) -> int:
    """``export``: all documents of a revision as YAML, which ``apply --all`` takes back to the same."""
    from persona_broker.policy_files.writer import as_yaml

    store = existing(settings)
    number = store.revision() if arguments.revision is None else arguments.revision
    stored = _at(store, number)
    found = _readable(stored, number)
    value = [
        {"version": version, "document": as_written(document)}
        for document, (_, version) in zip(found, stored, strict=True)
    ]
    say(arguments, value, as_yaml(found).rstrip("\n"))
    return 0


def diff(arguments: argparse.Namespace, settings: Settings) -> int:
    """``diff REV [REV]``: what differs between two revisions, or between one and what is applied, field by field."""
    store = existing(settings)
    newest = store.revision()
    other = newest if arguments.other is None else arguments.other
    before, after = ({_key(item): item for item in _at(store, number)} for number in (arguments.revision, other))
    lines, items = [], []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if old is not None and new is not None and (old[1] == new[1] or _mapping(old) == _mapping(new) != {}):
            continue  # going back to an old text makes a new version
        kind, name = key
        change = Item(kind, name, old[1] if old else None, new[1] if new else None)
        fields = list(compare(_mapping(old), _mapping(new))) if old is not None and new is not None else []
        lines += [_what(change), *(f"  {documents.field_line(field)}" for field in fields)]
        items.append({**_item(change), "fields": [documents.field_value(field) for field in fields]})
    orders = [[name for (kind, name) in side if kind == "Policy"] for side in (before, after)]
    both = [[name for name in order if ("Policy", name) in before and ("Policy", name) in after] for order in orders]
    if both[0] != both[1]:
        lines.append(f"policies are asked in this order: {', '.join(orders[1])}")
    value = {"from": arguments.revision, "to": other, "documents": items, "reordered": both[0] != both[1]}
    say(arguments, value, "\n".join(lines) or "no difference")
    return 0


def rollback(arguments: argparse.Namespace, settings: Settings) -> int:
    """``rollback REV``: the documents of a revision become the whole set, as a change-set of its own."""
    store = existing(settings)
    found = _readable(_at(store, arguments.revision), arguments.revision)
    message = f"rollback to {arguments.revision}"
    return documents.carry_out(arguments, settings, found, WHOLE, message=message)


def _at(store: Store, number: int) -> list[tuple[Document | Unreadable, int]]:
    found = store.documents_at(number)
    if found is None:
        raise PersonaError(Fault.NOT_FOUND, f"there is no revision {number}; the newest is {store.revision()}")
    return found


def _readable(found: list[tuple[Document | Unreadable, int]], number: int) -> list[Document]:
    broken = [str(document) for document, _ in found if isinstance(document, Unreadable)]
    if broken:
        raise PersonaError(Fault.BAD_DOCUMENT, "\n".join([f"refused: of revision {number} cannot be read:", *broken]))
    return [document for document, _ in found if not isinstance(document, Unreadable)]


def _key(item: tuple[Document | Unreadable, int]) -> tuple[str, str]:
    document = item[0]
    kind = document.kind if isinstance(document, Unreadable) else type(document).__name__
    return kind, document.name


def _mapping(item: tuple[Document | Unreadable, int]) -> dict[str, Any]:
    return {} if isinstance(item[0], Unreadable) else as_written(item[0])


def _what(change: Item) -> str:
    if change.before is None:
        return f"{change.kind} {change.name}: added, version {change.after}"
    if change.after is None:
        return f"{change.kind} {change.name}: removed, was version {change.before}"
    return f"{change.kind} {change.name}: version {change.before} -> {change.after}"


def _item(change: Item) -> dict[str, Any]:
    return {"kind": change.kind, "name": change.name, "before": change.before, "after": change.after}


def _value(item: ChangeSet) -> dict[str, Any]:
    return {
        "revision": item.revision,
        "at": iso(item.at),
        "author": item.author.name or None,
        "message": item.author.message,
        "documents": [_item(change) for change in item.items],
    }
