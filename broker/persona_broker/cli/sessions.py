"""``sessions``: the open sessions of all guests, and an operator's end of some."""

import argparse
from typing import Any

from persona.answers import as_json, iso, local
from persona.problems import Fault, PersonaError
from persona.shown import word
from persona_broker.cli.author import author
from persona_broker.cli.chain import hand_over
from persona_broker.cli.store import existing, for_reading
from persona_broker.settings import Settings
from persona_broker.store.interface import SessionRow


def show(arguments: argparse.Namespace, settings: Settings) -> int:
    """``sessions list``: oldest first."""
    rows = for_reading(settings).sessions()
    if arguments.json:
        print(as_json([_value(row) for row in rows]))
        return 0
    for row in rows:
        print(_line(row) + ("  ending" if row.ending else "  revoked" if row.revoked else ""))
    if not rows:
        print("no open sessions")
    return 0


def revoke(arguments: argparse.Namespace, settings: Settings) -> int:
    """``sessions revoke USER|ID``: guests hear of it at once, and tell their users."""
    store = existing(settings)
    found = store.revoke(arguments.who, arguments.vm, end=arguments.end, author=author(""))
    hand_over(store, settings)
    if not found:
        where = f" on {arguments.vm}" if arguments.vm else ""
        fix = "'persona-broker sessions list' shows what is open"
        raise PersonaError(
            Fault.NOT_FOUND, f"there is no open session {arguments.who!r} and none of such a user{where}; {fix}"
        )
    if arguments.json:
        print(as_json([_value(row) for row in found]))
        return 0
    for row in found:
        print(_line(row) + ("  ending" if arguments.end else "  revoked"))
    users = sorted({word(row.subject.user) for row in found})
    print(f"{', '.join(users)} may log in again where a policy names them: that is for policies to change")
    return 0


def _value(row: SessionRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "vm": row.guest,
        "user": row.subject.user,
        "service": row.service,
        "remote": row.remote,
        "opened_at": iso(row.opened_at),
        "revoked": row.revoked,
        "ending": row.ending,
    }


def _line(row: SessionRow) -> str:
    fields = (row.id, row.guest, row.subject.user, row.service, row.remote or "-", local(row.opened_at))
    return "  ".join(map(word, fields))
