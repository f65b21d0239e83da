"""When a policy holds: host load below a threshold, a healthy VM, within hours.  Values; the state is the broker's."""

import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from persona.guesses import hours_meant
from persona.health import VmHealth, read_vm_health
from persona.parsing import Bad, Reader, number, shown

METRICS = ("cpu", "memory", "network", "disk", "pressure")  # percent of the host
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_HOURS = re.compile(
    r"(?:(?P<days>[A-Za-z,-]+) )?(?P<from>\d\d:\d\d)-(?P<to>\d\d:\d\d)(?: (?P<zone>[A-Za-z0-9_+/-]+))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Threshold:
    """Load in percent: holds below ``below``; once reached, only again below ``again_below``."""

    metric: str
    below: float
    again_below: float


@dataclass(frozen=True, slots=True)
class Hours:
    """A weekly window, ``Mon-Fri 07:00-20:00 Europe/Berlin``; one that ends before it begins wraps midnight."""

    text: str
    days: frozenset[int]  # Monday is 0; the day on which the window begins
    begin: int  # minutes of the day
    end: int
    zone: ZoneInfo = field(compare=False)  # read once: tzdata may lose it while we run

    def contains(self, now: datetime) -> bool:
        """Whether an aware time lies in the window, by the wall clock of its zone."""
        local = now.astimezone(self.zone)
        minute = local.hour * 60 + local.minute
        if self.begin < self.end:
            return local.weekday() in self.days and self.begin <= minute < self.end
        if minute >= self.begin:
            return local.weekday() in self.days
        return minute < self.end and (local - timedelta(days=1)).weekday() in self.days


@dataclass(frozen=True, slots=True)
class When:
    """All of these must hold; none = always."""

    host_load: tuple[Threshold, ...] = ()
    hours: Hours | None = None
    vm_health: VmHealth | None = None


def parse_hours(value: object) -> Hours:
    """Raises ``Bad``; a time zone that this machine does not know is refused."""
    match = _HOURS.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise Bad(f"expected hours, not {shown(value)}", hours_meant(value))
    begin, end = (_minutes(match[group]) for group in ("from", "to"))
    if begin == end:
        raise Bad("a window that begins when it ends", "00:00-24:00 is the whole day")
    return Hours(str(value).strip(), _days(match["days"], str(value)), begin, end, _zone(match["zone"] or "UTC"))


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except Exception:  # no such file, or one that is cut: zoneinfo raises what its parser meets, struct.error too
        raise Bad(f"unknown time zone {shown(name)}", "a name of the tz database, like Europe/Berlin") from None


def _minutes(text: str) -> int:
    hour, minute = int(text[:2]), int(text[3:])
    if minute > 59 or hour * 60 + minute > 24 * 60:
        raise Bad(f"{text!r} is not a time of day", "00:00 to 24:00")
    return hour * 60 + minute


def _days(text: str | None, whole: str) -> frozenset[int]:
    if text is None:
        return frozenset(range(7))
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if first not in DAYS or (dash and last not in DAYS):
            raise Bad(f"{shown(part)} is not a day or a range of days of {', '.join(DAYS)}", hours_meant(whole))
        low, high = DAYS.index(first), DAYS.index(last or first)
        found |= {day % 7 for day in range(low, high + 1 if high >= low else high + 8)}
    return frozenset(found)


def read_when(reader: Reader, load_fields: tuple[str, ...], health_fields: tuple[str, ...]) -> When:
    """The ``when`` of a policy; what is wrong is noted in the reader."""
    load = reader.below("host_load", METRICS)
    thresholds = []
    for metric in METRICS:
        if not load.has(metric):
            continue
        entry = load.below(metric, load_fields)
        below = entry.read("below", number(1, 100), 0.0, required=True)
        again = entry.read("again_below", number(1, 100), below)
        if again > below:
            entry.note("again_below", f"{again:g} is above 'below' ({below:g})", "re-entry is at or below it")
        thresholds.append(Threshold(metric, below, again))
    health = read_vm_health(reader.below("vm_health", health_fields))
    return When(tuple(thresholds), reader.read("hours", parse_hours, None), health)
