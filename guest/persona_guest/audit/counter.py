"""The numbers that records of this boot have had, in a file that a killed agent leaves right.

It lies in the file system of the agent's runtime state, where a full disk does not reach and which a boot clears; it
is written in place, before the first use of a number.  A write of so few bytes into a page that is there is whole or
has not been: no kill comes in between.
"""

import json
import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from persona import json_fields, record_codec
from persona.json_fields import CodecError
from persona.record_codec import Stream

log = logging.getLogger("persona.record")

_SIZE = 1024  # bytes of the file; its text is padded to that


@dataclass(frozen=True, slots=True)
class Counted:
    """``given`` is the highest number that was used, ``settled`` the highest that the broker has or was told of.

    ``dropped`` are records that still need a number and a marker, by why.
    """

    stream: Stream
    given: int = 0
    settled: int = 0
    dropped: tuple[tuple[str, int], ...] = ()


class Counter:
    """What was counted in this boot.  Without a ``path`` it is kept nowhere."""

    def __init__(self, path: Path | None, stream: Stream | None, boot: str) -> None:
        """``stream`` is the spool's; ``None`` = it has none: then that of an agent before this one, or a new one.

        Raises nothing: without a file it counts on in memory.
        """
        self._path = path
        self._fd = -1
        self._complained = False
        before = self._read()
        self.is_known = before is not None and before.stream.boot == boot and stream in (None, before.stream)
        if before is not None and self.is_known:
            self.now = before
        else:
            self.now = Counted(stream or Stream(os.urandom(16).hex(), boot))

    def close(self) -> None:
        """Lets go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def note(
        self,
        *,
        given: int | None = None,
        settled: int | None = None,
        dropped: tuple[tuple[str, int], ...] | None = None,
    ) -> None:
        """Writes down what is named.  Raises nothing."""
        now = self.now
        self.now = replace(
            now,
            given=now.given if given is None else given,
            settled=now.settled if settled is None else settled,
            dropped=now.dropped if dropped is None else dropped,
        )
        if self._path is None or self.now == now:
            return
        try:
            if self._fd < 0:
                self._fd = self._open(self._path)
            os.pwrite(self._fd, json.dumps(_to_json(self.now)).encode().ljust(_SIZE), 0)
            self._complained = False
        except OSError as error:
            if not self._complained:
                log.error("%s: %s; should the agent be killed, numbers of records may be used twice", self._path, error)
            self._complained = True

    def _open(self, path: Path) -> int:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def _read(self) -> Counted | None:
        if self._path is None:
            return None
        try:
            with self._path.open("rb") as file:
                return _from_json(json.loads(file.read(_SIZE)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, CodecError, RecursionError) as error:
            log.error("%s: %s; numbers of records go on from what the spool has", self._path, error)
            return None


def _to_json(counted: Counted) -> dict[str, object]:
    return {**asdict(counted), "dropped": dict(counted.dropped)}


def _from_json(value: object) -> Counted:
    """Raises ``CodecError`` (or ``ValueError``)."""
    item = json_fields.mapping(value, "", ("stream", "given", "settled", "dropped"))
    dropped = item["dropped"]
    if not isinstance(dropped, dict):
        raise ValueError("dropped: expected an object")
    return Counted(
        record_codec.decode_stream(item["stream"]),
        json_fields.integer(item["given"], "given"),
        json_fields.integer(item["settled"], "settled"),
        tuple((str(why), json_fields.integer(count, "dropped")) for why, count in dropped.items()),
    )
