"""Time windows."""

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from persona.conditions import parse_hours
from persona.parsing import Bad

BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("window", "moment", "inside"),
    [
        ("Mon-Fri 07:00-20:00 Europe/Berlin", datetime(2026, 11, 24, 7, 0, tzinfo=BERLIN), True),
        ("Mon-Fri 07:00-20:00 Europe/Berlin", datetime(2026, 11, 24, 20, 0, tzinfo=BERLIN), False),
        ("Mon-Fri 07:00-20:00 Europe/Berlin", datetime(2026, 11, 22, 12, 0, tzinfo=BERLIN), False),
        ("Mon-Fri 07:00-20:00 Europe/Berlin", datetime(2026, 11, 24, 6, 30, tzinfo=ZoneInfo("UTC")), True),
        ("Fri 22:00-06:00 Europe/Berlin", datetime(2026, 11, 28, 5, 59, tzinfo=BERLIN), True),
        ("Fri 22:00-06:00 Europe/Berlin", datetime(2026, 11, 28, 6, 0, tzinfo=BERLIN), False),
        ("Fri 22:00-06:00 Europe/Berlin", datetime(2026, 11, 27, 5, 0, tzinfo=BERLIN), False),
        ("Sat-Mon 00:00-24:00 Europe/Berlin", datetime(2026, 11, 29, 23, 59, tzinfo=BERLIN), True),
        ("Mon,Wed 08:00-09:00", datetime(2026, 11, 25, 8, 30, tzinfo=ZoneInfo("UTC")), True),
        # the night in which the clock goes back has 02:30 twice: both are inside
        ("02:00-03:00 Europe/Berlin", datetime(2026, 10, 25, 0, 30, tzinfo=ZoneInfo("UTC")), True),
        ("02:00-03:00 Europe/Berlin", datetime(2026, 10, 25, 1, 30, tzinfo=ZoneInfo("UTC")), True),
    ],
)
def test_contains(window: str, moment: datetime, inside: bool) -> None:
    assert parse_hours(window).contains(moment) is inside


@pytest.mark.parametrize("text", ["", "always", "25:00-26:00", "07:60-08:00", "07:00-07:00", "Mon 7:00-8:00", 7])
def test_refused(text: object) -> None:
    with pytest.raises(Bad):
        parse_hours(text)
