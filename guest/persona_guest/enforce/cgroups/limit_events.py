"""Says when a place ran into a limit: what was killed for memory, what could not be started for pids.

The kernel counts both in files of the place's cgroup, and wakes whoever watches them.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from persona.problems import PersonaError, Reason
from persona_guest.core.persona_cgroups import PersonaCgroup
from persona_guest.kernel.cgroup import Hierarchy
from persona_guest.kernel.inotify import IN_IGNORED, Inotify
from persona_guest.loop import READABLE, Loop

log = logging.getLogger("persona.enforce")

_QUIET_S = 5.0  # a bomb hits its limit thousands of times a second: one line is enough
_COUNTERS = (("memory.events", "oom_kill", Reason.MEMORY_LIMIT), ("pids.events", "max", Reason.PIDS_LIMIT))

Alarm = Callable[[PersonaCgroup, Reason], None]


@dataclass(slots=True)
class _Counter:
    place: PersonaCgroup
    file: str
    key: str
    reason: Reason
    count: int
    quiet_until: float = 0.0


class Alarms:
    """``alarm`` is called in the loop's thread, at most every few seconds a place and limit."""

    def __init__(self, loop: Loop, tree: Hierarchy, alarm: Alarm) -> None:
        self._tree = tree
        self._alarm = alarm
        self._inotify = Inotify()
        self._counters: dict[int, _Counter] = {}
        loop.add_reader(self._inotify.fd, READABLE, self._ready)

    def watch(self, place: PersonaCgroup) -> None:
        """Watches a place from now on, until its cgroup goes; what was counted before is not told."""
        for file, key, reason in _COUNTERS:
            try:
                number = self._inotify.add(self._tree.path(place.cgroup, file))
                known = self._counters.get(number)
                if known is None:
                    self._counters[number] = _Counter(place, file, key, reason, self._count(place, file, key))
                else:
                    known.place = place  # another version of the persona
            except OSError as error:
                log.warning("%s of %s is not watched: %s", file, place.cgroup, error)

    def _count(self, place: PersonaCgroup, file: str, key: str) -> int:
        for line in self._tree.read(place.cgroup, file).split("\n"):
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
        return 0

    def _ready(self, _events: int) -> None:
        for number, mask in self._inotify.events():
            if mask & IN_IGNORED:
                self._counters.pop(number, None)
                continue
            counter = self._counters.get(number)
            if counter is not None:
                self._read_counter(counter)

    def _read_counter(self, counter: _Counter) -> None:
        try:
            count = self._count(counter.place, counter.file, counter.key)
        except (OSError, ValueError):  # it went away meanwhile
            return
        now = time.monotonic()
        before, counter.count = counter.count, count
        if count > before and now >= counter.quiet_until:
            counter.quiet_until = now + _QUIET_S
            try:
                self._alarm(counter.place, counter.reason)
            except (PersonaError, OSError) as error:
                log.error("what %s met is not told: %s", counter.place.cgroup, error)
