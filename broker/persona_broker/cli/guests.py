"""``guest``: which guests there are, and their tokens.

Each command takes the parsed arguments and the settings, prints, and returns the exit code.
"""

import argparse
import os
import re
import time

from persona.answers import iso, local
from persona.problems import Fault, PersonaError
from persona.shown import word
from persona_broker.cli.author import author
from persona_broker.cli.chain import hand_over
from persona_broker.cli.store import existing, for_reading, say, store_of
from persona_broker.settings import Settings

NO_GUESTS = "no guests; 'persona-broker guest add NAME' registers one"


def add(arguments: argparse.Namespace, settings: Settings) -> int:
    """``guest add NAME``: a token, shown this once; with ``--renew`` an old one is refused from now on."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", arguments.name):
        rule = "a letter or digit, then letters, digits, '.', '_', '-'; at most 64"
        raise PersonaError(Fault.BAD_REQUEST, f"{arguments.name!r} is not a valid VM name: {rule}")
    store = store_of(settings)
    if arguments.name in store.guests() and not arguments.renew:
        fix = "--renew gives it another token, and the one it has is refused from then on"
        raise PersonaError(Fault.CONFLICT, f"there is a guest {arguments.name!r} already; {fix}")
    if arguments.token_file:
        fd = os.open(arguments.token_file, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with open(fd, "w") as file:  # before there is a token: none that cannot be written
            os.fchmod(fd, 0o600)  # it may have been there before
            token = store.add_guest(arguments.name, author=author(""))
            file.truncate()
            file.write(token + "\n")
        hand_over(store, settings)
        say(
            arguments,
            {"vm": arguments.name, "token_file": str(arguments.token_file)},
            f"{arguments.name} added",
        )
    else:
        token = store.add_guest(arguments.name, author=author(""))
        hand_over(store, settings)
        say(arguments, {"vm": arguments.name, "token": token}, token)
    return 0


def show(arguments: argparse.Namespace, settings: Settings) -> int:
    """``guest list``."""
    from persona_broker.policy.host_load import HostJudge
    from persona_broker.store.hosts import SeenHosts

    store = for_reading(settings)
    names, quarantined = store.guests(), store.quarantined()
    bound = {guest: binding.uuid for guest, binding in store.bindings().items()}
    placed = HostJudge(settings.load_max_age_s).look({}, SeenHosts(store).look(), bound, time.time())
    items = [
        {
            "vm": name,
            "quarantined_at": iso(quarantined[name]) if name in quarantined else None,
            "uuid": bound.get(name),
            "host": (placed[name].host or None) if name in placed else None,
        }
        for name in names
    ]
    lines = [
        name
        + (f"  quarantined {local(quarantined[name])}" if name in quarantined else "")
        + (f"  domain {bound[name]} on {placed[name].host or 'no host that is known'}" if name in bound else "")
        for name in names
    ]
    say(arguments, items, "\n".join(lines) or NO_GUESTS)
    return 0


def readmit(arguments: argparse.Namespace, settings: Settings) -> int:
    """``guest readmit NAME...``: ends the quarantine that a restore put them in; ``--all`` of them."""
    if bool(arguments.names) is arguments.all:
        raise PersonaError(Fault.BAD_REQUEST, "name guests, or --all; 'persona-broker guest list' shows them")
    store = existing(settings)
    unknown = sorted(set(arguments.names) - store.quarantined().keys())
    if unknown:
        raise PersonaError(Fault.NOT_FOUND, f"not in quarantine: {', '.join(map(word, unknown))}; nothing was changed")
    found = store.readmit(arguments.names or store.quarantined(), author(""))
    hand_over(store, settings)
    lines = [f"{name} readmitted" for name in found]
    say(arguments, {"readmitted": found}, "\n".join(lines) or "no guest is in quarantine")
    return 0


def remove(arguments: argparse.Namespace, settings: Settings) -> int:
    """``guest remove NAME``: its token and its event streams end."""
    store = existing(settings)
    if not store.remove_guest(arguments.name, author("")):
        raise PersonaError(Fault.NOT_FOUND, f"there is no guest {arguments.name!r}")
    hand_over(store, settings)
    say(arguments, {"removed": arguments.name}, f"{arguments.name} removed")
    return 0
