"""``audit``: whether the record is whole, what is in it, and what an operator may take out of it."""

import argparse
import json
import sqlite3
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from persona.answers import as_json, iso, local
from persona.problems import Fault, PersonaError
from persona.shown import line, word
from persona_broker.audit import checkpoints, holds, keys
from persona_broker.audit.chain import Chain
from persona_broker.audit.core import ocsf
from persona_broker.audit.core.check import Finding
from persona_broker.audit.core.checkpoint import Checkpoint, CheckpointError, read_lines
from persona_broker.audit.core.format import joined
from persona_broker.audit.core.verify import Verification
from persona_broker.audit.search import Found, Wanted, each
from persona_broker.audit.segment import Segment
from persona_broker.audit.sinks.interface import exported
from persona_broker.audit.verify import verify as verify_chain
from persona_broker.cli.chain import Bar, opened, opened_both, opened_for_audit
from persona_broker.cli.records import follow, wanted
from persona_broker.cli.store import plural, say
from persona_broker.settings import Settings
from persona_broker.store.sqlite import SqliteStore

AGAINST_MAX = 256 * 1024 * 1024  # bytes of a file of checkpoints, which may be one that a sink wrote


def verify(arguments: argparse.Namespace, settings: Settings) -> int:
    """``audit verify``: 0 whole, 1 not; every finding says what and where."""
    try:
        known = given_keys(arguments)
        against = [item for file in arguments.against for item in _checkpoints_of(file)]
    except (ValueError, OSError) as error:
        print(f"persona-broker: {error}", file=sys.stderr)
        return 2
    store, chain = opened_for_audit(settings)
    own = keys.load(keys.key_file(chain.directory))
    known += [own.public] if own is not None else []
    here, wrong = checkpoints.kept(store) if store is not None else ([], [])
    right, more = checkpoints.sorted_out(here, known, "the database")
    elsewhere, even_more = checkpoints.sorted_out(against, known, "the file given")
    bar = Bar("verified")
    found = verify_chain(chain, [*right, *elsewhere], bar.show, known)
    bar.end()
    findings = [*found.findings, *wrong, *more, *even_more]
    _say_verified(arguments, found, findings, _losses(chain, found), len(right), len(elsewhere))
    return 1 if findings else 0


def given_keys(arguments: argparse.Namespace) -> list[keys.PublicKey]:
    """Those of ``--key``.  Raises ``OSError``, ``ValueError`` naming the file."""
    found = []
    for file in arguments.key:
        try:
            found.append(keys.read_public(file.read_text()))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    return found


def _losses(chain: Chain, found: Verification) -> list[dict[str, Any]]:
    """Each loss that somebody acknowledged, with why, and how many checkpoints it explains."""
    values = []
    for loss, count in found.acknowledged.items():
        said = [joined(row.facts, row.person) for row in chain.read(loss.number - 1, 1)]
        values.append(
            {
                "number": loss.number,
                "at": iso(loss.at),
                "author": loss.author,
                "message": str(said[0].get("message", "")) if said else "",
                "chain": loss.lost,
                "through": loss.through,
                "checkpoints": count,
            }
        )
    return values


def _checkpoints_of(file: Path) -> Iterable[Checkpoint]:
    if file.stat().st_size > AGAINST_MAX:
        raise ValueError(f"{file}: larger than {AGAINST_MAX} bytes; take the lines that have 'checkpoint'")
    try:
        found = list(read_lines(file.read_text("utf-8", "replace")))
    except CheckpointError as error:
        raise ValueError(f"{file}: {error}") from None
    if not found:
        raise ValueError(f"{file} holds no checkpoint: name a file that the sink audit.json_lines wrote")
    return found


def _say_verified(
    arguments: argparse.Namespace,
    found: Verification,
    findings: Sequence[Finding],
    losses: Sequence[dict[str, Any]],
    kept: int,
    given: int,
) -> None:
    if arguments.json:
        value = {
            "whole": not findings,
            "records": found.records,
            "erased": found.erased,
            "last": found.number,
            "checkpoints": kept,
            "checkpoints_given": given,
            "acknowledged": losses,
            "items": [asdict(item) for item in findings],
            "not_shown": found.unseen,
        }
        print(as_json(value))
        return
    for item in findings:
        where = [item.segment or "", f"record {item.number}" if item.number is not None else "", item.vm or ""]
        print(line(f"{item.kind}: {', '.join(part for part in where if part)}: {item.text}"))
    for loss in losses:
        who = f"{loss['author']} said on {loss['at']} in record {loss['number']}: {loss['message']}"
        what = f"the chain {loss['chain']} is gone up to record {loss['through']}"
        print(line(f"acknowledged loss: {what}, as {who} ({plural(loss['checkpoints'], 'checkpoint')})"))
    if found.unseen:
        print(f"and {found.unseen} more")
    against = f"{plural(kept, 'checkpoint')} in the database" + (f" and {given} given" if given else "")
    state = "the chain is whole" if not findings else f"the chain is NOT whole: {plural(len(findings), 'finding')}"
    print(f"{state}; {plural(found.records, 'record')} to number {found.number}, {against}")
    if found.erased:
        print(
            f"{plural(found.erased, 'record')} without the text: 'audit search --event audit_erased' says who erased it"
        )
    if not kept and not given:
        print("no checkpoint was there: that the end was not cut off is not shown")


def search(arguments: argparse.Namespace, settings: Settings) -> int:
    """``audit search``: the newest of those asked for, oldest first."""
    return follow(arguments, opened(settings), _wanted(arguments), _entry)


def tail(arguments: argparse.Namespace, settings: Settings) -> int:
    """``audit tail``: the newest records of any kind."""
    return follow(arguments, opened(settings), Wanted(guests_only=False), _entry)


def _wanted(arguments: argparse.Namespace) -> Wanted:
    return wanted(arguments, received_since=arguments.since, received_until=arguments.until, guests_only=False)


def _entry(found: Found, _wanted: Wanted) -> dict[str, Any]:
    return dict(exported(found.row))


def export(arguments: argparse.Namespace, settings: Settings) -> int:
    """``audit export``: JSON lines, oldest first."""
    left_out = 0
    bar = Bar("indexed")
    for found in each(opened(settings), _wanted(arguments), bar.show):
        bar.end()
        if arguments.format == "jsonl":
            print(json.dumps(exported(found.row)))
            continue
        event = ocsf.event_of(found.number, found.row.at_us, found.vm, found.record)
        if event is None:
            left_out += 1
        else:
            print(json.dumps(event))
    if left_out:
        note = f"{plural(left_out, 'record')} left out: OCSF has no class for them, or their text was erased"
        print(f"persona-broker: {note}", file=sys.stderr)
    return 0


def key(arguments: argparse.Namespace, settings: Settings) -> int:
    """``audit key``: the public half."""
    _, chain = opened_both(settings)
    found = keys.load(keys.key_file(chain.directory))
    if found is None:
        file = keys.key_file(chain.directory)
        raise PersonaError(Fault.NOT_FOUND, f"{file} is missing; 'persona-broker serve' makes it when it first starts")
    public = found.public
    say(arguments, {"key": public.id, "public": public.raw.hex(), "pem": public.pem()}, public.pem().rstrip())
    return 0


def gaps(arguments: argparse.Namespace, settings: Settings) -> int:
    """``audit gaps``: which numbers of guests never came; 1 where nobody said why."""
    chain = opened(settings)
    found = _gaps(chain)
    if arguments.json:
        print(as_json(found))
    for gap in [] if arguments.json else found:
        numbers = f"{gap['first']} to {gap['last']}" if gap["count"] > 1 else str(gap["first"])
        why = f"dropped by the guest: {gap['why']}" if gap["why"] else "LOST, and nobody said why"
        print(line(f"{word(str(gap['vm']))}  boot {gap['boot']}  numbers {numbers}  {why}"))
    if not found and not arguments.json:
        print("no gaps: every number of every guest came")
    return 1 if any(gap["why"] is None for gap in found) else 0


def _gaps(chain: Chain) -> list[dict[str, Any]]:
    paths = chain.segments()
    if not paths:
        return []
    query = (
        "SELECT guest, machine, boot, first, gaps.last, why FROM gaps JOIN streams ON streams.id = stream"
        " ORDER BY guest, streams.id, first"
    )
    with closing(Segment(paths[-1])) as segment:
        rows = segment.rows(query)
    names = ("vm", "machine", "boot", "first", "last", "why")
    return [{**dict(zip(names, row, strict=True)), "why": row[5] or None, "count": row[4] - row[3] + 1} for row in rows]


def hold_list(arguments: argparse.Namespace, settings: Settings) -> int:
    """``audit hold list``: oldest first."""
    store, _ = opened_both(settings)
    found = holds.holds(store)
    values = [{**asdict(item), "at": iso(item.at)} for item in found]
    text = "\n".join(
        line(f"{item.kind}  {word(item.name)}  {local(item.at)}  {item.author or '-'}  {item.message}")
        for item in found
    )
    say(arguments, values, text or "nothing is held")
    return 0


def known_holds(store: SqliteStore) -> list[holds.Hold]:
    """All holds; without them nothing may be deleted.  Raises ``PersonaError`` where they cannot be read."""
    try:
        return holds.holds(store)
    except sqlite3.Error as error:
        raise PersonaError(Fault.NOT_READY, f"what is held cannot be read, so nothing is deleted: {error}") from None
