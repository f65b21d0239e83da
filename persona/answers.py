"""How all commands answer: one line of JSON for programs, times for programs and for people (docs/cli.md)."""

import json
from collections.abc import Mapping, Sequence


def as_json(value: Mapping[str, object] | Sequence[object]) -> str:
    """The one line that a command answers a program: an object with ``ok``; a list is its ``items``."""
    return json.dumps({"ok": True, **(value if isinstance(value, Mapping) else {"items": value})})


def refusal(code: str, message: str) -> str:
    """The same where there is no answer: why, as a code and in words."""
    return json.dumps({"ok": False, "code": str(code), "message": message})


def iso(at: float) -> str | None:
    """A moment (Unix seconds) for programs: ISO 8601, UTC, to the millisecond; ``None`` where no calendar has it."""
    from datetime import UTC, datetime  # few commands show times

    try:
        return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):  # a guest may say anything
        return None


def local(at: float) -> str:
    """A moment for people: ISO 8601 in this machine's zone, with the offset."""
    from datetime import UTC, datetime

    try:
        return datetime.fromtimestamp(at, UTC).astimezone().isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return "a time beyond the calendar"
