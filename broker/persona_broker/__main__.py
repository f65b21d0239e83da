"""``persona-broker``: serve decisions, and the operator's commands.

Exit codes: 0 done, 1 refused or problems found, 2 usage, 3 the record cannot be used.
"""

import argparse
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona.conditions import METRICS
from persona.problems import Fault, PersonaError
from persona_broker import settings as configuration
from persona_broker.settings import Settings

if TYPE_CHECKING:
    from persona_broker.store.sqlite import Store

CONFIG = "/etc/persona/broker.toml"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        settings = configuration.load(Path(arguments.config))
        if arguments.db:
            settings = replace(settings, db=arguments.db)
        return int(arguments.run(arguments, settings))
    except PersonaError as error:
        print(f"persona-broker: {error.message}", file=sys.stderr)
        return 1
    except sqlite3.Error as error:
        print(f"persona-broker: the record cannot be used: {error}", file=sys.stderr)
        return 3
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; say nothing more
        return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="machine-readable output")
    parser = argparse.ArgumentParser(prog="persona-broker", description="decides which persona applies")
    parser.add_argument("--config", default=CONFIG, help=f"settings, TOML (default {CONFIG})")
    parser.add_argument("--db", help="the record's file")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int], text: str, group: Any = commands) -> argparse.ArgumentParser:
        found: argparse.ArgumentParser = group.add_parser(name, help=text, description=text, parents=[common])
        found.set_defaults(run=run)
        return found

    serve = command("serve", _serve, "serve decisions and event streams until a signal comes")
    serve.add_argument("--role", choices=["api", "events", "all"], default="all")
    for flag in ("bind", "events-bind", "tls-cert", "tls-key"):
        serve.add_argument(f"--{flag}")
    serve.add_argument("--load-source", choices=["psutil", "set"])
    serve.add_argument("--workers", type=int)
    serve.add_argument("--insecure-loopback", action="store_true", default=None)
    serve.add_argument("--apply", nargs="+", type=Path, metavar="FILE", help="apply these before serving")
    serve.add_argument("--guest", help="register this guest before serving")
    serve.add_argument("--guest-token-file", type=Path, help="with the token in this file")
    serve.add_argument("--ready-fd", type=int, help="write a line there when both endpoints accept")

    check = command("check", _check, "validate persona and policy files")
    check.add_argument("files", nargs="+", type=Path)
    apply = command("apply", _apply, "validate files and make them the set that is decided from")
    apply.add_argument("files", nargs="+", type=Path)
    apply.add_argument("--dry-run", action="store_true", help="only say what would change")

    explain = command("explain", _explain, "say what would be decided, and why")
    explain.add_argument("--user", required=True)
    explain.add_argument("--group", action="append", default=[])
    explain.add_argument("--vm", required=True)
    explain.add_argument("--load", default="", help="cpu=80,memory=40: percent")
    explain.add_argument("--at", help="time, ISO 8601 with zone (default now)")
    explain.add_argument("--files", nargs="+", type=Path, help="instead of the applied set")
    explain.add_argument("command", nargs="+", metavar="CMD")

    guest = commands.add_parser("guest", help="guests and their tokens").add_subparsers(required=True)
    add = command("add", _guest_add, "register a guest; prints its token once", guest)
    add.add_argument("name")
    add.add_argument("--token-file", type=Path, help="write the token there (0600) instead of printing it")
    command("list", _guest_list, "names of all guests", guest)
    command("remove", _guest_remove, "its token is refused from now on", guest).add_argument("name")

    load = commands.add_parser("load", help="the host's load").add_subparsers(required=True)
    command("show", _load_show, "the last sample", load)
    setting = command("set", _load_set, "what the settable source reports (load_source = set)", load)
    setting.add_argument("values", nargs="+", metavar="METRIC=PERCENT")

    sessions = commands.add_parser("sessions", help="open sessions").add_subparsers(required=True)
    command("list", _sessions, "all open sessions", sessions)
    command("revoke", _revoke, "deny a session everything from now on", sessions).add_argument("id")

    records = commands.add_parser("records", help="what guests decided").add_subparsers(required=True)
    tail = command("tail", _tail, "the newest records", records)
    tail.add_argument("-n", type=int, default=20, metavar="COUNT")
    tail.add_argument("--follow", "-f", action="store_true")

    tls = commands.add_parser("tls", help="certificates").add_subparsers(required=True)
    init = command("init", _tls, "make ca.pem, broker.crt and broker.key", tls)
    init.add_argument("--dir", type=Path, default=Path("/etc/persona"))
    init.add_argument("--host", action="append", required=True, help="name or address that guests use; repeatable")
    return parser


def _store(settings: Settings) -> "Store":
    from persona_broker.store.sqlite import Store

    return Store(Path(settings.db))


def _say(arguments: argparse.Namespace, value: Any, text: str) -> None:
    print(json.dumps(value) if arguments.json else text)


# --- serving ----------------------------------------------------------------------------------------


def _serve(arguments: argparse.Namespace, settings: Settings) -> int:
    from persona_broker import app, server  # flask and gunicorn: only serving pays for them

    flags = ("bind", "events_bind", "tls_cert", "tls_key", "load_source", "workers", "insecure_loopback")
    given = {flag: getattr(arguments, flag) for flag in flags if getattr(arguments, flag) is not None}
    settings = replace(settings, **given)
    configuration.check_binds(settings)
    store = _store(settings)
    if arguments.apply:
        store.apply(_documents(arguments.apply))
    if arguments.guest:
        if arguments.guest_token_file is None:
            raise PersonaError(Fault.BAD_REQUEST, "--guest wants --guest-token-file")
        store.add_guest(arguments.guest, arguments.guest_token_file.read_text("ascii").strip())
    store.close()  # SQLite connections do not survive a fork
    database = Path(settings.db)
    parts: dict[str, Callable[[], None]] = {}
    endpoints = []
    if arguments.role in ("api", "all"):
        load = partial(app.api, database)
        endpoints.append(_endpoint(settings, settings.bind))
        parts["api"] = partial(server.serve_api, load, endpoints[-1], settings.workers)
    if arguments.role in ("events", "all"):
        load = partial(app.streams, database, settings.load_source)
        endpoints.append(_endpoint(settings, settings.events_bind))
        parts["events"] = partial(server.serve_streams, load, endpoints[-1])

    def announce() -> None:
        if arguments.ready_fd is not None:
            os.write(arguments.ready_fd, b"ready\n")
            os.close(arguments.ready_fd)
        else:
            print("ready", flush=True)

    return server.supervise(parts, lambda: all(map(server.answers, endpoints)), announce)


def _endpoint(settings: Settings, bind: str) -> Any:
    from persona_broker.server import Endpoint

    if bind.startswith("unix:") or settings.insecure_loopback:
        return Endpoint(bind, None, None)
    certificate, key = Path(settings.tls_cert), Path(settings.tls_key)
    for file in (certificate, key):
        if not os.access(file, os.R_OK):
            fix = "'persona-broker tls init --host NAME' makes one"
            raise PersonaError(Fault.BAD_DOCUMENT, f"{file}: cannot be read; {fix}")
    return Endpoint(bind, certificate, key)


# --- documents --------------------------------------------------------------------------------------


def _documents(paths: list[Path]) -> Any:
    from persona_broker.files import load

    loaded = load(paths)
    if loaded.problems:
        raise PersonaError(Fault.BAD_DOCUMENT, "\n".join(["refused:", *map(str, loaded.problems)]))
    return loaded.documents


def _check(arguments: argparse.Namespace, _settings: Settings) -> int:
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
        print(json.dumps({"documents": len(loaded.documents), "problems": problems}))
    else:
        for problem in loaded.problems:
            print(problem)
        count = len(loaded.problems)
        print(f"{len(loaded.documents)} documents, " + (f"{count} problems" if count else "no problems"))
    return 1 if loaded.problems else 0


def _apply(arguments: argparse.Namespace, settings: Settings) -> int:
    documents = _documents(arguments.files)
    store = _store(settings)
    if arguments.dry_run:
        before = {(type(d).__name__, d.name): d for d, _ in store.documents()}
        after = {(type(d).__name__, d.name): d for d in documents}
        changes = {
            "added": [" ".join(key) for key in after if key not in before],
            "changed": [" ".join(key) for key in after if key in before and after[key] != before[key]],
            "removed": [" ".join(key) for key in before if key not in after],
        }
    else:
        applied = store.apply(documents)
        changes = {
            "added": list(applied.added),
            "changed": list(applied.changed),
            "removed": list(applied.removed),
        }
    lines = [f"{what}: {', '.join(names)}" for what, names in changes.items() if names]
    _say(arguments, {**changes, "dry_run": arguments.dry_run}, "\n".join(lines) or "nothing changed")
    return 0


def _explain(arguments: argparse.Namespace, settings: Settings) -> int:
    from persona.codec import encode_decision
    from persona.decisions import Granted, Subject
    from persona_broker.explain import explain
    from persona_broker.store.sqlite import make_snapshot

    if arguments.files:
        snapshot = make_snapshot((document, 0) for document in _documents(arguments.files))
    else:
        snapshot = _store(settings).snapshot()
    now = time.time()
    if arguments.at:
        try:
            moment = datetime.fromisoformat(arguments.at)
        except ValueError as error:
            raise PersonaError(Fault.BAD_REQUEST, f"--at: {error}") from None
        now = moment.timestamp()
    load = _load(arguments.load.split(",")) if arguments.load else {}
    subject = Subject(arguments.user, tuple(arguments.group), arguments.vm)
    found = explain(snapshot, subject, tuple(arguments.command), load, now)
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


# --- guests, load, sessions, records, certificates ---------------------------------------------------


def _guest_add(arguments: argparse.Namespace, settings: Settings) -> int:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", arguments.name):
        raise PersonaError(Fault.BAD_REQUEST, f"{arguments.name!r} is no VM name: letters, digits, '.', '_', '-'")
    token = _store(settings).add_guest(arguments.name)
    if arguments.token_file:
        fd = os.open(arguments.token_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(fd, "w") as file:
            file.write(token + "\n")
        _say(
            arguments,
            {"guest": arguments.name, "token_file": str(arguments.token_file)},
            f"{arguments.name} added",
        )
    else:
        _say(arguments, {"guest": arguments.name, "token": token}, token)
    return 0


def _guest_list(arguments: argparse.Namespace, settings: Settings) -> int:
    names = _store(settings).guests()
    _say(arguments, names, "\n".join(names))
    return 0


def _guest_remove(arguments: argparse.Namespace, settings: Settings) -> int:
    if not _store(settings).remove_guest(arguments.name):
        raise PersonaError(Fault.NOT_FOUND, f"there is no guest {arguments.name!r}")
    _say(arguments, {"removed": arguments.name}, f"{arguments.name} removed")
    return 0


def _load(values: list[str]) -> dict[str, float]:
    found = {}
    for value in values:
        metric, _, number = value.partition("=")
        try:
            percent = float(number)
        except ValueError:
            percent = -1
        if metric not in METRICS or not 0 <= percent <= 100:
            raise PersonaError(Fault.BAD_REQUEST, f"{value!r}: expected {'|'.join(METRICS)}=0..100")
        found[metric] = percent
    return found


def _load_set(arguments: argparse.Namespace, settings: Settings) -> int:
    load = _load(arguments.values)
    _store(settings).put_set_load(load)
    _say(arguments, load, ", ".join(f"{metric} {percent:g} %" for metric, percent in load.items()))
    return 0


def _load_show(arguments: argparse.Namespace, settings: Settings) -> int:
    sample = _store(settings).sample()
    if sample is None:
        raise PersonaError(Fault.NOT_FOUND, "there is no sample: is the events process running?")
    age = time.time() - sample.at
    text = ", ".join(f"{metric} {percent:.0f} %" for metric, percent in sample.load.items()) or "nothing known"
    value = {"load": dict(sample.load), "age_s": round(age, 1), "source": sample.source}
    _say(arguments, value, f"{text} ({sample.source}, {age:.0f} s ago)")
    return 0


def _sessions(arguments: argparse.Namespace, settings: Settings) -> int:
    rows = _store(settings).sessions()
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
    _say(arguments, value, "\n".join(lines))
    return 0


def _revoke(arguments: argparse.Namespace, settings: Settings) -> int:
    if _store(settings).revoke_session(arguments.id) is None:
        raise PersonaError(Fault.NOT_FOUND, f"there is no open session {arguments.id!r}")
    _say(arguments, {"revoked": arguments.id}, f"{arguments.id} revoked")
    return 0


def _tail(arguments: argparse.Namespace, settings: Settings) -> int:
    store = _store(settings)
    last = 0
    rows = store.records(0, arguments.n)
    while True:
        for last, guest, record in rows:  # noqa: B007 - the last number is where to go on
            _say(arguments, {"guest": guest, **record}, _record_line(guest, record))
        if not arguments.follow:
            return 0
        sys.stdout.flush()
        time.sleep(0.5)
        rows = store.records(last, 1000) if last else store.records(0, 1000)


def _record_line(guest: str, record: dict[str, Any]) -> str:
    what = record["reason"] or record["event"]
    under = f"{record['persona'] or '-'} ({record['policy'] or '-'})"
    command = " ".join(record["argv"]) or record["event"]
    safe = "".join(char if char.isprintable() else "?" for char in command)
    moment = datetime.fromtimestamp(record["at"])
    return f"{moment:%F %T}  {guest}  {record['user']}  {record['decision']}  {what}  {under}  {safe}"


def _tls(arguments: argparse.Namespace, _settings: Settings) -> int:
    from persona_broker import tls

    try:
        tls.make(arguments.dir, arguments.host)
    except subprocess.CalledProcessError as error:
        raise PersonaError(Fault.INTERNAL, f"openssl: {error.stderr.decode(errors='replace')}") from error
    files = [str(arguments.dir / name) for name in ("ca.pem", "broker.crt", "broker.key")]
    _say(arguments, files, "\n".join(files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
