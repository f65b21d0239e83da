"""What words of the command line mean.  Each raises ``ArgumentTypeError``, which is usage: exit 2."""

import difflib
import re
import time
from argparse import ArgumentTypeError
from datetime import UTC, datetime

from persona.conditions import METRICS
from persona.problems import Reason
from persona.quantities import NUMBER

SINCE = "from then on: ISO 8601 with zone (2026-01-01T12:00:00+01:00), or how long ago (90s, 30m, 2h, 7d)"
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

MESSAGE_MAX = 500


def figure(text: str) -> tuple[str, float]:
    """``cpu=80``: a metric and its percent."""
    metric, _, number = text.partition("=")
    percent = float(number) if re.fullmatch(NUMBER, number, re.ASCII) else -1
    if metric not in METRICS or not 0 <= percent <= 100:
        raise ArgumentTypeError(f"{text!r}: expected {'|'.join(METRICS)}=0..100")
    return metric, percent


def figures(text: str) -> dict[str, float]:
    """``cpu=80,memory=40``."""
    return dict(map(figure, text.split(",")))


def moment(text: str) -> datetime:
    """A time with its zone: without one it would be another time on each machine."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r}: expected ISO 8601 with zone, 2026-01-01T12:00:00+01:00") from None
    if found.tzinfo is None:
        raise ArgumentTypeError(f"{text!r}: has no zone; {found.replace(tzinfo=UTC).isoformat()} is that in UTC")
    if not 1970 <= found.year < 9999:
        raise ArgumentTypeError(f"{text!r}: expected a year from 1970 to 9998")  # zones are a day apart at most
    return found


def since(text: str) -> float:
    """A moment, as Unix seconds: one with its zone, or one so long ago."""
    ago = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if ago is not None:
        return time.time() - int(ago[1]) * _UNITS_S[ago[2]]
    try:
        return moment(text).timestamp()
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{error}; or how long ago: 90s, 30m, 2h, 7d") from None
    except OverflowError:
        raise ArgumentTypeError(f"{text!r}: beyond the calendar; expected a year of four digits") from None


def reason(text: str) -> str:
    """The code of a reason."""
    if text not in list(Reason):
        near = difflib.get_close_matches(text, list(Reason), 1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(sorted(Reason))}"
        raise ArgumentTypeError(f"{text!r}: no reason has this code; {hint}")
    return text


def count(text: str) -> int:
    """How many."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ArgumentTypeError(f"{text!r}: expected a count of up to 9 digits")
    return int(text)


def day(text: str) -> str:
    """A day in UTC, as segments of the audit are called."""
    try:
        if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            raise ValueError
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).strftime("%Y-%m-%d")
    except ValueError:
        raise ArgumentTypeError(f"{text!r}: expected a day, YYYY-MM-DD") from None


def message(text: str) -> str:
    """Why documents change, for the history: one line."""
    if len(text) > MESSAGE_MAX or not text.isprintable():
        raise ArgumentTypeError(f"expected one line of at most {MESSAGE_MAX} characters that print")
    return text
