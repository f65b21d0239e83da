"""Where the poller leaves samples and the broker finds them: a file a host, replaced as a whole.

Not the database: a poller that is stopped in a transaction would stop the broker with it, and whoever talks to
hypervisors needs to read nothing of what the broker keeps.  Nor does the broker trust the poller: it opens the files of
the hosts in its settings and no others, and whatever lies there costs it bounded time and that host's sample alone.
"""

import errno
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from persona.shown import line as printable
from persona_broker.host.core.sample import DOMAINS_MAX, HostSample, decode, encode
from persona_broker.policy.conditions import AHEAD_MAX_S

log = logging.getLogger("persona.host")

_DOMAIN_BYTES = 512  # UUID, name, state and eight figures of 17 digits are about 430
SIZE_MAX = 8192 + DOMAINS_MAX * _DOMAIN_BYTES
_JSON_VALUES_MAX = 64 + DOMAINS_MAX * 32  # of [ { and comma: 15 a domain, and those in its texts
ROUND_MAX = 256 << 10  # bytes after which a round reads no further file: the watcher has guests to tell, too
_PROBLEM_MAX = 300  # characters
_ENDING = ".json"
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_Stamp = tuple[int, int, int]  # inode, size and time of a file


class SampleFiles:
    """The files of one directory.  One per writer and per reader; ``news`` is for one thread.

    A reader names its ``hosts``: files of others are not even opened.
    """

    def __init__(self, directory: Path, hosts: Iterable[str] = (), now: Callable[[], float] = time.time) -> None:
        self.hosts = tuple(hosts)
        self.is_behind = False  # whether the last ``news`` left files for the next
        self._directory = directory
        self._now = now
        self._next = 0  # of ``hosts``, where the next round begins
        self._seen: dict[str, _Stamp] = {}  # by host, of what was read
        self._problems: dict[str, str] = {}  # by host, what was logged last

    def put(self, sample: HostSample) -> None:
        """Replaces the host's sample.  Raises ``OSError``."""
        text = json.dumps(encode(sample)).encode()
        path = self._path(sample.host)
        if len(text) > SIZE_MAX:
            raise OSError(errno.EFBIG, f"a sample has at most {SIZE_MAX} bytes, this one {len(text)}", str(path))
        scratch = path.with_suffix(".new")
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
        scratch.replace(path)

    def news(self, bytes_max: int = ROUND_MAX) -> list[HostSample]:
        """Those of ``hosts`` that were put since the last call; one that cannot be read is logged and left out.

        After ``bytes_max`` no further file is read: ``is_behind`` then, and the next call goes on with the next host.
        """
        found, left = [], bytes_max
        first, self.is_behind = self._next, False
        for host in self.hosts[first:] + self.hosts[:first]:
            if left <= 0:
                self._next, self.is_behind = self.hosts.index(host), True
                break
            try:
                text = self._new_text(host)
                if text is not None:
                    left -= len(text)
                    found.append(self._sample(host, text))
                    self._problems.pop(host, None)
            except FileNotFoundError:  # no poller here, or none of this host
                self._problems.pop(host, None)
            except Exception as error:  # it is of somebody who is not trusted: never more than this host's sample
                self._say(host, error)
        return found

    def _path(self, host: str) -> Path:
        return self._directory / f"{host}{_ENDING}"

    def _new_text(self, host: str) -> bytes | None:
        """What the host's file says; ``None`` = it is the one that was read last."""
        descriptor = os.open(self._path(host), _FLAGS)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a regular file")
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            if self._seen.get(host) == stamp:
                return None
            self._seen[host] = stamp
            with open(descriptor, "rb", closefd=False) as file:
                text = file.read(SIZE_MAX + 1) if status.st_size <= SIZE_MAX else b""
            if len(text) > SIZE_MAX or status.st_size > SIZE_MAX:
                raise ValueError(f"longer than {SIZE_MAX} bytes")
            return text
        finally:
            os.close(descriptor)

    def _sample(self, host: str, text: bytes) -> HostSample:
        if sum(map(text.count, (b"[", b"{", b","))) > _JSON_VALUES_MAX:  # each value costs a hundred times its bytes
            raise ValueError("more values than a sample has")
        try:
            sample = decode(json.loads(text))
        except json.JSONDecodeError as error:  # without where: else it would be another problem at each look
            raise ValueError(f"it is no JSON: {error.msg}") from error
        if sample.host != host:
            raise ValueError(f"it is of host {sample.host!r}")
        latest = self._now() + AHEAD_MAX_S
        for name, at in (("at", sample.at), ("domains_at", sample.domains_at)):
            if at is not None and at > latest:
                raise ValueError(f"{name}: {at:.0f} is in the future: do both clocks go right?")
        return sample

    def _say(self, host: str, error: Exception) -> None:
        """Once as long as the problem is the same, though the poller puts a file a second."""
        problem = printable((str(error) or type(error).__name__)[:_PROBLEM_MAX])
        if self._problems.get(host) != problem:
            self._problems[host] = problem
            log.error("%s: this sample of a host does not count: %s", self._path(host), problem)
