"""A thread a sink: reads the chain from where it last was, sends, and writes down how far it came."""

import json
import logging
import threading
import time
from collections.abc import Callable

from persona_broker.audit import checkpoints
from persona_broker.audit.chain import Chain
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
        number, at_us = self._where()
        rows = self._chain.read(number, _BATCH)
        lines: list[Line] = [line_of(row) for row in rows]
        if len(rows) < _BATCH:
            new = checkpoints.made_after(self._store, at_us)
            lines += map(line_of_checkpoint, new)
            at_us = max([at_us, *(item.at_us for item in new)])
        if not lines:
            self._tell(False, number)
            return False
        self._sink.send(lines)
        number = rows[-1].number if rows else number
        replace_file(self._cursor, json.dumps({"number": number, "checkpoint_at_us": at_us}))
        self._tell(False, number)
        return True

    def _where(self) -> tuple[int, int]:
        """The number, and the time of the checkpoint, that arrived last."""
        try:
            value = json.loads(self._cursor.read_text())
            return int(value["number"]), int(value["checkpoint_at_us"])
        except FileNotFoundError:
            number = self._chain.head()[0]
            at_us = int(time.time() * 1e6)
            replace_file(self._cursor, json.dumps({"number": number, "checkpoint_at_us": at_us}))
            return number, at_us
        except (KeyError, TypeError, RecursionError) as error:
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
