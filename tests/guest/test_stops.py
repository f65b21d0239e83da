"""What the kernel stops outside of every session is recorded under a name, and no flood of it asks for that name."""

import pwd
from typing import Any
from unittest.mock import Mock

import pytest
from persona_guest.accounts import Names
from persona_guest.kernel.layer_abi import Event
from persona_guest.records import Stops

from persona.problems import Reason


def stop(uid: int) -> Event:
    return Event(Reason.OTHER_ARGUMENTS, True, 7, 7, uid, None, None, 1, 2, "x", "/bin/x")


@pytest.mark.parametrize("known", [True, False])
def test_a_user_s_name_is_looked_up_once_for_all_his_stops(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    asked: list[int] = []

    def getpwuid(uid: int) -> Any:
        asked.append(uid)
        if not known:
            raise KeyError(uid)
        return Mock(pw_name=f"user{uid}")

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    supervisor = Mock(sessions={}, find=Mock(return_value=None))
    records: list[Any] = []
    stops = Stops(records.append, supervisor)
    for uid in (5, 6, 5, 5, 6):
        stops(stop(uid))
    assert asked == []  # not in the loop's thread
    named = ["user5", "user6"] if known else ["5", "6"]
    assert [record().user for record in records] == [named[uid - 5] for uid in (5, 6, 5, 5, 6)]
    assert asked == [5, 6]


def test_a_name_holds_for_a_minute_from_when_it_was_found() -> None:
    now = [1000.0]
    asked: list[int] = []

    def slow(uid: int) -> str:
        asked.append(uid)
        now[0] += 90  # a database that is away
        return str(uid)

    names = Names(slow, lambda: now[0])
    assert names.of(5) == "5"
    now[0] += 59
    assert names.of(5) == "5"
    assert asked == [5]
    now[0] += 2
    names.of(5)
    assert asked == [5, 5]


def test_so_many_names_are_kept_and_the_oldest_go_first() -> None:
    asked: list[int] = []

    def look_up(uid: int) -> str:
        asked.append(uid)
        return str(uid)

    names = Names(look_up, lambda: 0.0)
    for uid in range(2000):
        names.of(uid)
    asked.clear()
    for uid in (1999, 1000, 0):
        names.of(uid)
    assert asked == [0]
