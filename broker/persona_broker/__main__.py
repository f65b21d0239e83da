"""``persona-broker``: serve decisions, and the operator's commands (``commands``).

Exit codes: 0 done, 1 refused or problems found, 2 usage, 3 the record or a file cannot be used.
"""

import argparse
import os
import sqlite3
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from persona.problems import Fault, PersonaError
from persona_broker import commands, usage, vm_health
from persona_broker import settings as configuration
from persona_broker.settings import Settings

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
    except OSError as error:
        print(f"persona-broker: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="machine-readable output")
    parser = argparse.ArgumentParser(prog="persona-broker", description="decides which persona applies")
    parser.add_argument("--config", default=CONFIG, help=f"settings, TOML (default {CONFIG})")
    parser.add_argument("--db", help="the record's file")
    top = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int], text: str, group: Any = top) -> argparse.ArgumentParser:
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

    check = command("check", commands.check, "validate persona and policy files")
    check.add_argument("files", nargs="+", type=Path)
    whole = "the documents given become the whole set: what is not given is removed"
    apply = command("apply", commands.apply, f"validate files and decide from them; {whole}")
    apply.add_argument("files", nargs="+", type=Path)
    apply.add_argument("--allow-empty", action="store_true", help="also no documents at all: everything is removed")
    apply.add_argument("--dry-run", action="store_true", help="only say what would change")

    explain = command("explain", commands.explain, "say what would be decided, and why")
    explain.add_argument("--user", required=True)
    explain.add_argument("--group", action="append", default=[])
    explain.add_argument("--vm", required=True)
    explain.add_argument("--load", type=usage.figures, help="cpu=80,memory=40: percent")
    explain.add_argument("--health", type=vm_health.report_of, help=vm_health.HELP)
    explain.add_argument("--at", type=usage.moment, help="time, ISO 8601 with zone (default now)")
    explain.add_argument("--files", nargs="+", type=Path, help="instead of the applied set")
    explain.add_argument("command", nargs="+", metavar="CMD")

    guest = top.add_parser("guest", help="guests and their tokens").add_subparsers(required=True)
    add = command("add", commands.guest_add, "register a guest; prints its token once", guest)
    add.add_argument("name")
    add.add_argument("--token-file", type=Path, help="write the token there (0600) instead of printing it")
    add.add_argument("--renew", action="store_true", help="one that is there: its old token is refused from now on")
    command("list", commands.guest_list, "names of all guests", guest)
    command("remove", commands.guest_remove, "its token is refused from now on", guest).add_argument("name")

    load = top.add_parser("load", help="the host's load").add_subparsers(required=True)
    command("show", commands.load_show, "the last sample", load)
    setting = command("set", commands.load_set, "what the settable source reports (load_source = set)", load)
    setting.add_argument("values", nargs="+", type=usage.figure, metavar="METRIC=PERCENT")

    health = command("health", vm_health.show, "what VMs last reported of themselves")
    health.add_argument("vm", nargs="?", help="only this one")

    sessions = top.add_parser("sessions", help="open sessions").add_subparsers(required=True)
    command("list", commands.sessions, "all open sessions", sessions)
    command("revoke", commands.revoke, "deny a session everything from now on", sessions).add_argument("id")

    records = top.add_parser("records", help="what guests decided").add_subparsers(required=True)
    tail = command("tail", commands.tail, "the newest records", records)
    tail.add_argument("-n", type=usage.count, default=20, metavar="COUNT")
    tail.add_argument("--follow", "-f", action="store_true")

    tls = top.add_parser("tls", help="certificates").add_subparsers(required=True)
    init = command("init", commands.tls_init, "make ca.pem, broker.crt and broker.key", tls)
    init.add_argument("--dir", type=Path, default=Path("/etc/persona"))
    init.add_argument("--host", action="append", required=True, help="name or address that guests use; repeatable")
    init.add_argument("--force", action="store_true", help="replace what is there: guests need the new ca.pem")
    init.add_argument("--user", help="who serves and so reads the key (default persona-broker, where there is one)")
    return parser


def _serve(arguments: argparse.Namespace, settings: Settings) -> int:
    from persona_broker import app, server, supervisor  # flask and gunicorn: only serving pays for them

    flags = ("bind", "events_bind", "tls_cert", "tls_key", "load_source", "workers", "insecure_loopback")
    given = {flag: getattr(arguments, flag) for flag in flags if getattr(arguments, flag) is not None}
    settings = replace(settings, **given)
    configuration.check(settings)
    store = commands.store_of(settings)
    if arguments.apply:
        documents = commands.documents_of(arguments.apply)
        commands.refuse_empty(documents, arguments.apply, store)
        store.apply(documents)
    if arguments.guest:
        if arguments.guest_token_file is None:
            raise PersonaError(Fault.BAD_REQUEST, "--guest wants --guest-token-file")
        store.add_guest(arguments.guest, _token(arguments.guest_token_file))
    store.close()  # SQLite connections do not survive a fork
    parts: dict[str, Callable[[], None]] = {}
    endpoints = []
    if arguments.role in ("api", "all"):
        load = partial(app.api, settings)
        endpoints.append(_endpoint(settings, settings.bind))
        parts["api"] = partial(server.serve_api, load, endpoints[-1], settings.workers)
    if arguments.role in ("events", "all"):
        load = partial(app.streams, settings)
        endpoints.append(_endpoint(settings, settings.events_bind))
        parts["events"] = partial(server.serve_streams, load, endpoints[-1])

    def announce() -> None:
        if arguments.ready_fd is not None:
            os.write(arguments.ready_fd, b"ready\n")
            os.close(arguments.ready_fd)
        else:
            print("ready", flush=True)

    return supervisor.supervise(parts, lambda: all(map(supervisor.answers, endpoints)), announce)


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
