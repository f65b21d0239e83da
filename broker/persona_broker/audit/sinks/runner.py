"""A thread a sink: reads the chain from where it last was, sends, and writes down how far it came."""

import json
import logging
import threading
import time
from collections.abc import Callable

from persona_broker.audit import checkpoints
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.events import event
from persona_broker.audit.files import replace_file
from persona_broker.audit.sinks.interface import Line, Sink, line_of, line_of_checkpoint
from persona_broker.store.sqlite import SqliteStore

log = logging.getLogger("persona.audit")

_BATCH = 500
_LOOK_EVERY_S = 0.5
_SAY_EVERY_S = 60.0
_PATIENCE_MAX_S = 30.0

Tell = Callable[[bool, int], None]  # whether it fails, and the number of the newest record that arrived; -1: as before


class Runner:
    """Sends everything at least once.  A sink that is new begins with what is appended from then on."""

    def __init__(self, sink: Sink, chain: Chain, store: SqliteStore, tell: Tell) -> None:
        self._sink = sink
        self._chain = chain
        self._store = store
        self._tell = tell
        self._cursor = chain.directory / f"sink-{sink.name}.json"
        self._stop = threading.Event()
        self._said_at = 0.0  # monotonic; 0: it works
        self._compared = False  # whether what arrived last is in the chain
        self._back: int | None = None  # where it was set back to, from when the chain has that until the cursor has it
        self._thread = threading.Thread(target=self._run, name=f"sink {sink.name}", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self, patience_s: float) -> None:
        """Sends what is there and ends; gives up after so many seconds."""
        self._stop.set()
        self._thread.join(patience_s)
        if self._thread.is_alive():
            log.error("sink %s: it does not end; what it did not get is sent after the next start", self._sink.name)

    def _run(self) -> None:
        patience = _LOOK_EVERY_S
        while True:
            ends = self._stop.is_set()
            try:
                while self._send_next():
                    pass
                patience = _LOOK_EVERY_S
                self._works()
            except Exception as error:  # whatever it is: it is told, and tried again
                self._fails(error)
                patience = min(_PATIENCE_MAX_S, 2 * patience)
            if ends:
                self._sink.close()
                return
            self._stop.wait(patience)

    def _send_next(self) -> bool:
        """The next batch; whether there was one."""
        number, at_us, hashed = self._where()
        rows = self._chain.read(number, _BATCH)
        if self._back is None and (not self._compared or (not rows and self._chain.head()[0] < number)):
            back = self._common(number, at_us, hashed)
            if back is not None:
                self._say_set_back(number, back)
            self._back, self._compared = back, True
        if self._back is not None:
            self._arrived(self._back, at_us, self._hash(self._back) or "")
            self._back = None
            return True
        lines: list[Line] = [line_of(row) for row in rows]
        if len(rows) < _BATCH:
            new = checkpoints.made_after(self._store, at_us)
            lines += map(line_of_checkpoint, new)
            at_us = max([at_us, *(item.at_us for item in new)])
        if not lines:
            self._tell(False, number)
            return False
        self._sink.send(lines)
        if rows:
            number, hashed = rows[-1].number, rows[-1].hash.hex()
        self._arrived(number, at_us, hashed)
        self._tell(False, number)
        return True

    def _arrived(self, number: int, at_us: int, hashed: str) -> None:
        replace_file(self._cursor, json.dumps({"number": number, "checkpoint_at_us": at_us, "hash": hashed}))

    def _common(self, number: int, at_us: int, hashed: str) -> int | None:
        """The newest record that is known to have arrived, where the chain was put back; ``None`` where it was not.

        What the sink had beyond it is of a past that this chain does not have.  Checkpoints that arrived say how far
        both are the same; those that were made since are no proof of that.
        """
        if self._chain.head()[0] >= number:
            there = self._hash(number)
            if not hashed or there is None or there == hashed:
                return None
        kept, here = checkpoints.kept(self._store)[0], self._chain.id()
        for item in sorted(kept, key=lambda item: -item.number):
            sent = item.number <= number and item.at_us <= at_us
            if sent and item.chain == here and not item.pruned_from and self._hash(item.number) == item.hash:
                return item.number
        return 0

    def _hash(self, number: int) -> str | None:
        """What a record has; ``None`` where the chain does not have it (any more)."""
        for row in self._chain.read(number - 1, 1):
            if row.number == number:
                return row.hash.hex()
        return None

    def _say_set_back(self, number: int, back: int) -> None:
        """Before the cursor goes back: who is killed in between says it twice, which harms nobody, and not never."""
        self._chain.add([event("sink_set_back", time.time(), sink=self._sink.name, to=back, **{"from": number})])
        log.warning(
            "sink %s had record %d, and the chain was put back to before that: it goes on after record %d",
            self._sink.name,
            number,
            back,
        )

    def _where(self) -> tuple[int, int, str]:
        """The number, the time of the checkpoint, and the hash of the record that arrived last.

        Versions of before wrote no hash; it is empty then.
        """
        try:
            value = json.loads(self._cursor.read_text())
            return int(value["number"]), int(value["checkpoint_at_us"]), str(value.get("hash", ""))
        except FileNotFoundError:
            number, hashed = self._chain.head()
            at_us = int(time.time() * 1e6)
            self._arrived(number, at_us, hashed.hex())
            return number, at_us, hashed.hex()
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self._cursor}: {error!r}; remove it, and the sink goes on with the newest") from None

    def _fails(self, error: Exception) -> None:
        now = time.monotonic()
        if not self._said_at or now - self._said_at > _SAY_EVERY_S:
            self._said_at = now
            log.critical("sink %s does not work: %s; records wait for it in the chain", self._sink.name, error)
        self._tell(True, -1)

    def _works(self) -> None:
        if self._said_at:
            self._said_at = 0.0
            log.warning("sink %s works again", self._sink.name)
