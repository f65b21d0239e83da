"""Records: what guests tell of what they decided and saw, on its way into the audit's chain."""

import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Response, current_app, jsonify

from persona import json_fields, record_codec, wire
from persona.problems import Fault, PersonaError
from persona_broker import metrics
from persona_broker.api.guests import body, guest, store, wire_version
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.events import event
from persona_broker.audit.core.format import Entry, Stream, split
from persona_broker.audit.core.streams import Gap
from persona_broker.audit.delivery import Delivery

log = logging.getLogger("persona.api")

blueprint = Blueprint("records", __name__)

_SAY_EVERY_S = 60.0  # how often the log tells that the audit still cannot be written
_MOMENTARY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}  # others write: no disk failed


class Keeper:
    """Appends to the chain, and does what the operator chose where that cannot be written.  For any thread."""

    def __init__(self, chain: Chain, when_full: str) -> None:
        self.chain = chain
        self._drops = when_full == "drop"
        self._lock = threading.Lock()
        self._dropped: Counter[str] = Counter()  # by guest, since it could last be written
        self._said_at = 0.0  # monotonic; 0: it can be written

    def keep(self, delivery: Delivery) -> int:
        """How many numbers it says were dropped.  Everything of it is on the disk afterwards, or was dropped itself.

        Raises ``PersonaError``: the guest keeps it.
        """
        try:
            (kept,) = self.chain.deliver([delivery])
        except (sqlite3.Error, OSError) as error:
            self._failed(delivery, error)
            return 0
        metrics.audited(kept.kept, len(kept.conflicts))
        if kept.conflicts:
            log.critical(
                "guest %s: the numbers %s came with two contents each; both are kept: its agent, or whoever has its"
                " token, tells two stories ('persona-broker audit verify' shows them)",
                delivery.guest,
                ", ".join(map(str, kept.conflicts[:5])),
            )
        self._works()
        return kept.lost

    def _failed(self, delivery: Delivery, error: sqlite3.Error | OSError) -> None:
        now = time.monotonic()
        momentary = getattr(error, "sqlite_errorcode", None) in _MOMENTARY
        drops = self._drops and not momentary
        with self._lock:
            if drops:
                self._dropped[delivery.guest] += len(delivery.entries)
            if not self._said_at or now - self._said_at > _SAY_EVERY_S:
                self._said_at = now
                what = "records are dropped (audit.when_full)" if drops else "guests keep their records"
                log.critical("the audit in %s cannot be written: %s; %s", self.chain.directory, error, what)
        metrics.audit_failing(True)
        if not drops:
            metrics.audit_refused(len(delivery.entries))
            raise PersonaError(Fault.NOT_READY, "the audit cannot be written; the broker's log says why") from error
        metrics.audit_dropped(len(delivery.entries))

    def _works(self) -> None:
        if not self._said_at and not self._dropped:
            return
        with self._lock:
            dropped, self._dropped, self._said_at = self._dropped, Counter(), 0.0
        metrics.audit_failing(False)
        log.warning("the audit can be written again; %d records were dropped", dropped.total())
        try:
            self.chain.add([event("records_dropped", time.time(), vm=vm, count=count) for vm, count in dropped.items()])
        except (sqlite3.Error, OSError):
            with self._lock:
                self._dropped += dropped


@blueprint.post("/v1/records")
def records() -> Response:
    """Keeps the records of what a guest decided and saw.  One that cannot be read keeps no other from being kept."""
    name, version = guest(), wire_version()
    value = json_fields.mapping(body(), "", ("records", "lost"), ("stream",))
    items = value["records"]
    if not isinstance(items, list) or len(items) > record_codec.MAX_RECORDS:
        raise PersonaError(Fault.BAD_REQUEST, f"records: expected a list of at most {record_codec.MAX_RECORDS}")
    lost = json_fields.integer(value["lost"], "lost")
    stream = _stream(value["stream"]) if "stream" in value else None
    entries: list[Entry] = []
    refused: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        try:
            entries.append(_entry(item, f"records[{index}]", numbered=stream is not None))
        except json_fields.CodecError as error:
            refused.append({"index": index, "detail": error.message})
    why = refused[0]["detail"] if refused else ""
    if refused:
        log.error("guest %s: %d of %d records are none and count as lost: %s", name, len(refused), len(items), why)
    answers = version > wire.FIRST  # 0.1.0 takes anything but 204 for the refusal of all
    # who is told counts it, and says so with the next records
    uncounted = 0 if answers else len(refused)
    if entries or lost or uncounted:
        keeper: Keeper = current_app.extensions["keeper"]
        lost += keeper.keep(Delivery(name, entries, stream, lost, uncounted, why))
    if lost + uncounted:
        store().add_lost(lost + uncounted)
    return jsonify(refused=refused) if refused and answers else Response(status=204)


def _stream(value: object) -> Stream:
    item = json_fields.mapping(value, "stream", ("machine", "boot"))
    for name in ("machine", "boot"):
        text = json_fields.string(item[name], f"stream.{name}", 32)
        if len(text) != 32 or not set(text) <= set("0123456789abcdef"):
            raise json_fields.CodecError(f"stream.{name}", "expected 32 hexadecimal digits")
    return Stream(item["machine"], item["boot"])


def _entry(item: object, path: str, *, numbered: bool) -> Entry:
    """A record as it is kept.  Raises ``CodecError``."""
    if not isinstance(item, dict) or not numbered:
        return split(record_codec.encode_record(record_codec.decode_record(item, path)))
    said = dict(item)
    if "number" not in said:
        raise json_fields.CodecError(f"{path}.number", "missing")
    number = json_fields.integer(said.pop("number"), f"{path}.number")
    if number < 1:
        raise json_fields.CodecError(f"{path}.number", "expected a whole number from 1")
    marker = _marker(said, path)
    return split(record_codec.encode_record(record_codec.decode_record(said, path)), number, marker)


_WHY_MAX = 200  # characters
_LOST_MAX = 1 << 40  # numbers: a guest has not made more


def _marker(said: dict[str, Any], path: str) -> Gap | None:
    """Which numbers a guest says that it dropped; taken out of what it says."""
    if said.get("event") != "lost":
        return None
    lost: Mapping[str, Any] = json_fields.known(said.pop("lost", None), f"{path}.lost", ("first", "last", "why"))
    first, last = (json_fields.integer(lost[name], f"{path}.lost.{name}") for name in ("first", "last"))
    if not 1 <= first <= last <= _LOST_MAX:
        raise json_fields.CodecError(f"{path}.lost", "expected numbers from 1, the last not before the first")
    return Gap(first, last, json_fields.string(lost["why"], f"{path}.lost.why", _WHY_MAX))
