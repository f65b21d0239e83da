"""The spool's files: whose they are, cut and changed at every byte, and on disks that are full or fail."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from persona_guest.audit import spool_format

from persona import wire
from persona.record_codec import encode_record, record_for
from tests.guest.conftest import SmallDisk
from tests.guest.spool_place import Place, numbers, record, take, whole

# --- whose they are ---


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


def test_what_is_cut_off_once_is_no_damage_to_the_agents_after(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.begin().add([record(1), record(2)])
    torn = place.segment()
    torn.write_bytes(torn.read_bytes()[:-5])
    for at in (3, 4, 5):
        place.begin().add([record(at)])
    assert len([text for text in caplog.messages if "they are cut off" in text]) == 1
    assert "cannot be read" not in caplog.text
    spool = place.begin()
    assert [one["at"] for one in take(spool) if "lost" not in one] == [1, 3, 4, 5]
    assert spool.status().aside == []


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
