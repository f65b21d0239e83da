"""The spool: real files, cut at every byte, on disks that are full or read-only, and writers that are killed."""

import errno
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from persona_guest.audit import spool_format
from persona_guest.audit.entries import entry_of
from persona_guest.audit.spool import MIB, Spool
from persona_guest.audit.spool_format import Header

from persona import wire
from persona.codec import Record, Stream, decode_record, encode_record, record_for
from tests.broker.conftest import environment
from tests.guest.conftest import SmallDisk

BOOT = "b" * 32


def record(at: float, user: str = "u", *, granted: bool = False, text: str = "") -> Record:
    decision = "granted" if granted else "denied"
    return Record(at, "s", user, "/bin/x", (text,), decision, None, None, None, None, "exec", False, False)


class Place:
    """Where the spool of one machine is; ``begin`` is what a new agent does."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.counter = directory / "spool", directory / "run" / "numbers"
        self.machine_id = directory / "machine-id"
        self.machine_id.write_text("0" * 31 + "1\n")
        self.clock = 0.0
        self._open: list[Spool] = []

    def begin(self, bound: int = 4 * MIB, boot: str = BOOT) -> Spool:
        spool = Spool(
            self.directory, self.counter, bound, machine_id=self.machine_id, boot=boot, clock=lambda: self.clock
        )
        spool.open()
        self._open.append(spool)
        return spool

    def files(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())

    def segment(self) -> Path:
        """The only file with records, or the newest."""
        return sorted(self.directory.glob("*.records"))[-1]

    def close(self) -> None:
        for spool in self._open:
            spool.close()


@pytest.fixture
def place(tmp_path: Path) -> Any:
    place = Place(tmp_path)
    yield place
    place.close()


def take(spool: Spool, *, send: bool = True) -> list[dict[str, Any]]:
    """All that waits, as the broker gets it, in order."""
    found: list[dict[str, Any]] = []
    while (batch := spool.batch(7, 100_000)) is not None:
        found += [{**entry.value, "stream": batch.stream} for entry in batch.entries]
        if not send:
            spool.put_back()
            break
        spool.sent(batch)
    return found


def numbers(found: list[dict[str, Any]]) -> list[int]:
    return [one["number"] for one in found]


def whole(found: list[dict[str, Any]]) -> set[int]:
    """The numbers that are there or that a marker explains; each number once, and markers of nothing that is there."""
    there = numbers(found)
    assert len(set(there)) == len(there)
    explained = [n for one in found if "lost" in one for n in range(one["lost"]["first"], one["lost"]["last"] + 1)]
    assert len(set(explained)) == len(explained)
    assert not set(explained) & set(there)
    return {*there, *explained}


# --- the format ---


def test_a_frame_that_is_not_whole_is_none() -> None:
    payloads = [b"x" * size for size in (1, 2, 300)]
    data = b"".join(map(spool_format.frame, payloads))
    assert spool_format.read(data) == spool_format.Frames(tuple(payloads), len(data))
    for cut in range(len(data)):
        found = spool_format.read(data[:cut])
        assert list(found.payloads) == payloads[: len(found.payloads)]
        assert found.end <= cut
        assert spool_format.is_torn(data[:cut], found.end)
    for at in range(len(data)):
        spoilt = bytearray(data)
        spoilt[at] ^= 1
        found = spool_format.read(bytes(spoilt))
        assert len(found.payloads) < 3 and set(found.payloads) < set(payloads)
    assert spool_format.read(bytes(4096)) == spool_format.Frames((), 0), "what a disk gives for a block it never wrote"


def test_a_header_is_read_again_and_none_of_another_format() -> None:
    header = Header(Stream("0" * 32, "1" * 32), 7)
    (payload,) = spool_format.read(spool_format.encode_header(header)).payloads
    assert spool_format.decode_header(payload) == header
    for wrong in (b"", b"{}", b"[1]", payload.replace(b'"format":1', b'"format":2'), payload.replace(b"7", b"-7")):
        with pytest.raises(spool_format.FormatError):
            spool_format.decode_header(wrong)


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


def test_a_spool_of_another_machine_is_set_aside(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    before = place.begin()
    before.add([record(1)])
    names = place.files()
    place.machine_id.write_text("0" * 31 + "2\n")  # a clone
    after = place.begin()
    after.add([record(2)])
    assert [one["at"] for one in take(after)] == [2]
    assert after.stream.machine != before.stream.machine
    (aside,) = after.status().aside
    assert sorted(path.name for path in (place.directory.parent / aside).iterdir()) == names
    assert "it is another machine's (/etc/machine-id differs)" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machine": "x", "of": "y"}', "\udcff"])
def test_a_spool_that_does_not_say_whose_it_is_is_set_aside(place: Place, text: str) -> None:
    place.begin().add([record(1)])
    (place.directory / "machine").write_text(text, errors="surrogateescape")
    kept = place.segment().read_bytes()
    after = place.begin()
    (aside,) = after.status().aside
    (moved,) = (place.directory.parent / aside).glob("*.records")
    assert moved.read_bytes() == kept
    assert take(after) == [] or [one["event"] for one in take(after)] == ["lost"]


def test_what_is_in_the_way_of_the_spool_is_set_aside(place: Place) -> None:
    place.directory.write_text("a file")
    spool = place.begin()
    assert (place.directory.parent / spool.status().aside[0]).read_text() == "a file"
    spool.add([record(1)])
    assert numbers(take(spool)) == [1]
    assert place.directory.stat().st_mode & 0o777 == 0o700
    assert place.segment().stat().st_mode & 0o777 == 0o600


# --- damage ---


def written(place: Place, count: int = 4) -> bytes:
    spool = place.begin()
    for number in range(count):
        spool.add([record(number + 1, text="\x00é\udcff")])
    spool.close()
    return place.segment().read_bytes()


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.soak)])
def test_a_spool_that_is_cut_at_any_byte_loses_only_what_was_cut_off(
    place: Place, tmp_path: Path, small_disk: SmallDisk, step: int
) -> None:
    place.directory = small_disk.path / "spool"  # which is fast, too
    data = written(place)
    shutil.copytree(place.directory, tmp_path / "kept")
    count = place.counter.read_bytes()
    for cut in range(0, len(data), step):
        shutil.rmtree(place.directory)
        shutil.copytree(tmp_path / "kept", place.directory)
        place.segment().write_bytes(data[:cut])
        place.counter.write_bytes(count)
        spool = place.begin()
        spool.add([record(99)])
        found = take(spool)
        assert whole(found) == set(range(1, max(numbers(found)) + 1)), cut
        kept = [one["at"] for one in found if "lost" not in one]
        assert kept[-1] == 99 and kept[:-1] == list(range(1, len(kept))), cut
        assert len(kept) - 1 == sum(cut >= end for end in ends(data)), cut
        place.close()


def ends(data: bytes) -> list[int]:
    """Where each frame of a segment ends, but for its header's."""
    return [spool_format.read(data, limit=count).end for count in range(2, 6)]


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.soak)])
def test_a_spool_with_any_byte_changed_gives_nothing_that_was_not_written(
    place: Place, tmp_path: Path, small_disk: SmallDisk, step: int
) -> None:
    place.directory = small_disk.path / "spool"
    data = written(place)
    shutil.copytree(place.directory, tmp_path / "kept")
    count = place.counter.read_bytes()
    for at in range(0, len(data), step):
        shutil.rmtree(place.directory)
        shutil.copytree(tmp_path / "kept", place.directory)
        spoilt = bytearray(data)
        spoilt[at] ^= 0x55
        place.segment().write_bytes(spoilt)
        place.counter.write_bytes(count)
        spool = place.begin()
        spool.add([record(99)])
        found = take(spool)
        assert whole(found) == set(range(1, max(numbers(found)) + 1)), at
        kept = [one["at"] for one in found if "lost" not in one]
        assert kept[-1] == 99 and kept[:-1] == list(range(1, len(kept))) and len(kept) <= 4, at
        place.close()
        left = [path for path in place.directory.parent.rglob("*") if path.is_file()]
        if at < ends(data)[2]:  # in the middle: whole records follow, and are kept for the operator
            assert any(path.read_bytes() == bytes(spoilt) for path in left), at


def test_a_file_that_cannot_be_read_any_more_while_the_agent_runs_is_told_as_lost(place: Place) -> None:
    spool = place.begin()
    spool.add([record(1), record(2)])
    place.segment().write_bytes(bytes(2000))
    spool.add([record(3)])
    found = take(spool)
    assert whole(found) == {1, 2, 3, 4}
    assert [one["lost"]["why"] for one in found if "lost" in one] == ["damaged"]
    assert spool.status().lost == {"damaged": 3}
    assert spool.status().waiting == 0


@pytest.mark.parametrize(
    "spoil",
    [
        {"number": "1"}, {"user": None}, {"reason": "No Code"}, {"event": []}, {"lost": 1}, {"lost": {"first": 1}},
        {"lost": {"first": 2, "last": 1}}, {"at": None, "session": 7},
    ],
)  # fmt: skip
@pytest.mark.parametrize("left_out", [(), ("argv",), ("number",)])
def test_a_frame_that_holds_no_record_ends_no_agent(
    place: Place, spoil: dict[str, Any], left_out: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Root's own doing: the digest is right."""
    spool = place.begin()
    spool.add([record(1)])
    spool.close()
    value = {**encode_record(replace(record(2), number=2)), **spoil}
    payload = json.dumps({name: item for name, item in value.items() if name not in left_out}).encode()
    with place.segment().open("ab") as file:
        file.write(spool_format.frame(payload))
        file.write(spool_format.frame(b"[" * 5000))
    after = place.begin()
    after.add([record(3)])
    found = take(after)
    for one in found:
        one.pop("stream")
        record_for(one, wire.FIRST)
    there = [one["at"] for one in found if "lost" not in one]
    assert (there[0], there[-1]) == (1, 3)
    assert "it is kept when the others were sent" in caplog.text


# --- disks ---


class Disk:
    """A fake of ``pwrite`` and ``open`` for writing: fails at the writes that are named, after a part of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: set[int], number: int) -> None:
        self.writes = 0
        self._fails, self._number = fails, number
        self._pwrite = os.pwrite
        monkeypatch.setattr("persona_guest.audit.segments.os.pwrite", self.pwrite)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        self.writes += 1
        if self.writes in self._fails:
            self._pwrite(fd, bytes(data)[: len(data) // 2], offset)
            raise OSError(self._number, os.strerror(self._number))
        return self._pwrite(fd, data, offset)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("lasting", [1, 3, 1000])
def test_a_disk_that_fails_at_any_write_loses_and_doubles_nothing(
    tmp_path: Path, number: int, lasting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(1, 16):
        base = tmp_path / str(at)
        base.mkdir()
        place = Place(base)
        with monkeypatch.context() as context:
            Disk(context, set(range(at, at + lasting)), number)
            spool = place.begin()
            got: list[dict[str, Any]] = []
            for turn in range(10):
                spool.add([record(2 * turn), record(2 * turn + 1)])
                if turn in (3, 7):
                    batch = spool.batch(3, 10_000)
                    assert batch is not None
                    got += [{**entry.value} for entry in batch.entries]
                    spool.sent(batch)
        # killed; the disk is as it should be again
        after = place.begin()
        after.add([record(20)])
        got += take(after)
        there = [one for one in got if "lost" not in one]
        assert [one["at"] for one in there] == sorted(one["at"] for one in there), at
        assert there[-1]["at"] == 20
        assert whole(got) == set(range(1, max(numbers(got)) + 1)), at
        if lasting == 1:
            assert len(there) == 21, "memory has what the disk did not take, and gives it to the disk at the next turn"
        place.close()


def test_a_full_disk_costs_nothing_and_is_told(
    place: Place, small_disk: SmallDisk, caplog: pytest.LogCaptureFixture
) -> None:
    place.directory = small_disk.path / "spool"
    spool = place.begin()
    small_disk.fill()
    for turn in range(100):
        spool.add([record(turn, text="x" * 1000)])
    assert "No space left" in spool.status().not_on_disk
    assert "records cannot be written to the spool" in caplog.text
    assert len([line for line in caplog.messages if "cannot be written" in line]) < 5, "once, not at each try"
    batch = spool.batch(20, 10_000)
    assert batch is not None
    spool.sent(batch)
    small_disk.empty()
    for turn in range(100, 110):
        spool.add([record(turn)])
    found = [*(entry.value for entry in batch.entries), *take(spool)]
    assert [one["at"] for one in found] == list(range(110))
    assert numbers(found) == list(range(1, 111))


def test_without_a_directory_records_wait_in_memory_and_numbers_go_on_all_the_same(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.directory = Path("/proc/spool")  # where nobody can make one
    spool = place.begin()
    spool.add([record(1), record(2)])
    assert "/proc/spool" in caplog.text
    batch = spool.batch(1, 1000)
    assert batch is not None
    spool.sent(batch)
    after = place.begin()
    assert after.stream == spool.stream
    after.add([record(3)])
    found = take(after)
    assert [(one["number"], one.get("lost")) for one in found] == [
        (3, {"first": 2, "last": 2, "why": "agent_ended"}),
        (4, None),
    ]


def test_a_disk_that_cannot_sync_is_told_and_gets_a_new_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = place.begin()
    spool.add([record(1)])

    def fails(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as context:
        context.setattr("persona_guest.audit.segments.os.fdatasync", fails)
        spool.sync()
    assert "Input/output error" in spool.status().not_on_disk
    spool.add([record(2)])
    spool.sync()
    assert spool.status().not_on_disk == ""
    assert numbers(take(spool)) == [1, 2]


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
from persona.codec import Record
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
    batch = spool.batch(at % 7 + 1, 4000) if at % 3 == 0 else None
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
