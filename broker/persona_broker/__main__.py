"""``persona-broker``: serve decisions, and the operator's commands (``cli``).

Exit codes: 0 done, 1 refused or problems found, 2 usage, 3 the database or a file cannot be used, 4 nobody said
yes to a removal or a restore.
"""

import argparse
import io
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from persona.answers import refusal
from persona.problems import Fault, PersonaError, Reason
from persona.version import VERSION
from persona_broker import settings as configuration
from persona_broker.cli import (
    audit_options,
    database,
    documents,
    guests,
    history,
    hosts,
    load,
    records,
    rollout,
    sessions,
    tls,
    usage,
    vm_health,
)
from persona_broker.cli.store import store_of
from persona_broker.settings import Settings
from persona_broker.store.interface import StoreError

CONFIG = "/etc/persona/broker.toml"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_misplaced(unknown, arguments)}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text in this locale
    try:
        settings = configuration.load(Path(arguments.config))
        if arguments.db:
            settings = replace(settings, db=arguments.db)
        return int(arguments.run(arguments, settings))
    except PersonaError as error:
        return _refused(arguments, 1, error.code, error.message)
    except StoreError as error:
        return _refused(arguments, 3, Fault.NOT_READY, f"the database cannot be used: {error}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; say nothing more
        return 0
    except OSError as error:
        return _refused(arguments, 3, Fault.NOT_READY, str(error))
    except KeyboardInterrupt:
        return 130


def _misplaced(unknown: list[str], arguments: argparse.Namespace) -> str:
    """What to write where an option stands in the wrong place, or an empty string."""
    if any(word.partition("=")[0] in ("--db", "--config") for word in unknown):
        return " (--db and --config stand before the command: persona-broker --db FILE apply ...)"
    if arguments.run is documents.explain:
        return " (put '--' before the command that is asked about: explain --user USER --vm VM -- CMD ...)"
    return ""


def _refused(arguments: argparse.Namespace, code: int, why: str, message: str) -> int:
    if arguments.json:
        print(refusal(why, message))
    else:
        print(f"persona-broker: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    for_programs = argparse.ArgumentParser(add_help=False)
    for_programs.add_argument("--json", action="store_true", help="the answer as one line of JSON")
    parser = argparse.ArgumentParser(prog="persona-broker", description="decides which persona applies")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    parser.add_argument("--config", default=CONFIG, help=f"settings, TOML (default {CONFIG})")
    parser.add_argument("--db", help="the database's file")
    top = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int], text: str, group: Any = top) -> argparse.ArgumentParser:
        found: argparse.ArgumentParser = group.add_parser(name, help=text, description=text, parents=[for_programs])
        found.set_defaults(run=run)
        return found

    def about_change(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--message", "-m", type=usage.message, default="", metavar="TEXT", help="why, for the history"
        )
        parser.add_argument("--if-revision", type=usage.count, metavar="N", help="only where that is the newest one")
        parser.add_argument("--yes", "-y", action="store_true", help="remove without being asked")
        parser.add_argument("--dry-run", action="store_true", help="only say what would change")

    text = "serve decisions and event streams until a signal comes"
    serve = top.add_parser("serve", help=text, description=text)
    serve.set_defaults(run=_serve, json=False)
    serve.add_argument("--role", choices=["api", "events", "all"], default="all", help="which processes (default all)")
    goes_before = "goes before this key of the settings"
    for flag in ("bind", "events-bind", "tls-cert", "tls-key"):
        serve.add_argument(f"--{flag}", help=goes_before)
    serve.add_argument("--load-source", choices=["psutil", "set"], help=goes_before)
    serve.add_argument("--workers", type=int, help=goes_before)
    serve.add_argument("--insecure-loopback", action="store_true", default=None, help=goes_before)
    serve.add_argument("--apply", nargs="+", type=Path, metavar="FILE", help="add and change these before serving")
    serve.add_argument("--guest", help="register this guest before serving")
    serve.add_argument("--guest-token-file", type=Path, help="with the token in this file")
    serve.add_argument("--ready-fd", type=int, help="write a line there when both endpoints accept")

    paths = "persona and policy files, or folders of them"
    check = command("check", documents.check, "validate persona and policy files, or, without any, what is applied")
    check.add_argument("files", nargs="*", type=Path, help=paths)
    check.add_argument("--merged", action="store_true", help="as they would be beside what is applied")
    check.add_argument("--upgrade", action="store_true", help="list what means another thing than to version 0.1")
    whole = "adds and changes documents, and removes none but with --prune or --all"
    apply = command("apply", documents.apply, f"validate files and decide from them; {whole}")
    apply.add_argument("files", nargs="*", type=Path, help=paths)
    apply.add_argument("--prune", action="store_true", help="remove what is applied and not in FILES")
    apply.add_argument(
        "--all", type=Path, metavar="DIR", help="this folder is the whole set, in the order of its files"
    )
    place = apply.add_mutually_exclusive_group()
    place.add_argument("--before", metavar="NAME", help="new policies without an order are asked before this one")
    place.add_argument("--after", metavar="NAME", help="the same, after this one")
    apply.add_argument("--allow-empty", action="store_true", help="also no documents at all: everything is removed")
    about_change(apply)

    past = command("history", history.history, "who changed which documents when, the newest first")
    past.add_argument("name", nargs="?", help="only what changed a document of this name")
    past.add_argument("-n", type=usage.count, default=20, metavar="COUNT", help="at most so many (default 20)")
    show = command("show", history.show, "a document as YAML")
    show.add_argument("name", help="of a persona, a policy or a command set")
    show.add_argument("--kind", choices=["Persona", "Policy", "CommandSet"], help="where several have that name")
    show.add_argument("--version", type=usage.count, metavar="N", help="that one instead of the applied one")
    export = command("export", history.export, "all documents as YAML, which 'apply --all' takes back to the same")
    export.add_argument("--revision", type=usage.count, metavar="N", help="of that revision (default the newest)")
    diff = command("diff", history.diff, "what differs between two revisions, field by field")
    diff.add_argument("revision", type=usage.count, metavar="REV", help="before")
    diff.add_argument("other", nargs="?", type=usage.count, metavar="REV", help="after (default the newest)")
    rollback = command("rollback", history.rollback, "make the documents of a revision the applied ones, as a new one")
    rollback.add_argument("revision", type=usage.count, metavar="REV", help="whose documents")
    about_change(rollback)

    command("migrate", database.migrate, "bring the database of an older version to this one's, or change nothing")

    copy = command("backup", database.backup, "copy the whole database to a file, while brokers go on")
    copy.add_argument("file", type=Path, metavar="FILE", help="which is not there yet")
    back = command("restore", database.restore, "go back to a backup; nothing that a guest has seen is undercut")
    back.add_argument("file", type=Path, metavar="FILE", help="that 'backup' made")
    back.add_argument("--message", "-m", type=usage.message, default="", metavar="TEXT", help="why, for the history")
    back.add_argument(
        "--audit-kept",
        action="store_true",
        help="the database is lost, the audit is not: what it says was taken since is all, and nobody is quarantined",
    )
    back.add_argument("--yes", "-y", action="store_true", help="without being asked")

    spread = command("rollout", rollout.show, "which guests have taken a revision, and how denials moved since")
    spread.add_argument("revision", nargs="?", type=usage.count, metavar="REV", help="default the newest")

    explain = command("explain", documents.explain, "say what would be decided, and why")
    explain.add_argument("--user", required=True, help="who asks")
    explain.add_argument(
        "--group", action="append", default=[], help="a group of theirs, which no broker looks up; repeatable"
    )
    explain.add_argument("--vm", required=True, help="where, by the name that the VM has here (guest list)")
    explain.add_argument("--load", type=usage.figures, help="cpu=80,memory=40: percent")
    explain.add_argument("--health", type=vm_health.report_of, help=vm_health.HELP)
    explain.add_argument("--at", type=usage.moment, help="time, ISO 8601 with zone (default now)")
    explain.add_argument("--files", nargs="+", type=Path, help="instead of the applied set")
    explain.add_argument("command", nargs="+", metavar="CMD", help="a command and its arguments; nothing is run")

    policies_parser = top.add_parser("policies", help="applied policies").add_subparsers(required=True)
    command("list", documents.policies, "applied policies in the order in which they are asked", policies_parser)

    sets_parser = top.add_parser("sets", help="applied command sets").add_subparsers(required=True)
    command("list", documents.sets, "applied command sets and the personas that use them", sets_parser)

    guest_parser = top.add_parser("guest", help="guests and their tokens").add_subparsers(required=True)
    add = command("add", guests.add, "register a guest; prints its token once", guest_parser)
    add.add_argument("name", help="the VM's name")
    add.add_argument("--token-file", type=Path, help="write the token there (0600) instead of printing it")
    add.add_argument("--renew", action="store_true", help="one that is there: its old token is refused from now on")
    command("list", guests.show, "names of all guests", guest_parser)
    remove = command("remove", guests.remove, "its token is refused from now on", guest_parser)
    remove.add_argument("name", help="the VM's name")

    tie = command("bind", hosts.bind, "say which domain a guest is: its host's load is that domain's", guest_parser)
    tie.add_argument("vm", metavar="VM", help="the VM's name")
    tie.add_argument("--uuid", required=True, metavar="U", help="the domain's, as 'persona-host top' shows it")
    loose = command("unbind", hosts.unbind, "take that back", guest_parser)
    loose.add_argument("vm", metavar="VM", help="the VM's name")
    again = command("readmit", guests.readmit, "end the quarantine that a restore put guests in", guest_parser)
    again.add_argument("names", nargs="*", metavar="NAME", help="the VMs' names")
    again.add_argument("--all", action="store_true", help="all of them")

    load_parser = top.add_parser("load", help="the host's load").add_subparsers(required=True)
    command("show", load.show, "the last sample", load_parser)
    setting = command("set", load.change, "what the settable source reports (load_source = set)", load_parser)
    setting.add_argument("values", nargs="+", type=usage.figure, metavar="METRIC=PERCENT", help="like cpu=80")

    health = command("health", vm_health.show, "what VMs last reported of themselves")
    health.add_argument("vm", nargs="?", help="only this one")

    command("coverage", hosts.coverage, "domains without an agent, agents without a domain, and who is silent")

    sessions_parser = top.add_parser("sessions", help="open sessions").add_subparsers(required=True)
    command("list", sessions.show, "all open sessions", sessions_parser)
    text = "deny a session, or all open ones of a user, everything from now on; they are told at once"
    revoke = command("revoke", sessions.revoke, text, sessions_parser)
    revoke.add_argument("who", metavar="USER|ID", help="a user, or the session that the list shows")
    revoke.add_argument("--vm", help="only on this VM")
    revoke.add_argument("--end", action="store_true", help="and end what runs in them, as on_revoke: kill does")

    records_parser = top.add_parser("records", help="what guests decided").add_subparsers(required=True)
    newest = command(
        "tail", records.tail, "the newest records of those that are asked for, oldest first", records_parser
    )
    audit_options.how_many(newest)
    audit_options.how_long(newest)
    audit_options.about(newest, "--user", "--vm")
    newest.add_argument("--denied", action="store_true", help="only what was denied, or would be but for complain mode")
    newest.add_argument("--reason", type=usage.reason, choices=[*Reason], metavar="CODE", help="denied for this reason")
    newest.add_argument("--since", type=usage.since, metavar="TIME", help=usage.SINCE)
    audit_options.about(newest, "--program")
    newest.add_argument("--distinct", action="store_true", help="once each, with how many: time and session aside")

    audit_options.add(top, command)
    tls_parser = top.add_parser("tls", help="certificates").add_subparsers(required=True)
    init = command("init", tls.init, "make ca.pem, broker.crt and broker.key", tls_parser)
    init.add_argument("--dir", type=Path, default=Path("/etc/persona"), help="where to (default /etc/persona)")
    init.add_argument("--host", action="append", required=True, help="name or address that guests use; repeatable")
    init.add_argument("--force", action="store_true", help="replace what is there: guests need the new ca.pem")
    init.add_argument("--user", help="who serves and so reads the key (default persona-broker, where there is one)")
    return parser


def _serve(arguments: argparse.Namespace, settings: Settings) -> int:
    from persona_broker.serve import (
        app,
        audit_process,
        gunicorn_server,
        processes,
    )  # flask and gunicorn: only serving pays for them

    flags = ("bind", "events_bind", "tls_cert", "tls_key", "load_source", "workers", "insecure_loopback")
    given = {flag: getattr(arguments, flag) for flag in flags if getattr(arguments, flag) is not None}
    settings = replace(settings, **given)
    configuration.check(settings)
    store = store_of(settings)
    if arguments.apply:
        documents.add_files(arguments.apply, store)
    if arguments.guest:
        if arguments.guest_token_file is None:
            raise PersonaError(Fault.BAD_REQUEST, "--guest wants --guest-token-file")
        store.add_guest(arguments.guest, _token(arguments.guest_token_file))
    store.end_strays()  # what was left by guests that are removed, or of before this was done at once
    store.close()  # SQLite connections do not survive a fork
    parts: dict[str, Callable[[], None]] = {}
    endpoints = []
    if arguments.role in ("api", "all"):
        make = partial(app.api, settings)
        endpoints.append(_endpoint(settings, settings.bind))
        parts["api"] = partial(gunicorn_server.serve_api, make, endpoints[-1], settings.workers)
    if arguments.role in ("events", "all"):
        make = partial(app.streams, settings)
        endpoints.append(_endpoint(settings, settings.events_bind))
        parts["events"] = partial(gunicorn_server.serve_streams, make, endpoints[-1])
        parts["audit"] = partial(audit_process.run, settings)

    def announce() -> None:
        if arguments.ready_fd is not None:
            os.write(arguments.ready_fd, b"ready\n")
            os.close(arguments.ready_fd)
        else:
            print("ready", flush=True)

    return processes.supervise(parts, lambda: all(map(processes.answers, endpoints)), announce, "audit")


def _endpoint(settings: Settings, bind: str) -> Any:
    from persona_broker.serve.gunicorn_server import Endpoint

    if bind.startswith("unix:") or settings.insecure_loopback:
        return Endpoint(bind, None, None)
    certificate, key = Path(settings.tls_cert), Path(settings.tls_key)
    for file in (certificate, key):
        if not os.access(file, os.R_OK):
            fix = "'persona-broker tls init --host NAME' makes one"
            raise PersonaError(Fault.BAD_DOCUMENT, f"{file}: cannot be read; {fix}")
    return Endpoint(bind, certificate, key)


_TOKEN_MIN = 16  # characters: 'guest add' makes 43


def _token(file: Path) -> str:
    with file.open("rb") as opened:
        if stat.S_IMODE(os.fstat(opened.fileno()).st_mode) & 0o077:
            raise PersonaError(Fault.BAD_REQUEST, f"{file}: others may read this token; chmod 600")
        token = opened.read(4096).strip()
    if len(token) < _TOKEN_MIN or not token.isascii():
        raise PersonaError(Fault.BAD_REQUEST, f"{file}: a token has at least {_TOKEN_MIN} ASCII characters")
    return token.decode()


if __name__ == "__main__":
    sys.exit(main())
