"""What the kernel stops outside of every session is recorded under a name, and no flood of it asks for that name."""

import os
import pwd
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from persona_guest.core.denials import Book
from persona_guest.gate.kernel_stops import Stops
from persona_guest.kernel.fd_inode import kernel_device
from persona_guest.lsm.abi import Event
from persona_guest.program.identity import Identifier, image_of
from persona_guest.session.model import Session
from persona_guest.settings import Gate
from persona_guest.system.accounts import Names

from persona.decisions import Subject
from persona.problems import Reason


def stop(uid: int) -> Event:
    return Event(Reason.OTHER_ARGUMENTS, True, 7, 7, uid, None, None, 1, 2, "x", "/bin/x")


def registry(*logins: Mock, found: Mock | None = None) -> Mock:
    """A fake one, whose search by descent finds ``found``."""
    return Mock(gated=Mock(return_value=list(logins)), find=Mock(return_value=found))


@pytest.mark.parametrize("known", [True, False])
def test_a_user_s_name_is_looked_up_once_for_all_his_stops(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    asked: list[int] = []

    def getpwuid(uid: int) -> Any:
        asked.append(uid)
        if not known:
            raise KeyError(uid)
        return Mock(pw_name=f"user{uid}")

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    records: list[Any] = []
    stops = Stops(records.append, registry(), Book(), Identifier(Gate()).where)
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


@pytest.mark.parametrize("known", [True, False])
def test_a_stop_names_the_file_and_not_what_its_caller_called_it(known: bool, tmp_path: Path) -> None:
    file = Path("/usr/bin/strace") if known else tmp_path / "own"
    if not known:
        file.touch()
    image = image_of(str(file))
    assert image is not None
    records: list[Any] = []
    stops = Stops(records.append, registry(), Book(), Identifier(Gate()).where)
    stops(stop(5)._replace(device=kernel_device(image.device), inode=image.inode, path="/usr/bin/ls"))
    record = records[0]()
    assert record.argv == ("/usr/bin/ls",)
    device = f"device {os.major(image.device)}:{os.minor(image.device)}, inode {image.inode}"
    assert record.program == ("/usr/bin/strace" if known else device)


def test_of_several_sessions_in_one_login_of_roots_descent_tells_which_it_was() -> None:
    alice, bob = (
        Mock(session=Session(name, Subject(name, (), "vm"), uid, "su", "", "/bin/bash", 1, 4, 0))
        for name, uid in (("alice", 1000), ("bob", 1001))
    )
    for found in (bob, None):
        records: list[Any] = []
        denials = Book()
        Stops(records.append, registry(alice, bob, found=found), denials, lambda _image: "/x")(
            stop(5)._replace(audit_session=4)
        )
        assert [getattr(record, "user", None) for record in records] == ["bob" if found else None]
        assert denials.of(1000) == ()


@pytest.mark.parametrize(
    ("enforced", "login", "in_session", "of"),
    [(True, 7, True, 1000), (False, 7, True, None), (True, 7, False, 7), (True, None, False, None)],
)
def test_a_user_s_own_denials_have_what_the_kernel_stopped(
    enforced: bool, login: int | None, in_session: bool, of: int | None
) -> None:
    """Of who runs outside of any session, by the login uid: a process can choose its uid by setuid programs."""
    session = Session("s-1", Subject("alice", (), "vm"), 1000, "sshd", "", "/bin/bash", 1, 4, 0)
    denials = Book()
    found_by_descent = registry(found=Mock(session=session) if in_session else None)
    stops = Stops(Mock(), found_by_descent, denials, lambda _image: "/usr/bin/strace")
    stops(stop(5)._replace(enforced=enforced, login=login))
    found = {uid: denials.of(uid) for uid in (1000, 7, 5) if denials.of(uid)}
    assert list(found) == ([of] if of is not None else [])
    for denial in sum(found.values(), ()):
        assert (denial.event, denial.program, denial.command) == ("killed", "/usr/bin/strace", "/bin/x")
        assert "changed by another thread" in denial.help
