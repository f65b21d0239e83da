"""The operator's commands: each takes the parsed arguments and the settings, prints, and returns the exit code.

Imports what it needs itself, so that no command waits for what only another one uses.
"""

import argparse
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona.problems import Fault, PersonaError
from persona_broker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from persona.documents import Document
    from persona_broker.store.sqlite import Store


NO_GUESTS = "no guests; 'persona-broker guest add NAME' registers one"
_SERVICE_USER = "persona-broker"  # of the package's unit


def store_of(settings: Settings) -> "Store":
    """The record.  Raises ``sqlite3.Error``, ``OSError``."""
    from persona_broker.store.sqlite import Store

    return Store(Path(settings.db))


def existing(settings: Settings) -> "Store":
    """The record, for what only reads or ends something.  Raises ``OSError`` where there is none."""
    if not Path(settings.db).exists():
        raise FileNotFoundError(f"there is no record {settings.db}; 'persona-broker apply FILES' begins one")
    return store_of(settings)


def _plural(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def _say(arguments: argparse.Namespace, value: Any, text: str) -> None:
    print(json.dumps(value) if arguments.json else text)


def documents_of(paths: list[Path]) -> "Sequence[Document]":
    """All documents of files and directories.  Raises ``PersonaError`` with everything that is wrong."""
    from persona_broker.files import load

    loaded = load(paths)
    if loaded.problems:
        raise PersonaError(Fault.BAD_DOCUMENT, "\n".join(["refused:", *map(str, loaded.problems)]))
    return loaded.documents


def refuse_empty(documents: "Sequence[Document]", paths: list[Path], store: "Store") -> None:
    """Raises ``PersonaError`` where there is nothing to become the whole set."""
    if documents:
        return
    count = len(store.applied())
    effect = f": this would remove all {_plural(count, 'document')}" if count else ""
    files = ", ".join(map(str, paths))
    fix = "'persona-broker apply --allow-empty' does it"
    raise PersonaError(Fault.BAD_DOCUMENT, f"refused: no documents in {files}{effect}; {fix}")


def check(arguments: argparse.Namespace, _settings: Settings) -> int:
    """``check FILES``: 0 nothing wrong, 1 problems, each with file, line, field and fix."""
    from persona_broker.files import load

    loaded = load(arguments.files)
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
        print(json.dumps({"documents": loaded.count, "problems": problems}))
    else:
        for problem in loaded.problems:
            print(problem)
        print(f"{_plural(loaded.count, 'document')}, {_plural(len(loaded.problems), 'problem')}")
    return 1 if loaded.problems else 0


def apply(arguments: argparse.Namespace, settings: Settings) -> int:
    """``apply FILES``: the whole set is replaced, or nothing is."""
    from persona_broker.policy.changes import compare, identities

    documents = documents_of(arguments.files)
    store = store_of(settings)
    if not arguments.allow_empty:
        refuse_empty(documents, arguments.files, store)
    changes = compare(store.applied(), identities(documents)) if arguments.dry_run else store.apply(documents)
    lines = [
        f"{what}: {', '.join(names)}"
        for what, names in (("added", changes.added), ("changed", changes.changed), ("removed", changes.removed))
        if names
    ]
    if changes.reordered:
        lines.append("the order changed")
    _say(arguments, {**asdict(changes), "dry_run": arguments.dry_run}, "\n".join(lines) or "nothing changed")
    return 0


def explain(arguments: argparse.Namespace, settings: Settings) -> int:
    """``explain -- CMD``: 0 granted, 1 denied.  With no files, load or health given, as it is right now."""
    from persona.codec import encode_decision
    from persona.decisions import Granted, Subject
    from persona_broker.explain import explain, world_of
    from persona_broker.policy.health import Reported, Ward
    from persona_broker.policy.outlook import World
    from persona_broker.store.health import Reports
    from persona_broker.store.sqlite import make_snapshot

    now = arguments.at.timestamp() if arguments.at else time.time()
    if arguments.files:
        snapshot = make_snapshot((document, 0) for document in documents_of(arguments.files))
        world = world_of(snapshot, {}, now)
        reports: Mapping[str, Reported] = {}
    else:
        store = existing(settings)
        snapshot = store.snapshot()
        world = World(store.sample(), store.latches(), now, float(settings.load_max_age_s))
        reports = Reports(store).look(store.guests())
    if arguments.load:
        world = world_of(snapshot, arguments.load, now)
    if arguments.health:
        reports = {arguments.vm: Reported(now, arguments.health, frozenset())}
    subject = Subject(arguments.user, tuple(arguments.group), arguments.vm)
    unhealthy = Ward(settings.health_max_age_s).look(snapshot.vm_conditions, reports, now)
    found = explain(snapshot, subject, tuple(arguments.command), world, unhealthy)
    decision = found.decision
    lines = [f"  {c.policy} -> {c.persona}: {c.verdict}" for c in found.considered]
    if isinstance(decision, Granted):
        head = f"granted under {decision.persona.name} (policy {decision.policy})"
    else:
        head = f"denied, {decision.reason}: {decision.help}"
    considered = [{"policy": c.policy, "persona": c.persona, "verdict": c.verdict} for c in found.considered]
    value = {"decision": encode_decision(decision), "considered": considered}
    _say(arguments, value, "\n".join([head, *lines]))
    return 0 if isinstance(decision, Granted) else 1


def guest_add(arguments: argparse.Namespace, settings: Settings) -> int:
    """``guest add NAME``: a token, shown this once; with ``--renew`` an old one is refused from now on."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", arguments.name):
        raise PersonaError(Fault.BAD_REQUEST, f"{arguments.name!r} is no VM name: letters, digits, '.', '_', '-'")
    store = store_of(settings)
    if arguments.name in store.guests() and not arguments.renew:
        fix = "--renew gives it another token, and the one it has is refused from then on"
        raise PersonaError(Fault.CONFLICT, f"there is a guest {arguments.name!r} already; {fix}")
    if arguments.token_file:
        fd = os.open(arguments.token_file, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with open(fd, "w") as file:  # before there is a token: none that cannot be written
            os.fchmod(fd, 0o600)  # it may have been there before
            token = store.add_guest(arguments.name)
            file.truncate()
            file.write(token + "\n")
        _say(
            arguments,
            {"guest": arguments.name, "token_file": str(arguments.token_file)},
            f"{arguments.name} added",
        )
    else:
        token = store.add_guest(arguments.name)
        _say(arguments, {"guest": arguments.name, "token": token}, token)
    return 0


def guest_list(arguments: argparse.Namespace, settings: Settings) -> int:
    """``guest list``."""
    names = existing(settings).guests()
    _say(arguments, names, "\n".join(names) or NO_GUESTS)
    return 0


def guest_remove(arguments: argparse.Namespace, settings: Settings) -> int:
    """``guest remove NAME``: its token and its event streams end."""
    if not existing(settings).remove_guest(arguments.name):
        raise PersonaError(Fault.NOT_FOUND, f"there is no guest {arguments.name!r}")
    _say(arguments, {"removed": arguments.name}, f"{arguments.name} removed")
    return 0


def load_set(arguments: argparse.Namespace, settings: Settings) -> int:
    """``load set METRIC=PERCENT``: all that the settable source says; a metric left out is unknown."""
    load = dict(arguments.values)
    store = store_of(settings)
    store.put_set_load(load)
    sample = store.sample()
    if sample is not None and sample.source != "set":
        note = f"persona-broker: the load is from {sample.source}; this counts once the broker has load_source = set"
        print(note, file=sys.stderr)
    _say(arguments, load, ", ".join(f"{metric} {percent:g} %" for metric, percent in load.items()))
    return 0


def load_show(arguments: argparse.Namespace, settings: Settings) -> int:
    """``load show``: what decisions are made from."""
    sample = existing(settings).sample()
    if sample is None:
        raise PersonaError(Fault.NOT_FOUND, "there is no sample: is the events process running?")
    age = time.time() - sample.at
    text = ", ".join(f"{metric} {percent:.0f} %" for metric, percent in sample.load.items()) or "nothing known"
    value = {"load": dict(sample.load), "age_s": round(age, 1), "source": sample.source}
    _say(arguments, value, f"{text} ({sample.source}, {age:.0f} s ago)")
    return 0


def sessions(arguments: argparse.Namespace, settings: Settings) -> int:
    """``sessions list``."""
    rows = existing(settings).sessions()
    value = [
        {"id": r.id, "guest": r.guest, "user": r.subject.user, "service": r.service, "remote": r.remote,
         "opened_at": r.opened_at, "revoked": r.revoked}
        for r in rows
    ]  # fmt: skip
    lines = [
        f"{r.id}  {r.guest}  {r.subject.user}  {r.service}  {datetime.fromtimestamp(r.opened_at):%F %T}"
        + ("  revoked" if r.revoked else "")
        for r in rows
    ]
    _say(arguments, value, "\n".join(lines) or "no open sessions")
    return 0


def revoke(arguments: argparse.Namespace, settings: Settings) -> int:
    """``sessions revoke ID``: guests hear of it at once."""
    if existing(settings).revoke_session(arguments.id) is None:
        raise PersonaError(Fault.NOT_FOUND, f"there is no open session {arguments.id!r}")
    _say(arguments, {"revoked": arguments.id}, f"{arguments.id} revoked")
    return 0


def tail(arguments: argparse.Namespace, settings: Settings) -> int:
    """``records tail``: oldest first; with ``--follow`` until interrupted."""
    store = existing(settings)
    rows = store.records(0, max(arguments.n, 1))
    last = rows[-1][0] if rows else 0
    rows = rows if arguments.n else []  # with --follow only what is yet to come
    while True:
        for _, guest, record in rows:
            _say(arguments, {"guest": guest, **record}, _record_line(guest, record))
        if not arguments.follow:
            return 0
        sys.stdout.flush()
        time.sleep(0.5)
        rows = store.records(last, 1000)
        last = rows[-1][0] if rows else last


def _record_line(guest: str, record: dict[str, Any]) -> str:
    what = record["reason"] or record["event"]
    under = f"{record['persona'] or '-'} ({record['policy'] or '-'})"
    command = " ".join(record["argv"]) or record["event"]
    safe = "".join(char if char.isprintable() else "?" for char in command)
    moment = datetime.fromtimestamp(record["at"])
    return f"{moment:%F %T}  {guest}  {record['user']}  {record['decision']}  {what}  {under}  {safe}"


def tls_init(arguments: argparse.Namespace, _settings: Settings) -> int:
    """``tls init``: a new authority each time, which guests must be given; one that is there is kept."""
    from persona_broker import tls

    there = [file for file in (arguments.dir / "ca.pem", arguments.dir / "ca.key") if file.exists()]
    if there and not arguments.force:
        effect = "guests that trust it would be cut off"
        raise PersonaError(Fault.CONFLICT, f"{there[0]}: is there already, {effect}; --force replaces it")
    try:
        tls.make(arguments.dir, arguments.host)
    except subprocess.CalledProcessError as error:
        raise PersonaError(Fault.INTERNAL, f"openssl: {error.stderr.decode(errors='replace')}") from error
    if os.geteuid() == 0 and (arguments.user or _SERVICE_USER in {entry.pw_name for entry in pwd.getpwall()}):
        try:
            shutil.chown(arguments.dir / "broker.key", user=arguments.user or _SERVICE_USER)
        except LookupError:
            raise PersonaError(Fault.BAD_REQUEST, f"--user: there is no user {arguments.user!r}") from None
    files = [str(arguments.dir / name) for name in ("ca.pem", "broker.crt", "broker.key")]
    _say(arguments, files, "\n".join(files))
    if there:
        print("persona-broker: ca.pem is a new one; guests trust this broker again when they have it", file=sys.stderr)
    return 0
