"""``audit prune``, ``hold`` and ``erase``: what an operator may take out of the record, and what stays for ever."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persona.problems import Fault, PersonaError
from persona.shown import word
from persona_broker.audit import checkpoints, holds, keys
from persona_broker.audit.erase import erase as erase_user
from persona_broker.audit.inbox import take_over
from persona_broker.audit.keys import SigningKey
from persona_broker.audit.loss import acknowledge, contradicting
from persona_broker.audit.prune import Day, choose
from persona_broker.audit.prune import prune as prune_days
from persona_broker.cli.audit import given_keys, known_holds
from persona_broker.cli.author import author
from persona_broker.cli.chain import changeable, opened_both
from persona_broker.cli.store import UNCONFIRMED, plural, say
from persona_broker.settings import Settings
from persona_broker.store.sqlite import SqliteStore


def prune(arguments: argparse.Namespace, settings: Settings) -> int:
    """``audit prune --before DATE``: whole days, each against a signed checkpoint that stays."""
    store, chain = opened_both(settings) if arguments.dry_run else changeable(settings)
    key = _key(keys.key_file(chain.directory))
    held = known_holds(store)
    days = choose(store, chain, key, arguments.before, held)
    goes = [day for day in days if not day.stays]
    if goes and not arguments.dry_run:
        if not _confirmed(arguments, _lines(days), "Delete these days?"):
            return UNCONFIRMED
        days = prune_days(store, chain, key, days, held, arguments.before, author(arguments.message))
        goes = [day for day in days if not day.stays]
    value = {
        "pruned": [{"segment": day.path.stem, "first": day.first, "last": day.last} for day in goes],
        "kept": [{"segment": day.path.stem, "why": day.stays} for day in days if day.stays],
        "dry_run": arguments.dry_run,
    }
    done = "would be deleted" if arguments.dry_run else "deleted"
    say(arguments, value, "\n".join([*_lines(days), f"{plural(len(goes), 'day')} {done}"]))
    return 0


def _lines(days: Sequence[Day]) -> list[str]:
    lines = [f"{day.path.stem}: records {day.first} to {day.last}" for day in days if not day.stays]
    return [*lines, *(f"{day.path.stem} stays: {day.stays}" for day in days if day.stays)]


def _key(file: Path) -> SigningKey:
    found = keys.load(file)
    if found is None:
        raise PersonaError(
            Fault.NOT_FOUND,
            f"{file} is missing, and a checkpoint must be signed first; nothing was deleted. Start the broker, which"
            " makes the key, or put the key back from your backup",
        )
    return found


def acknowledge_loss(arguments: argparse.Namespace, settings: Settings) -> int:
    """``audit acknowledge-loss``: an earlier chain, of which only checkpoints are left, is gone, and it is known."""
    try:
        known = given_keys(arguments)
    except (ValueError, OSError) as error:
        print(f"persona-broker: {error}", file=sys.stderr)
        return 2
    store, chain = changeable(settings)
    if not chain.segments():
        raise PersonaError(Fault.NOT_FOUND, f"{chain.directory} has no chain that could go on; start the broker first")
    key = _key(keys.key_file(chain.directory))
    known.append(key.public)
    here, unreadable = checkpoints.kept(store)
    right, wrong = checkpoints.sorted_out(here, known, "the database")
    if unreadable or wrong:
        text = [*unreadable, *wrong][0].text.replace("audit verify", "acknowledge-loss")
        raise PersonaError(Fault.CONFLICT, f"nothing was acknowledged: {text}")
    gone = contradicting(chain, right, known)
    if not gone:
        fix = "every checkpoint in the database is of this chain, or was acknowledged before"
        raise PersonaError(Fault.NOT_FOUND, f"there is no loss to acknowledge: {fix}")
    lines = [f"the chain {item.chain} is gone, with its records up to number {item.number}" for item in gone]
    if not _confirmed(arguments, lines, "Put on the record that this is known?"):
        return UNCONFIRMED
    made = acknowledge(store, chain, key, gone, author(arguments.message))
    value = [{"chain": loss.lost, "through": loss.through} for loss in made]
    say(arguments, {"acknowledged": value}, "\n".join([*lines, "acknowledged"]))
    return 0


def hold_add(arguments: argparse.Namespace, settings: Settings) -> int:
    """``audit hold add``."""
    return _hold(arguments, settings, holds.add, "held", "is held from now on")


def hold_remove(arguments: argparse.Namespace, settings: Settings) -> int:
    """``audit hold remove``."""
    return _hold(arguments, settings, holds.remove, "released", "is not held any more")


def _hold(arguments: argparse.Namespace, settings: Settings, change: Any, member: str, text: str) -> int:
    store, chain = changeable(settings)
    kind = "user" if arguments.user is not None else "session"
    name = arguments.user if arguments.user is not None else arguments.session
    change(store, kind, name, author(arguments.message))
    take_over(store, chain)
    say(arguments, {member: {"kind": kind, "name": name}}, f"the {kind} {word(name)} {text}")
    return 0


def erase(arguments: argparse.Namespace, settings: Settings) -> int:
    """``audit erase --user U``: their text and arguments; that something was decided stays."""
    store, chain = changeable(settings)
    _refuse_held(store, arguments.user)
    lines = [f"the text of all records of {word(arguments.user)} is erased from the audit, for ever"]
    if not _confirmed(arguments, lines, "Erase it?"):
        return UNCONFIRMED
    sessions = [item.name for item in known_holds(store) if item.kind == "session"]
    erased = erase_user(chain, arguments.user, author(arguments.message), sessions)
    count = sum(erased.values())
    note = "what sinks got of it, and what users' journals have, is theirs to erase"
    say(arguments, {"erased": count, "segments": erased}, f"{plural(count, 'record')} erased; {note}")
    return 0


def _refuse_held(store: SqliteStore, user: str) -> None:
    if any((item.kind, item.name) == ("user", user) for item in known_holds(store)):
        fix = "'audit hold remove --user' ends that"
        raise PersonaError(Fault.CONFLICT, f"the user {user!r} is held, so nothing was erased; {fix}")


def _confirmed(arguments: argparse.Namespace, lines: Sequence[str], question: str) -> bool:
    if arguments.yes:
        return True
    print("\n".join(lines), file=sys.stderr)
    if not sys.stdin.isatty():
        raise PersonaError(Fault.CONFLICT, "refused: there is no terminal on which to ask; add --yes to go on unasked")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
