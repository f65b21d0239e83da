"""The operator's commands about personas, policies and command sets: check, apply, list, explain.

Each imports what it needs itself.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona.answers import as_json
from persona.problems import Fault, PersonaError
from persona.shown import line as printable
from persona.shown import word
from persona_broker.cli.store import for_reading, plural, say, store_of, unconfirmed, with_history
from persona_broker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from persona.documents import Document
    from persona_broker.policy.diff import Changes
    from persona_broker.policy.field_diff import FieldChange
    from persona_broker.policy.losses import Losses
    from persona_broker.policy_files.reader import Loaded, Present
    from persona_broker.store.interface import Plan, SessionRow, Store
    from persona_broker.store.sqlite import SqliteStore

_MISSING = ("there is no persona", "there is no command set")  # messages about a missing document begin so


def _usage(message: str) -> int:
    print(f"persona-broker: {message}", file=sys.stderr)
    return 2


def _loaded(paths: "Sequence[Path]", present: "Present | None" = None) -> "Loaded":
    from persona_broker.policy_files.reader import Present, load

    loaded = load(paths, present or Present())
    if loaded.problems:
        raise PersonaError(Fault.BAD_DOCUMENT, "\n".join(["refused:", *map(str, loaded.problems)]))
    return loaded


def documents_of(paths: list[Path]) -> "Sequence[Document]":
    """All documents of files and directories.  Raises ``PersonaError`` with everything that is wrong."""
    return _loaded(paths).documents


def _present(store: "Store") -> "Present":
    from persona.documents import CommandSet
    from persona_broker.policy.merge import key_of
    from persona_broker.policy_files.reader import Present

    found = [document for document, _ in store.documents()]
    personas = frozenset(name for kind, name in map(key_of, found) if kind == "Persona")
    return Present(personas, {item.name: item for item in found if isinstance(item, CommandSet)})


def add_files(paths: list[Path], store: "Store") -> None:
    """Adds and changes documents as ``apply`` does; removes none.  Raises ``PersonaError``."""
    from persona_broker.policy.merge import ADD
    from persona_broker.store.interface import Author

    loaded = _loaded(paths, _present(store))
    if not loaded.documents:
        raise _no_documents(paths)
    store.change(loaded.documents, ADD, Author("persona-broker serve", "--apply"), loaded.origins)


def _no_documents(paths: "Sequence[Path]", effect: str = "") -> PersonaError:
    return PersonaError(Fault.BAD_DOCUMENT, f"refused: no documents in {', '.join(map(str, paths))}{effect}")


def check(arguments: argparse.Namespace, settings: Settings) -> int:
    """``check FILES``: 0 nothing wrong, 1 problems, each with file, line, field and fix."""
    from persona.parsing import Finding
    from persona_broker.policy.merge import unplaced, wrong_together
    from persona_broker.policy_files.reader import Located, Present, load

    if arguments.upgrade:
        from persona_broker.cli.upgrade import check_upgrade

        return check_upgrade(arguments, settings)
    if not arguments.files:
        if arguments.merged:
            return _usage("check: --merged is about FILES; without any, what is applied is checked")
        return _check_applied(arguments, settings)
    store = for_reading(settings) if arguments.merged else None
    loaded = load(arguments.files, _present(store) if store else Present())
    applied = [document for document, _ in store.documents()] if store else []
    waiting = unplaced(applied, loaded.documents)
    if store and not loaded.problems and (wrong := wrong_together(applied, loaded.documents)):
        where = ", ".join(map(str, arguments.files))
        loaded = replace(loaded, problems=(Located(where, None, Finding("", wrong)),))
    if arguments.json:
        problems = [
            {
                "file": p.file,
                "line": p.line,
                "field": p.finding.path,
                "message": p.finding.message,
                "fix": p.finding.fix,
            }
            for p in loaded.problems
        ]
        warnings = [
            {
                "file": w.file,
                "line": w.lines[0],
                "persona": w.persona,
                "kinds": w.caution.kinds,
                "message": w.caution.message,
                "entries": [
                    {"field": f"{w.caution.field}[{index}]", "line": line, "pattern": text}
                    for (index, text), line in zip(w.caution.entries, w.lines, strict=True)
                ],
            }
            for w in loaded.warnings
        ]
        skipped = [{"file": item.file, "message": item.why} for item in loaded.skipped]
        value = {"documents": loaded.count, "problems": problems, "warnings": warnings, "skipped": skipped}
        print(as_json({**value, "unplaced": waiting} if store else value))
    else:
        for said in (*loaded.problems, *loaded.warnings, *loaded.skipped):
            print(said)
        if not arguments.merged and any(p.finding.message.startswith(_MISSING) for p in loaded.problems):
            print("persona-broker: with --merged, check looks among what is applied too", file=sys.stderr)
        for name in waiting:
            print(f"policy {name} is new and has no order: 'apply' wants --before NAME or --after NAME for it")
        warned = f", {plural(len(loaded.warnings), 'warning')}" if loaded.warnings else ""
        print(f"{plural(loaded.count, 'document')}, {plural(len(loaded.problems), 'problem')}{warned}")
    return 1 if loaded.problems else 0


def _check_applied(arguments: argparse.Namespace, settings: Settings) -> int:
    """``check``: the same of what is applied, which another version, or other time zones, may not read any more."""
    from persona_broker.policy.unreadable import Unreadable

    store = for_reading(settings)
    logging.getLogger("persona.record").disabled = True  # the same is said below
    found = [document for document, _ in store.documents()]
    unreadable = [item for item in found if isinstance(item, Unreadable)]
    if arguments.json:
        problems = [{"kind": i.kind, "name": i.name, "version": i.version, "message": i.problem} for i in unreadable]
        print(as_json({"documents": len(found), "problems": problems, "warnings": [], "skipped": []}))
    else:
        for item in unreadable:
            print(printable(str(item)))
        fix = "; each grants nothing until it is applied anew" if unreadable else ""
        print(f"{plural(len(found), 'applied document')}, {plural(len(unreadable), 'problem')}{fix}")
    return 1 if unreadable else 0


def apply(arguments: argparse.Namespace, settings: Settings) -> int:
    """``apply``: documents are added and changed, or nothing is; they are removed only where that is asked for."""
    from persona_broker.policy.merge import How, unplaced

    if problem := _misused(arguments):
        return _usage(f"apply: {problem}")
    how = How(arguments.prune, arguments.all is not None, arguments.before, arguments.after)
    paths: list[Path] = [arguments.all] if how.whole else arguments.files
    store = _to_apply(settings, dry_run=arguments.dry_run)
    removing = how.prune or how.whole
    loaded = _loaded(paths, None if removing else _present(store))
    for warning in (*loaded.warnings, *loaded.skipped):
        print(f"persona-broker: {warning}", file=sys.stderr)
    if not loaded.documents and not (removing and arguments.allow_empty):
        count = store.count() if removing else 0
        effect = f": this would remove all {plural(count, 'document')}; --allow-empty does it" if count else ""
        raise _no_documents(paths, effect)
    plan = store.plan(loaded.documents, how, loaded.origins)
    if (how.before or how.after) and not unplaced(plan.before, loaded.documents):
        note = "no policy of the files is new and without an order, so --before and --after move nothing"
        print(
            f"persona-broker: {note}; an applied policy is moved by an order of its own, or by --all", file=sys.stderr
        )
    return carry_out(arguments, settings, store, plan, arguments.message)


def _to_apply(settings: Settings, *, dry_run: bool) -> "SqliteStore":
    """With everything that was applied as a change-set.  A dry run writes nothing, also where there is none yet."""
    from persona_broker.store.sqlite import SqliteStore

    if not dry_run:
        store = store_of(settings)
        store.catch_up()
        return store
    if Path(settings.db).exists():
        return with_history(settings)
    with tempfile.TemporaryDirectory() as folder:  # its files are open for as long as they are needed
        return SqliteStore(Path(folder) / "db")


def carry_out(
    arguments: argparse.Namespace, settings: Settings, store: "SqliteStore", plan: "Plan", message: str
) -> int:
    """Shows what the plan does to documents and people, asks before it removes any, and does it; the exit code.

    Where somebody else applied documents since the plan was made, nothing is done: it is not what was shown.
    """
    from persona_broker.cli.author import author
    from persona_broker.cli.chain import hand_over
    from persona_broker.policy.losses import losses
    from persona_broker.store.stored_text import make_snapshot

    if arguments.if_revision is not None:
        store.refuse_another(plan.revision, arguments.if_revision)
    rows = {row.id: row for row in store.sessions() if not row.revoked}
    before, after = (make_snapshot((document, 0) for document in items) for items in (plan.before, plan.after))
    lost = losses(before, after, {ident: row.subject for ident, row in rows.items()}, store.guests())
    sessions = [rows[ident] for ident in lost.sessions]
    fields = _fields(plan)
    lines = _effects(plan.changes, fields, sessions, lost)
    if plan.changes.removed and not arguments.dry_run and not arguments.yes and (why := _unconfirmed(lines)):
        return unconfirmed(arguments, why)
    revision = plan.revision
    if not arguments.dry_run:
        revision = store.carry_out(plan, author(message)).revision
        hand_over(store, settings)
    value = {
        **asdict(plan.changes),
        "fields": {name: [field_value(field) for field in found] for name, found in fields.items()},
        "revision": revision,
        "dry_run": arguments.dry_run,
        "denied_sessions": [{"id": r.id, "vm": r.guest, "user": r.subject.user} for r in sessions],
        "not_admitted": {"users": lost.users, "groups": lost.groups, "complete": lost.complete},
    }
    if lines and not arguments.dry_run:
        lines.append(f"revision {revision}")
    say(arguments, value, "\n".join(lines) or "nothing changed")
    if arguments.dry_run and lines and not arguments.json:
        print("persona-broker: --dry-run: nothing was changed", file=sys.stderr)
    return 0


def _misused(arguments: argparse.Namespace) -> str:
    """Which options of an ``apply`` do not go together, or an empty string."""
    if arguments.all is None:
        return "" if arguments.files else "name FILES to add and change, or --all DIR, a folder that is the whole set"
    if arguments.files or arguments.prune:
        return "--all DIR is the whole set by itself: no other files, and no --prune"
    if arguments.before or arguments.after:
        return "--all DIR: its files' names say the places; --before and --after are for new policies beside others"
    if not arguments.all.is_dir():
        return f"--all {arguments.all}: expected a folder, because every document that is not in it is removed"
    return ""


_NAMED_MAX = 20  # in a line; --json has them all
_LINES_MAX = 100


def _fields(plan: "Plan") -> "dict[str, list[FieldChange]]":
    """What differs in each changed document that can be read, by kind and name."""
    from persona.canonical import as_written
    from persona_broker.policy.field_diff import compare
    from persona_broker.policy.unreadable import Unreadable

    before, after = (
        {f"{type(item).__name__} {item.name}": as_written(item) for item in items if not isinstance(item, Unreadable)}
        for items in (plan.before, plan.after)
    )
    both = (name for name in plan.changes.changed if name in before and name in after)
    return {name: list(compare(before[name], after[name])) for name in both}


def first_lines(lines: list[str]) -> list[str]:
    """As many as somebody may read, and how many more there are."""
    more = len(lines) - _LINES_MAX
    return [*lines[:_LINES_MAX], *([f"  and {more} more; --json has them all"] if more > 0 else [])]


def field_line(field: "FieldChange") -> str:
    """A change of a field on one line."""
    before, after = (None if value is None else _text(value) for value in (field.before, field.after))
    if before is None:
        return f"{field.path}: + {after}"
    return f"{field.path}: - {before}" if after is None else f"{field.path}: {before} -> {after}"


def _text(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value))


def field_value(field: "FieldChange") -> dict[str, Any]:
    """The same as JSON."""
    return {"field": field.path, "before": field.before, "after": field.after}


def _effects(
    changes: "Changes", fields: "Mapping[str, list[FieldChange]]", sessions: "Sequence[SessionRow]", lost: "Losses"
) -> list[str]:
    """What an ``apply`` does, a line each: to documents, and to people."""
    people = [f"{'everyone' if user == '*' else user} on {_on(vms)}" for user, vms in lost.users.items()]
    people += [f"members of {group} on {_on(vms)}" for group, vms in lost.groups.items()]
    found = [
        ("added", changes.added),
        ("changed", changes.changed),
        ("removed", changes.removed),
        ("no longer admitted", people),
        (
            "open sessions that are denied everything",
            [printable(f"{r.id} ({r.subject.user} on {r.guest})") for r in sessions],
        ),
    ]
    lines = [f"{what}: {', '.join(names)}" for what, names in found[:3] if names]
    changed = [f"  {name}: {field_line(field)}" for name, items in fields.items() for field in items]
    lines += first_lines(changed)
    if changes.reordered:
        lines.append("the order changed")
    lines += [f"{what}: {_few(names)}" for what, names in found[3:] if names]
    if not lost.complete:
        lines.append("there are too many users and VMs to look at each: more of them may no longer be admitted")
    return lines


def _on(vms: "Sequence[str]") -> str:
    return "every VM" if "*" in vms else _few(vms)


def _few(names: "Sequence[str]") -> str:
    more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
    return ", ".join(names[:_NAMED_MAX]) + more


def _unconfirmed(lines: list[str]) -> str:
    """Shows what goes, and asks; why it must not go, or an empty string where somebody said yes."""
    print("\n".join(lines), file=sys.stderr)
    if not sys.stdin.isatty():
        fix = "--yes does it without being asked, --dry-run only shows it"
        return f"refused: documents would be removed, and there is no terminal on which to ask you; {fix}"
    print("Remove them? [y/N] ", end="", file=sys.stderr, flush=True)
    return "" if sys.stdin.readline().strip().lower() in ("y", "yes") else "nothing was changed"


def explain(arguments: argparse.Namespace, settings: Settings) -> int:
    """``explain -- CMD``: 0 granted, 1 denied.  With no files, load or health given, as it is right now."""
    from persona.codec import encode_decision
    from persona.decisions import Granted, Subject
    from persona_broker.policy.conditions import ConditionInputs
    from persona_broker.policy.explain import explain, world_of
    from persona_broker.policy.host_load import HostJudge, HostState
    from persona_broker.policy.order import arrange
    from persona_broker.policy.origin import named
    from persona_broker.policy.vm_health import HealthJudge, Reported
    from persona_broker.store.health import Reports
    from persona_broker.store.hosts import SeenHosts
    from persona_broker.store.stored_text import make_snapshot

    now = arguments.at.timestamp() if arguments.at else time.time()
    quarantined: Mapping[str, float] = {}
    domains: dict[str, str] = {}
    hosts: Mapping[str, HostState] = {}
    if arguments.files:
        loaded = _loaded(arguments.files)
        snapshot = make_snapshot(((document, 0) for document in arrange(loaded.documents)), loaded.origins)
        world = world_of(snapshot, {}, now)
        reports: Mapping[str, Reported] = {}
    else:
        store = for_reading(settings)
        snapshot, quarantined = store.snapshot(), store.quarantined()
        world = ConditionInputs(store.sample(), store.latches(), now, float(settings.load_max_age_s))
        reports = Reports(store).look(store.guests())
        domains = {guest: binding.uuid for guest, binding in store.bindings().items()}
        hosts = SeenHosts(store).look()
    if arguments.load:
        world, domains = world_of(snapshot, arguments.load, now), {}  # of whichever host it is on
    if arguments.health:
        reports = {arguments.vm: Reported(now, arguments.health, frozenset())}
    subject = Subject(arguments.user, tuple(arguments.group), arguments.vm)
    unhealthy = HealthJudge(settings.health_max_age_s).look(snapshot.vm_conditions, reports, now)
    placed = HostJudge(settings.load_max_age_s).look(snapshot.conditions, hosts, domains, now)
    found = explain(snapshot, subject, tuple(arguments.command), world, unhealthy, placed)
    decision = found.decision
    lines = [f"  {named(c.policy, c.origin)} -> {c.persona}: {c.verdict}" for c in found.considered]
    policy = named(decision.policy, decision.policy_origin) if decision.policy else ""
    if isinstance(decision, Granted):
        head = f"granted under {decision.persona.name}, policy {policy}"
    else:
        head = f"denied, {decision.reason}{', policy ' if policy else ''}{policy}: {decision.help}"
    notes = list(found.notes)
    if arguments.vm in quarantined:
        notes.append(
            f"{word(arguments.vm)} is in quarantine since a restore: it is denied everything until 'guest readmit'"
        )
    considered = [
        {"policy": c.policy, "origin": c.origin or None, "persona": c.persona, "verdict": c.verdict}
        for c in found.considered
    ]
    value = {"decision": encode_decision(decision), "considered": considered, "notes": notes}
    say(arguments, value, "\n".join([head, *lines, *notes]))
    return 0 if isinstance(decision, Granted) else 1


def policies(arguments: argparse.Namespace, settings: Settings) -> int:
    """``policies list``: in the order in which they are asked."""
    from persona.documents import Policy
    from persona_broker.policy.unreadable import Unreadable

    found: list[dict[str, Any]] = []
    lines = []
    for document, version in for_reading(settings).documents():
        if not isinstance(document, Policy) and not (isinstance(document, Unreadable) and document.kind == "Policy"):
            continue
        policy = document.policy if isinstance(document, Unreadable) else document
        problem = document.problem if isinstance(document, Unreadable) else None
        found.append(
            {
                "place": len(found) + 1,
                "order": document.order,
                "name": document.name,
                "version": version,
                "persona": policy.persona if policy else None,
                "users": list(policy.users) if policy else [],
                "groups": list(policy.groups) if policy else [],
                "problem": problem,
            }
        )
        order = "-" if document.order is None else str(document.order)
        ending = f" -> {policy.persona}" if policy else ""
        broken = f"  cannot be read: {problem}" if problem else ""
        lines.append(f"{len(found):>4}  {order:>5}  {document.name}{ending}{broken}")
    say(arguments, found, "\n".join(["place  order  policy -> persona", *lines]) if lines else "no policies")
    return 0


def sets(arguments: argparse.Namespace, settings: Settings) -> int:
    """``sets list``: applied command sets, what is in them, and which personas use them."""
    from persona.documents import CommandSet, Persona
    from persona.sets import used

    documents = for_reading(settings).documents()
    users: dict[str, list[str]] = {}
    for document, _ in documents:
        for name in used(document) if isinstance(document, Persona) else ():
            users.setdefault(name, []).append(document.name)
    found, lines = [], []
    for document, version in documents:
        if not isinstance(document, CommandSet):
            continue
        commands, by = [pattern.text for pattern in document.commands.patterns], users.get(document.name, [])
        found.append({"name": document.name, "version": version, "commands": commands, "used_by": by})
        used_by = f"used by {', '.join(by) or 'no persona'}"
        lines.append(f"{document.name}: {plural(len(commands), 'pattern')}, {used_by}")
    say(arguments, found, "\n".join(lines) or "no command sets")
    return 0
