"""The spool as an agent has it: numbers over agents, boots and kills, what is kept, and what finds no room."""

import logging
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from persona_guest.audit.entries import entry_of
from persona_guest.audit.spool import MIB, Spool

from persona.record_codec import decode_record, encode_record
from tests.broker.conftest import environment
from tests.guest.spool_place import BOOT, Place, numbers, record, take, whole

# --- numbers, over agents, boots and machines ---


def test_records_are_numbered_in_order_and_forgotten_when_they_are_sent(place: Place) -> None:
    spool = place.begin()
    spool.add([record(1), record(2)])
    spool.add([record(3)])
    assert spool.status().waiting > 0
    found = take(spool)
    assert [(one["number"], one["at"]) for one in found] == [(1, 1), (2, 2), (3, 3)]
    assert {one["stream"].boot for one in found} == {BOOT}
    assert take(spool) == []
    assert spool.status().waiting == 0


@pytest.mark.parametrize("how", ["closed", "killed", "killed, and its count is gone"])
def test_a_new_agent_goes_on_where_the_last_one_stopped(place: Place, how: str) -> None:
    spool = place.begin()
    spool.add([record(1), record(2), record(3)])
    first = spool.batch(2, 1000)
    assert first is not None
    spool.sent(first)
    if how == "closed":
        spool.close()
    if "gone" in how:
        place.counter.unlink()
    after = place.begin()
    after.add([record(4)])
    again = [1, 2] if "gone" in how else []  # what is not known to be sent is sent once more, with the same numbers
    assert [(one["number"], one["at"]) for one in take(after)] == [(n, n) for n in [*again, 3, 4]]
    assert after.stream == spool.stream
    last = place.begin()
    last.add([record(5)])
    assert numbers(take(last)) == [5]


def test_numbers_are_not_used_twice_where_everything_was_sent_and_its_count_is_gone(place: Place) -> None:
    spool = place.begin()
    spool.add([record(1), record(2)])
    take(spool)
    place.counter.unlink()
    after = place.begin()
    after.add([record(3)])
    assert max(numbers(take(after))) == 3


def test_another_boot_has_numbers_of_its_own_and_what_is_left_of_the_last_comes_first(place: Place) -> None:
    before = place.begin()
    before.add([record(1), record(2)])
    after = place.begin(boot="c" * 32)
    after.add([record(3)])
    assert [(one["stream"].boot, one["number"]) for one in take(after)] == [(BOOT, 1), (BOOT, 2), ("c" * 32, 1)]
    assert after.stream.machine == before.stream.machine


def test_what_was_sent_before_a_boot_is_not_sent_again_after_it(place: Place) -> None:
    spool = place.begin()
    spool.add([record(1), record(2)])
    take(spool)
    spool.close()
    assert len(place.files()) == 2
    spool = place.begin()  # another agent of the same boot has nothing to say
    spool.close()
    spool = place.begin()
    spool.add([record(3)])
    assert numbers(take(spool)) == [3]
    spool.close()
    place.counter.unlink()
    after = place.begin(boot="c" * 32)
    after.add([record(4)])
    assert [(one["stream"].boot[0], one["number"]) for one in take(after)] == [("c", 1)]
    after.close()
    assert len(place.files()) == 2


# --- bounds ---


def test_what_finds_no_room_is_counted_and_told_with_its_numbers(place: Place) -> None:
    spool = place.begin(bound=MIB)
    for _ in range(50):
        place.clock += 0.5
        spool.add([record(1, "loop", granted=True, text="x" * 1000) for _ in range(40)])
    spool.add([record(2, "other", granted=True), record(3, "loop")])
    place.clock += 10
    spool.add([])
    assert sum(path.stat().st_size for path in place.directory.glob("*.records")) < MIB
    waiting = spool.status()
    found = take(spool)
    markers = [one for one in found if "lost" in one]
    assert 2 <= len(markers) <= 4, "one in ten seconds"
    assert whole(found) == set(range(1, max(numbers(found)) + 1))
    assert {one["lost"]["why"] for one in markers} == {"spool_full"}
    told = sum(one["lost"]["last"] - one["lost"]["first"] + 1 for one in markers)
    assert waiting.lost == {"spool_full": told}
    assert sum(one["user"] == "loop" for one in found) + told == 2001
    assert [one["at"] for one in found if one["user"] == "other"] == [2], "one user's loop costs no other anything"
    assert 3 in [one["at"] for one in found], "nor their own denials"


def test_what_complain_mode_lets_go_on_takes_no_room_from_denials() -> None:
    started = replace(record(1, granted=True)), replace(record(1), complain=True)
    assert {entry_of(one)[0].held for one in started} == {("u", True)}
    others = record(1), replace(record(1), complain=True, event="admission"), replace(record(1), event="limit")
    assert {entry_of(one)[0].held for one in others} == {("u", False)}


def test_what_was_dropped_and_not_told_is_told_by_the_agent_after(place: Place) -> None:
    spool = place.begin(bound=MIB)
    place.clock = 100
    spool.add([], dropped=3)
    spool.add([record(1)], dropped=4)
    after = place.begin()
    place.clock = 200
    after.add([])
    found = take(after)
    assert [one["lost"] for one in found if "lost" in one] == [
        {"first": 1, "last": 3, "why": "queue_full"},
        {"first": 6, "last": 9, "why": "queue_full"},
    ]
    assert whole(found) == set(range(1, 11))


def test_memory_is_bounded_where_there_is_no_disk(place: Place) -> None:
    place.directory = Path("/proc/spool")
    spool = place.begin(bound=64 * MIB)
    for user in range(12):
        spool.add([record(1, f"u{user}", text="x" * 50_000) for _ in range(60)])
    assert spool.status().waiting <= 17 * MIB
    assert spool.is_full("u0")
    assert spool.status().lost["spool_full"] > 0
    take(spool)
    assert not spool.is_full("u0")


# --- killed ---

WRITER = """
import os, sys
from pathlib import Path
from persona.record_codec import Record
from persona_guest.audit.spool import Spool
spool = Spool(Path(sys.argv[1]), Path(sys.argv[2]), 64 << 20, boot="b" * 32)
spool.open()
at = int(sys.argv[3])
while True:
    count = at % 4 + 1
    head, tail = ("s", "u", "/bin/x", ("x" * (at % 400),), "denied"), (None, None, None, None, "exec", False, False)
    spool.add([Record(at + n, *head, *tail) for n in range(count)])
    at += count
    os.write(1, b"%d\\n" % at)  # all before this are kept
    some, size = (at % 7 + 1, 4000) if at % 9 else (500, 1 << 20)  # now and then all, or it would be full
    batch = spool.batch(some, size) if at % 3 == 0 else None
    if batch is not None:
        sent = [entry for entry in batch.entries if "lost" not in entry.value]
        os.write(1, b"sent " + b" ".join(b"%d:%d" % (entry.number, int(entry.value["at"])) for entry in sent) + b"\\n")
        spool.sent(batch)
"""


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.soak)])
def test_an_agent_that_is_killed_at_any_moment_loses_nothing_that_it_kept(tmp_path: Path, kills: int) -> None:
    chance = random.Random(5)  # noqa: S311 - the same moments each time
    directory, counter = tmp_path / "spool", tmp_path / "numbers"
    kept: set[int] = set()
    sent: dict[int, int] = {}  # number: which record
    at = 0
    for _ in range(kills):
        argv = [sys.executable, "-c", WRITER, str(directory), str(counter), str(at)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment()) as writer:
            assert writer.stdout is not None
            first = writer.stdout.readline()
            time.sleep(chance.uniform(0, 0.1))
            writer.kill()
            lines = (first + writer.stdout.read()).decode().splitlines()
        for line in lines:
            if line.startswith("sent "):
                for pair in line.split()[1:]:
                    number, which = map(int, pair.split(":"))
                    assert sent.setdefault(number, which) == which, "one number, two records"
            else:
                kept |= set(range(at, int(line)))
                at = int(line)
        at += 10  # beyond what it was about to write
    spool = Spool(directory, counter, 64 * MIB, boot=BOOT)
    spool.open()
    explained = set()
    try:
        for one in take(spool):
            if "lost" in one:
                explained |= set(range(one["lost"]["first"], one["lost"]["last"] + 1))
            else:
                assert sent.setdefault(one["number"], int(one["at"])) == int(one["at"])
    finally:
        spool.close()
    assert len(kept) > kills
    assert kept <= set(sent.values()), "what was kept was sent, or is there to be sent"
    assert len(set(sent.values())) == len(sent), "under one number"
    assert not explained & set(sent), "what is told as lost is not there"


# --- masks and versions are the business of others; what is kept is what was added ---


def test_what_is_kept_is_read_as_it_was_added(place: Place) -> None:
    spool = place.begin()
    odd = record(1.25, "ü", text="\udcff\x00\u2028")
    spool.add([odd])
    (found,) = take(place.begin())
    found.pop("stream")
    assert encode_record(decode_record(found)) == found
    assert decode_record(found).argv == odd.argv


def test_nothing_is_logged_of_a_spool_that_is_as_it_should_be(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    place.begin().add([record(1)])
    place.begin().add([record(2)])
    take(place.begin())
    assert caplog.messages == []
