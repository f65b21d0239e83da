"""What was applied when, and by whom: ``history``, ``show``, ``export``, ``diff`` and ``rollback``."""

import argparse
import io
import sys
from collections.abc import Iterable
from typing import Any

from persona.answers import as_json, iso, local
from persona.canonical import as_written, digest
from persona.problems import Fault, PersonaError
from persona.shown import line, word
from persona_broker.cli import documents
from persona_broker.cli.store import existing, for_reading, say, with_history
from persona_broker.policy.diff import in_another_order
from persona_broker.policy.field_diff import FieldChange, compare
from persona_broker.policy.merge import WHOLE, Stored, key_of
from persona_broker.policy.origin import NOWHERE, Origin, named
from persona_broker.policy.unreadable import Unreadable
from persona_broker.settings import Settings
from persona_broker.store.interface import ChangeSet, Item, Origins, Store

_KINDS = ("CommandSet", "Persona", "Policy")

Versioned = tuple[Stored, int]


def history(arguments: argparse.Namespace, settings: Settings) -> int:
    """``history [NAME]``: the newest change-sets, the newest first."""
    found = with_history(settings).history(arguments.n, arguments.name)
    if arguments.json:
        print(as_json([_value(item) for item in found]))
        return 0
    for item in found:
        author = word(item.author.name) if item.author.name else "somebody unknown"
        message = f"  {line(item.author.message)}" if item.author.message else ""
        print(f"{item.revision:>4}  {local(item.at)}  {author}{message}")
        changes = documents.first_lines([_what(change) for change in item.items])
        if item.reordered:
            changes.append("the order of policies")
        print("".join(f"        {change}\n" for change in changes), end="")
    if not found:
        print(f"no document {arguments.name!r} was ever applied" if arguments.name else "nothing was ever applied")
    return 0


def show(arguments: argparse.Namespace, settings: Settings) -> int:
    """``show NAME``: the document as YAML, the version that is applied or another one; 1 where one cannot be read."""
    store = for_reading(settings)
    applied = {(kind, name): version for kind, name, version, _ in store.texts()}
    now, origins = store.origins(), dict[tuple[str, str], Origin]()
    kinds = [arguments.kind] if arguments.kind else _KINDS
    found: list[Versioned] = []
    for kind in kinds:
        version = applied.get((kind, arguments.name)) if arguments.version is None else arguments.version
        stored = store.version(kind, arguments.name, version) if version is not None else None
        if stored is not None:
            found.append((stored[1], stored[0]))
            origins[kind, arguments.name] = (
                now.get((kind, arguments.name), NOWHERE)
                if version == applied.get((kind, arguments.name))
                else store.origin_of(kind, arguments.name, stored[0])
            )
    if not found:
        what = "is applied" if arguments.version is None else f"has a version {arguments.version}"
        fix = f"'persona-broker history {word(arguments.name)}' shows what there was"
        raise PersonaError(Fault.NOT_FOUND, f"no document {arguments.name!r} {what}; {fix}")
    return _print_documents(arguments, store, found, origins, heads=True)


def export(arguments: argparse.Namespace, settings: Settings) -> int:
    """``export``: all documents of a revision as YAML, which ``apply --all`` takes back; 1 where one cannot be read."""
    store = with_history(settings)
    number = store.revision() if arguments.revision is None else arguments.revision
    return _print_documents(arguments, store, store.documents_at(number), store.origins(number), heads=False)


def diff(arguments: argparse.Namespace, settings: Settings) -> int:
    """``diff REV [REV]``: what differs between two revisions, or between one and what is applied, field by field."""
    store = with_history(settings)
    other = store.revision() if arguments.other is None else arguments.other
    before, after = ({key_of(item[0]): item for item in store.documents_at(n)} for n in (arguments.revision, other))
    origins = {**store.origins(arguments.revision), **store.origins(other)}
    lines, items = [], []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if old is not None and new is not None and (old[1] == new[1] or _same(old[0], new[0])):
            continue  # going back to an old text makes a new version
        change = Item(*key, old[1] if old else None, new[1] if new else None, origins.get(key, NOWHERE))
        broken = [item[0] for item in (old, new) if item is not None and isinstance(item[0], Unreadable)]
        fields = _fields(old[0], new[0]) if old is not None and new is not None else []
        lines.append(_what(change))
        lines += [f"  {line(f'version {item.version} cannot be read: {item.problem}')}" for item in broken]
        lines += [f"  {documents.field_line(field)}" for field in fields]
        if old is not None and new is not None and not broken and not fields:
            lines.append("  its command sets changed")
        problem = "; ".join(str(item) for item in broken) or None
        items.append({**_item(change), "fields": [documents.field_value(f) for f in fields], "problem": problem})
    orders = [[name for kind, name in side if kind == "Policy"] for side in (before, after)]
    reordered = in_another_order(*orders)
    if reordered:
        lines.append(f"policies are asked in this order: {', '.join(orders[1])}")
    value = {"from": arguments.revision, "to": other, "documents": items, "reordered": reordered}
    say(arguments, value, "\n".join(documents.first_lines(lines)) or "no difference")
    return 0


def rollback(arguments: argparse.Namespace, settings: Settings) -> int:
    """``rollback REV``: the documents of a revision become the whole set, as a change-set of its own.

    One that cannot be read stays where it is applied in the same version.
    """
    store = with_history(settings) if arguments.dry_run else existing(settings)
    number = arguments.revision
    if not arguments.dry_run:
        store.catch_up()
    if not number:
        raise PersonaError(
            Fault.BAD_REQUEST, "revision 0 has no documents: 'apply --all DIR --allow-empty' removes all"
        )
    now = {(kind, name): version for kind, name, version, _ in store.texts()}
    found, broken = [], []
    for document, version in store.documents_at(number):
        if isinstance(document, Unreadable) and now.get(key_of(document)) != version:
            broken.append(str(document))
        found.append(document)
    if broken:
        head = f"refused: of revision {number} cannot be read (apply files instead, 'export' writes the others):"
        raise PersonaError(Fault.BAD_DOCUMENT, "\n".join([head, *broken]))
    message = f"rollback to {number}" + (f": {arguments.message}" if arguments.message else "")
    return documents.carry_out(arguments, settings, store, store.plan(found, WHOLE, store.origins(number)), message)


def _print_documents(
    arguments: argparse.Namespace, store: Store, found: list[Versioned], origins: Origins, *, heads: bool
) -> int:
    """As YAML, in UTF-8 whatever the locale says: it may become a file.  Of what cannot be read, the stored text."""
    from persona_broker.policy_files.writer import as_yaml  # only these two pay for it

    broken = [item for item, _ in found if isinstance(item, Unreadable)]
    for item in broken:
        print(f"persona-broker: {line(str(item))}", file=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    values: list[dict[str, Any]] = []
    texts = []
    for document, version in found:
        origin = origins.get(key_of(document), NOWHERE)
        where = _origin_value(origin)
        head = f"# {line(named(f'{key_of(document)[0]} {document.name}, version {version}', str(origin)))}\n"
        if isinstance(document, Unreadable):
            stored = store.text(document.kind, document.name, version)
            unread = {"document": None, "problem": document.problem, "stored": stored}
            values.append({"version": version, **unread, **where})
            texts.append(f"{head}# {line(document.problem)}\n# {line(stored or 'its text is gone')}\n")
        else:
            whole = {"document": as_written(document), "problem": None, "stored": None}
            values.append({"version": version, **whole, **where})
            texts.append((head if heads else "") + as_yaml([document]))
    say(arguments, values, "---\n".join(texts).rstrip("\n"))
    return 1 if broken else 0


def _same(old: Stored, new: Stored) -> bool:
    """Whether nothing of a document, nor of the command sets that it uses, differs."""
    return not isinstance(old, Unreadable) and not isinstance(new, Unreadable) and digest(old) == digest(new)


def _fields(old: Stored, new: Stored) -> Iterable[FieldChange]:
    """None where one of the two cannot be read."""
    if isinstance(old, Unreadable) or isinstance(new, Unreadable):
        return []
    return list(compare(as_written(old), as_written(new)))


def _what(change: Item) -> str:
    name = f"{change.kind} {word(change.name)}"
    if change.after is None:
        return named(f"{name}: removed, was version {change.before}", str(change.origin))
    change_of = (
        f"added, version {change.after}" if change.before is None else f"version {change.before} -> {change.after}"
    )
    return named(f"{name}: {change_of}", str(change.origin))


def _item(change: Item) -> dict[str, Any]:
    versions = {"before": change.before, "after": change.after}
    return {"kind": change.kind, "name": change.name, **versions, **_origin_value(change.origin)}


def _origin_value(origin: Origin) -> dict[str, Any]:
    return {"file": origin.file or None, "line": origin.line or None}


def _value(item: ChangeSet) -> dict[str, Any]:
    return {
        "revision": item.revision,
        "at": iso(item.at),
        "author": item.author.name or None,
        "message": item.author.message,
        "documents": [_item(change) for change in item.items],
        "reordered": item.reordered,
    }
