"""An audit of four days, which tests of its commands begin with."""

import json
from contextlib import closing
from typing import Any

from persona_broker.audit import checkpoints, keys
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.format import split
from persona_broker.audit.delivery import Delivery
from persona_broker.store.sqlite import SqliteStore

from tests.broker.conftest import Broker
from tests.broker.test_audit_chain import BEGAN, DAY_S, STREAM, Clock, numbered, said

SECRET = "s3cr3t-of-alice"


def fill(broker: Broker) -> None:
    """Four days of records, a key, and a checkpoint at the end of each day."""
    clock = Clock()
    key, _ = keys.load_or_make(broker.directory / "audit.key")
    with (
        closing(SqliteStore(broker.directory / "db")) as store,
        closing(Chain(broker.directory / "audit", clock)) as chain,
    ):
        for day in range(4):
            clock.now = BEGAN + day * DAY_S
            mine = numbered(2 * day + 1, 2 * day + 2, argv=["mysql", SECRET], session=f"s-{day}")
            bobs = split(said("bob", decision="denied", reason="outside_hours", program="/usr/bin/nmap", session=""))
            chain.deliver([Delivery("vm-1", mine, STREAM), Delivery("vm-2", [bobs])])
            made = checkpoints.make(chain, key, clock)
            assert made is not None
            checkpoints.put(store, [made])


def answer(broker: Broker, *words: str, code: int = 0) -> Any:
    done = broker.run("audit", *words, "--json")
    assert done.returncode == code, (done.stdout, done.stderr)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return lines[0] if len(lines) == 1 and "ok" in lines[0] else lines


def days(broker: Broker) -> list[str]:
    return [path.stem[-2:] for path in Chain(broker.directory / "audit").segments()]
