"""Where the poller leaves samples and the broker finds them: a file a host, replaced as a whole.

Not the database: a poller that is stopped in a transaction would stop the broker with it, and whoever talks to
hypervisors needs to read nothing of what the broker keeps.
"""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from persona.problems import PersonaError
from persona_broker.host.core.sample import HostSample, decode, encode

log = logging.getLogger("persona.host")

SIZE_MAX = 8 << 20
FILES_MAX = 256
_ENDING = ".json"


class SampleFiles:
    """The files of one directory.  One per writer and per reader; ``news`` is for one thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: dict[str, tuple[int, int, int]] = {}  # by file: inode, size and time of what was read

    def put(self, sample: HostSample) -> None:
        """Replaces the host's sample.  Raises ``OSError``."""
        text = json.dumps(encode(sample)).encode()
        path = self._directory / f"{sample.host}{_ENDING}"
        scratch = path.with_suffix(".new")
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
        scratch.replace(path)

    def news(self) -> list[HostSample]:
        """Those that were put since the last call; one that cannot be read is logged and left out."""
        return [sample for path, stamp in self._files() if (sample := self._new(path, stamp)) is not None]

    def _files(self) -> Iterator[tuple[Path, tuple[int, int, int]]]:
        try:
            with os.scandir(self._directory) as entries:
                for number, entry in enumerate(entries):
                    if entry.name.endswith(_ENDING) and number < FILES_MAX:
                        status = entry.stat(follow_symlinks=False)
                        yield Path(entry.path), (status.st_ino, status.st_size, status.st_mtime_ns)
        except FileNotFoundError:  # no poller here, or it replaces one just now: the next look finds it
            return
        except OSError as error:
            log.error("%s: samples of hosts cannot be read: %s", self._directory, error)

    def _new(self, path: Path, stamp: tuple[int, int, int]) -> HostSample | None:
        if self._seen.get(path.name) == stamp:
            return None
        if len(self._seen) >= FILES_MAX:
            self._seen.clear()
        self._seen[path.name] = stamp
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                text = file.read(SIZE_MAX + 1)
            if len(text) > SIZE_MAX:
                raise ValueError(f"longer than {SIZE_MAX} bytes")
            sample = decode(json.loads(text))
            if path.name != f"{sample.host}{_ENDING}":
                raise ValueError(f"it is of host {sample.host!r}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError, PersonaError) as error:
            log.error("%s: this sample of a host does not count: %s", path, error)
            return None
        return sample
