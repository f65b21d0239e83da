"""The spool's files: written at their end, read from their beginning, removed when the broker has all of one.

Nothing is ever overwritten.  What cannot be read is renamed, and left to the operator.
"""

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from persona import json_fields, record_codec
from persona.json_fields import CodecError
from persona.record_codec import Stream
from persona_guest import files
from persona_guest.audit import spool_format
from persona_guest.audit.spool_format import FormatError, Header, Held, Summary

log = logging.getLogger("persona.record")

MACHINE_ID = Path("/etc/machine-id")
_MACHINE = "machine"  # the file that says whose spool this is
_SUFFIX = ".records"
_ASIDE = ".aside"


@dataclass(frozen=True, slots=True)
class Framed:
    """One record's frame.  ``lost``: the first and the last number of what it says is lost, where it is a marker."""

    number: int
    frame: bytes
    held: Held
    lost: tuple[int, int] | None


@dataclass(slots=True)
class Segment:
    """One file.  The broker has it up to ``sent`` and ``sent_number``; it is whole up to ``end`` and ``last``.

    ``digest`` is of all that is in it; ``None`` where it was taken up by a summary, and is not summed up again.
    """

    path: Path
    stream: Stream
    sent: int
    sent_number: int
    end: int
    last: int
    is_empty: bool = True  # no record was ever in it
    damaged: bool = False  # in the middle: it is kept when all that can be read of it was sent
    bytes_of: Counter[Held] = field(default_factory=Counter)  # of the records after ``sent``
    digest: "hashlib._Hash | None" = None
    ever: Counter[Held] = field(default_factory=Counter)  # bytes of all its records
    lost: list[tuple[int, int]] = field(default_factory=list)  # what its markers say

    def count(self, held: Held, size: int, lost: tuple[int, int] | None) -> None:
        """One more record is in it, for its summary."""
        self.ever[held] += size
        if lost is not None:
            self.lost.append(lost)

    def summary(self) -> Summary | None:
        """``None`` where the agent after this one needs none, of what is not whole, and where ``digest`` is."""
        if self.sent >= self.end or self.damaged or self.digest is None:
            return None
        return Summary(self.end, self.digest.hexdigest(), self.last, tuple(self.ever.items()), tuple(self.lost))


class Segments:
    """The files of one directory, oldest first.  Not for two threads at once."""

    def __init__(self, directory: Path, machine_id: Path = MACHINE_ID) -> None:
        """Makes the directory where there is none; another machine's is renamed.  Raises ``OSError``."""
        self._directory = directory
        self.all: list[Segment] = []
        self._fd = -1  # of the newest, where this agent made it
        self._unsynced = False
        self.aside: list[str] = []  # what was renamed
        self.machine = self._prepare(machine_id)
        self._next = 1

    def _prepare(self, machine_id: Path) -> str:
        directory, of = self._directory, _owner(machine_id)
        machine = None
        try:
            directory.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            why, machine = _look_at(directory, of)
            if why:
                _rename_aside(directory, why, self.aside)
                directory.mkdir(mode=0o700)
                machine = None
        os.chmod(directory, 0o700)
        files.clear_unfinished(directory)
        if machine is None:
            machine = os.urandom(16).hex()
            files.write(directory / _MACHINE, json.dumps({"machine": machine, "of": of}))
            _sync(directory / _MACHINE)  # without it, what is in the spool would be nobody's after a loss of power
            _sync(directory)
        return machine

    # --- what an agent before this one left ---

    def restore(self, stream: Stream, settled: int) -> list[tuple[Segment, Summary | tuple[bytes, ...]]]:
        """Takes up each file: with its summary where the file after it has a right one, else with the payloads in it.

        ``settled`` is the last number of ``stream`` that was sent; a file in whose middle that is comes with its
        payloads.  Call it once, before anything is written.
        """
        found: list[tuple[Segment, Summary | tuple[bytes, ...]]] = []
        paths = sorted(self._directory.glob("*" + _SUFFIX))
        told: Summary | None = None
        for path in reversed(paths):
            with contextlib.suppress(ValueError):
                self._next = max(self._next, int(path.name.removesuffix(_SUFFIX)) + 1)
            summary, told = told, None
            try:
                data = path.read_bytes()
                if not data:  # made, and cut off with the power before anything was in it
                    path.unlink()
                    continue
                header, start = self._header(data)
            except (OSError, FormatError) as error:
                self.set_aside(path, str(error))
                continue
            told = header.before
            segment = Segment(path, header.stream, start, header.first - 1, len(data), header.first - 1)
            is_partly_sent = header.stream == stream and header.first <= settled < (summary.last if summary else 0)
            if summary is not None and not is_partly_sent and _is_of(summary, data, start):
                segment.last, segment.is_empty = summary.last, not summary.held
                found.append((segment, summary))
            else:
                found.append((segment, self._payloads(segment, data, newest=path == paths[-1])))
        found.reverse()
        self.all = [segment for segment, _ in found]
        return found

    def _header(self, data: bytes) -> tuple[Header, int]:
        """And where it ends.  Raises ``FormatError``."""
        head = spool_format.read(data, limit=1)
        if not head.payloads:
            raise FormatError("it does not begin as a segment does")
        header = spool_format.decode_header(head.payloads[0])
        if header.stream.machine != self.machine:
            raise FormatError("it is of another machine")
        return header, head.end

    def _payloads(self, segment: Segment, data: bytes, *, newest: bool) -> tuple[bytes, ...]:
        """Reads a file frame by frame, as far as it is whole."""
        path = segment.path
        frames = spool_format.read(data, segment.sent)
        segment.end, segment.is_empty = frames.end, not frames.payloads
        segment.digest = hashlib.sha256(memoryview(data)[: frames.end])
        left = len(data) - frames.end
        if left and newest and spool_format.is_torn(data, frames.end):
            log.warning(
                "%s: its last %d bytes are no whole record; they are cut off (a crash, a loss of power)", path, left
            )
            with contextlib.suppress(OSError):  # the agent after this one would take them for damage
                os.truncate(path, frames.end)
        elif left:
            log.error("%s: its last %d bytes cannot be read; it is kept when the others were sent", path, left)
            segment.damaged = True
        return frames.payloads

    # --- writing ---

    def append(self, stream: Stream, records: Sequence[Framed], most: int) -> None:
        """Writes whole frames at the end, into a new file where the newest has ``most`` bytes or is not this agent's.

        Raises ``OSError``; then nothing of it is there.
        """
        if self._fd < 0 or self.all[-1].end >= most or self.all[-1].stream != stream:
            self._begin(stream, records[0].number)
        segment = self.all[-1]
        try:
            data = b"".join(record.frame for record in records)
            _write(self._fd, data, segment.end)
        except OSError:
            self._give_up_tail(segment)
            raise
        self._unsynced = True
        segment.is_empty = False
        segment.end += len(data)
        segment.last = records[-1].number
        if segment.digest is not None:
            segment.digest.update(data)
        for record in records:
            segment.bytes_of[record.held] += len(record.frame)
            segment.count(record.held, len(record.frame), record.lost)

    def _begin(self, stream: Stream, first: int) -> None:
        if self._fd >= 0:
            os.fdatasync(self._fd)
        path = self._directory / f"{self._next:012d}{_SUFFIX}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            before = self.all[-1].summary() if self.all else None  # it is written no more
            header = spool_format.encode_header(Header(stream, first, before))
            _write(fd, header, 0)
            _sync(self._directory)
        except OSError:
            os.close(fd)
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        self.rest()
        self._next += 1
        self._fd = fd
        segment = Segment(path, stream, len(header), first - 1, len(header), first - 1)
        segment.digest = hashlib.sha256(header)
        self.all.append(segment)

    def _give_up_tail(self, segment: Segment) -> None:
        """After a write that failed: its part is cut off, or the file is written no more."""
        try:
            os.ftruncate(self._fd, segment.end)
        except OSError:
            self.rest()

    def sync(self, lock: threading.Lock) -> str:
        """Has the disk keep what is written; ``lock`` guards these files, and is not held while the disk works.

        Returns why it could not, and the file is written no more then; empty where it could.
        """
        with lock:
            if not self._unsynced or self._fd < 0:
                return ""
            self._unsynced, written = False, self._fd
            try:
                fd = os.dup(written)
            except OSError as error:
                return str(error)
        try:
            os.fdatasync(fd)
        except OSError as error:
            with lock:
                if self._fd == written:
                    self.rest()
            return str(error)
        finally:
            os.close(fd)
        return ""

    def rest(self) -> None:
        """Closes the newest file; what comes goes into a new one."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # --- reading ---

    def read(self, segment: Segment, count: int, size: int) -> spool_format.Frames:
        """Frames after what was sent, at most ``count``, and of ``size`` bytes and one more.  Raises ``OSError``."""
        with segment.path.open("rb") as file:
            file.seek(segment.sent)
            room = min(segment.end - segment.sent, size + spool_format.PAYLOAD_MAX)
            frames = spool_format.read(file.read(room), 0, count)
        return spool_format.Frames(frames.payloads, segment.sent + frames.end)

    def drop_sent(self) -> None:
        """Removes files that the broker has all of.  The newest stays: it says which number was the last."""
        while len(self.all) > 1 and self.all[0].sent >= self.all[0].end:
            segment = self.all.pop(0)
            if segment.damaged:
                self.set_aside(segment.path, "a part of it cannot be read; the rest was sent")
                continue
            try:
                segment.path.unlink(missing_ok=True)
            except OSError as error:
                log.error("%s cannot be removed: %s", segment.path, error)

    def empty(self, stream: Stream, first: int) -> None:
        """Where the broker has everything, leaves an empty file that says so: nothing is sent again after a boot.

        Raises nothing: it would be sent again, that is all.
        """
        if self.all and all(segment.sent >= segment.end for segment in self.all) and self.all[-1].last >= first - 1:
            if not self.all[-1].is_empty:
                with contextlib.suppress(OSError):
                    self._begin(stream, first)
            self.drop_sent()

    def damaged(self, segment: Segment, why: str) -> None:
        """Renames a file of which no more can be read."""
        if segment is self.all[-1]:
            self.rest()
        self.all.remove(segment)
        self.set_aside(segment.path, why)

    def set_aside(self, path: Path, why: str) -> None:
        """Renames a file, which then nothing here touches any more.  Raises nothing."""
        _rename_aside(path, why, self.aside)


def _is_of(summary: Summary, data: bytes, start: int) -> bool:
    """Whether a summary is that of a file with these bytes, whose header ends at ``start``."""
    whole = (summary.size, sum(size for _, size in summary.held)) == (len(data), len(data) - start)
    return whole and hashlib.sha256(data).hexdigest() == summary.sha256


def _owner(machine_id: Path) -> str:
    """What tells one machine's spool from another's; machine-id(5) asks not to show the id itself."""
    try:
        text = machine_id.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        text = ""
    return hashlib.sha256(b"persona-spool " + text.encode()).hexdigest()[:32]


def _look_at(directory: Path, of: str) -> tuple[str, str | None]:
    """Why a directory cannot be gone on with, empty where it can; and the number of the incarnation, if it has one."""
    if directory.is_symlink() or not directory.is_dir():
        return "it is no directory", None
    if directory.stat().st_uid != os.geteuid():
        return "it is another user's", None
    path = directory / _MACHINE
    try:
        value = json_fields.known(json.loads(path.read_text("ascii")), "", ("machine", "of"))
        machine = record_codec.decode_stream({"machine": value["machine"], "boot": value["machine"]}).machine
    except FileNotFoundError:
        return ("it does not say whose it is" if any(directory.iterdir()) else ""), None
    except (OSError, ValueError, CodecError, RecursionError) as error:
        return f"{path.name}: {error}", None
    return ("" if value["of"] == of else "it is another machine's (/etc/machine-id differs)"), machine


def _rename_aside(path: Path, why: str, aside: list[str]) -> None:
    """Raises ``OSError`` for a directory, which is in the way; nothing for a file."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    for turn in range(1, 100):
        name = f"{path.name}.{stamp}-{turn}{_ASIDE}"
        target = path.with_name(name)
        if os.path.lexists(target):
            continue
        try:
            path.rename(target)
        except OSError as error:
            log.error("%s cannot be used (%s), and cannot be renamed: %s", path, why, error)
            if path.is_file() and not path.is_symlink():
                return
            raise
        log.error("%s cannot be used (%s); it is kept as %s, and nothing in it is sent", path, why, target)
        aside.append(name)
        return


def _sync(path: Path) -> None:
    """Has the disk keep a file, or the names in a directory.  Raises ``OSError``."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(fd: int, data: bytes, offset: int) -> None:
    """Raises ``OSError``."""
    left = memoryview(data)
    while left:
        written = os.pwrite(fd, left, offset)
        left, offset = left[written:], offset + written
