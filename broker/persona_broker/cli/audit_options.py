"""The command line of ``audit``."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from persona_broker.cli import audit, audit_changes, usage

_ABOUT: dict[str, dict[str, Any]] = {
    "--user": {"help": "of this user"},
    "--vm": {"help": "of this VM"},
    "--session": {"metavar": "ID", "help": "of this session"},
    "--program": {"metavar": "NAME|PATH", "help": "the file that ran or was refused, not its argv[0]"},
    "--event": {"metavar": "CODE", "help": "of this kind, as exec or change_set"},
    "--decision": {"choices": ["granted", "denied"], "help": "that was decided so"},
    "--reason": {"metavar": "CODE", "help": "denied for this reason"},
    "--persona": {"metavar": "NAME", "help": "under this persona"},
}


def about(parser: argparse.ArgumentParser, *options: str) -> None:
    """Adds options that say which records; without any, all of them.  ``records.wanted`` reads them."""
    for option in options or _ABOUT:
        parser.add_argument(option, **_ABOUT[option])


def how_many(parser: argparse.ArgumentParser) -> None:
    """Adds how many of the newest."""
    parser.add_argument("-n", type=usage.count, default=20, metavar="COUNT", help="at most so many (default 20)")


def how_long(parser: argparse.ArgumentParser) -> None:
    """Adds whether a command goes on with what comes."""
    parser.add_argument("--follow", "-f", action="store_true", help="go on with those to come")


def add(top: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds its commands; ``command`` makes one, with what all have."""
    below = top.add_parser("audit", help="the chain of all records").add_subparsers(required=True)

    verify = command("verify", audit.verify, "say whether the record is whole, and what was changed or cut", below)
    verify.add_argument(
        "--against",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="checkpoints from elsewhere; repeatable",
    )
    verify.add_argument(
        "--key",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a public key that signed some; repeatable",
    )
    for name, run, text in (
        ("search", audit.search, "the newest records of those that are asked for, oldest first"),
        ("export", audit.export, "records as JSON lines, oldest first"),
    ):
        found = command(name, run, text, below)
        about(found)
        found.add_argument("--since", type=usage.since, metavar="TIME", help=f"received {usage.SINCE}")
        found.add_argument("--until", type=usage.since, metavar="TIME", help="received before then")
        if name == "search":
            how_many(found)
            found.set_defaults(follow=False)
        else:
            found.add_argument(
                "--format", choices=["jsonl", "ocsf"], default="jsonl", help="ocsf: what it has a class for"
            )
    newest = command("tail", audit.tail, "the newest records of any kind, oldest first", below)
    how_many(newest)
    how_long(newest)
    command("gaps", audit.gaps, "numbers of guests that never came, and why where that is known", below)
    command("key", audit.key, "the public key that checkpoints are signed with", below)

    loss = command(
        "acknowledge-loss",
        audit_changes.acknowledge_loss,
        "say that the chain of before is gone: 'verify' tells it once instead of each old checkpoint",
        below,
    )
    loss.add_argument(
        "--key", type=Path, action="append", default=[], metavar="FILE", help="a public key of before; repeatable"
    )
    prune = command("prune", audit_changes.prune, "delete old days, each against a signed checkpoint that stays", below)
    prune.add_argument(
        "--before", type=usage.day, required=True, metavar="YYYY-MM-DD", help="the first day that stays (UTC)"
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    erase = command("erase", audit_changes.erase, "take a person's text and arguments out of the record", below)
    erase.add_argument("--user", required=True, help="whose")
    for parser in (loss, prune, erase):
        parser.add_argument("--yes", "-y", action="store_true", help="without being asked")
        parser.add_argument(
            "--message",
            "-m",
            type=usage.message,
            default="",
            required=parser is loss,
            metavar="TEXT",
            help="why, for the record",
        )
    hold = below.add_parser("hold", help="what is never pruned or erased").add_subparsers(required=True)
    for name, run, text in (
        ("add", audit_changes.hold_add, "keep all records of a user or a session"),
        ("remove", audit_changes.hold_remove, "let them be pruned and erased again"),
    ):
        found = command(name, run, text, hold)
        who = found.add_mutually_exclusive_group(required=True)
        who.add_argument("--user", help="of this user")
        who.add_argument("--session", metavar="ID", help="of this session")
        found.add_argument(
            "--message", "-m", type=usage.message, default="", metavar="TEXT", help="why, for the record"
        )
    command("list", audit.hold_list, "what is held", hold)
