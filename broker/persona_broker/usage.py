"""What words of the command line mean.  Each raises ``ArgumentTypeError``, which is usage: exit 2."""

import re
from argparse import ArgumentTypeError
from datetime import UTC, datetime

from persona.conditions import METRICS


def figure(text: str) -> tuple[str, float]:
    """``cpu=80``: a metric and its percent."""
    metric, _, number = text.partition("=")
    try:
        percent = float(number)
    except ValueError:
        percent = -1
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
    return found


def count(text: str) -> int:
    """How many."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ArgumentTypeError(f"{text!r}: expected a count of up to 9 digits")
    return int(text)
