"""``records tail``: what guests decided, the newest of what was asked for."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from persona.answers import iso, local
from persona.shown import line, word
from persona_broker.audit.chain import Chain
from persona_broker.audit.search import Found, Wanted, later, newest
from persona_broker.cli.chain import Bar, opened
from persona_broker.settings import Settings

_LOOK_EVERY_S = 0.5
_A_LOOK = 1000  # records
_SEEN_MAX = 100_000  # that --follow --distinct remembers


def tail(arguments: argparse.Namespace, settings: Settings) -> int:
    """Oldest first; with ``--follow`` until interrupted."""
    asked = wanted(arguments, since=arguments.since, denied=arguments.denied, distinct=arguments.distinct)
    return follow(arguments, opened(settings), asked, _value)


def wanted(arguments: argparse.Namespace, **more: Any) -> Wanted:
    """What the options of ``audit_options.about`` ask for, and ``more``."""
    names = ("user", "vm", "session", "program", "event", "decision", "reason", "persona")
    found: dict[str, Any] = {name: getattr(arguments, name, None) for name in names}
    return Wanted(**found, **more)


def follow(
    arguments: argparse.Namespace, chain: Chain, wanted: Wanted, value: Callable[[Found, Wanted], dict[str, Any]]
) -> int:
    """Prints the newest ``-n`` records, and with ``--follow`` those to come; ``value`` is what ``--json`` shows."""
    rows, last = newest(chain, wanted, arguments.n, Bar("indexed").show)
    seen: dict[str, None] = {}
    while True:
        for found in _new(rows, seen) if wanted.distinct and arguments.follow else rows:
            print(json.dumps(value(found, wanted)) if arguments.json else shown(found))
        if not arguments.follow:
            return 0
        sys.stdout.flush()
        time.sleep(_LOOK_EVERY_S)
        rows, last = later(chain, wanted, last, _A_LOOK)


def _new(rows: Iterable[Found], seen: dict[str, None]) -> Iterator[Found]:
    """Those that none before was like; remembers the newest ``_SEEN_MAX``."""
    for found in rows:
        alike = {key: value for key, value in found.record.items() if key not in ("at", "session", "leased")}
        key = json.dumps([found.vm, alike], sort_keys=True)
        if key not in seen:
            yield found
        seen.pop(key, None)
        seen[key] = None
        if len(seen) > _SEEN_MAX:
            del seen[next(iter(seen))]


def _value(found: Found, wanted: Wanted) -> dict[str, Any]:
    """As docs/cli.md has it: the record with its VM, its time as text."""
    at = found.record.get("at")
    value = {"vm": found.vm, **found.record, "at": iso(at) if isinstance(at, int | float) else None}
    return {**value, "count": found.count} if wanted.distinct else value


def shown(found: Found) -> str:
    """A record on one line."""
    record = found.record
    if found.vm is None:
        return _own(found)
    at = record.get("at")
    decision = str(record.get("decision"))
    if record.get("complain") is True and decision == "denied":
        decision = "would be denied (complain)"
    fields = [
        local(at) if isinstance(at, int | float) else "-",
        word(found.vm or "-"),
        word(str(record.get("user") or "-")),
        decision,
        str(record.get("reason") or record.get("event")),
        f"{record.get('persona') or '-'} ({record.get('policy') or '-'})",
    ]
    count = f"  ({found.count} times)" if found.count > 1 else ""
    return "  ".join(map(line, fields)) + f"  {_what(record)}{count}"


def _own(found: Found) -> str:
    """What the broker says itself: its event, who did it, and the rest as JSON."""
    at, record = found.row.at_us / 1e6, found.record
    rest = {name: value for name, value in record.items() if name not in ("at", "event", "author")}
    fields = [local(at), "broker", word(str(record.get("author") or "-")), str(record.get("event"))]
    return "  ".join(map(line, fields)) + f"  {line(json.dumps(rest, ensure_ascii=False))}"


def _what(record: dict[str, Any]) -> str:
    """The file that ran or was refused, which the guest knows, and then what its user called it and said to it."""
    program, argv = str(record.get("program") or ""), [str(word) for word in record.get("argv") or ()]
    if not program:
        return " ".join(map(word, argv)) or line(str(record.get("event")))
    called = argv[:1]
    if called and called[0].rpartition("/")[2] != program.rpartition("/")[2]:
        return " ".join([word(program), f"(called {word(called[0])})", *map(word, argv[1:])])
    return " ".join(map(word, [program, *argv[1:]]))
