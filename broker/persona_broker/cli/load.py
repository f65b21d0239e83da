"""``load``: the host's load as decisions are made from, and as an operator sets it."""

import argparse
import sys
import time

from persona.answers import iso
from persona.problems import Fault, PersonaError
from persona_broker.cli.author import author
from persona_broker.cli.chain import hand_over
from persona_broker.cli.store import for_reading, say, store_of
from persona_broker.settings import Settings


def change(arguments: argparse.Namespace, settings: Settings) -> int:
    """``load set METRIC=PERCENT``: all that the settable source says; a metric left out is unknown."""
    load = dict(arguments.values)
    store = store_of(settings)
    store.put_set_load(load, author(""))
    hand_over(store, settings)
    sample = store.sample()
    source = sample.source if sample is not None else settings.load_source
    if source != "set":
        note = f"persona-broker: the load is from {source}; this counts once the broker has load_source = set"
        print(note, file=sys.stderr)
    say(arguments, {"load": load}, ", ".join(f"{metric} {percent:g} %" for metric, percent in load.items()))
    return 0


def show(arguments: argparse.Namespace, settings: Settings) -> int:
    """``load show``: what decisions are made from."""
    sample = for_reading(settings).sample()
    if sample is None:
        raise PersonaError(
            Fault.NOT_FOUND,
            "the load is not known: no broker has measured it yet; start it with 'persona-broker serve'",
        )
    age = time.time() - sample.at
    text = ", ".join(f"{metric} {percent:.0f} %" for metric, percent in sample.load.items()) or "nothing known"
    value = {"load": dict(sample.load), "at": iso(sample.at), "age_s": round(age, 1), "source": sample.source}
    say(arguments, value, f"{text} ({sample.source}, {age:.0f} s ago)")
    return 0
