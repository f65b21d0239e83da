"""What a file of the spool says of the one before it: an agent that begins need not decode them all."""

import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from persona_guest.audit import spool_format
from persona_guest.audit.entries import Entry, read_entry
from persona_guest.audit.segments import Segment
from persona_guest.audit.spool import MIB, Spool

from tests.guest.spool_place import Place, numbers, record, take, whole
from tests.some import some


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of each record that an agent decodes when it begins or sends."""
    seen: list[int] = []

    def counting(payload: bytes) -> Entry:
        entry = read_entry(payload)
        seen.append(entry.number)
        return entry

    monkeypatch.setattr("persona_guest.audit.spool.read_entry", counting)
    return seen


def held_by(spool: Spool) -> dict[tuple[str, bool], int]:
    return dict(spool._room._of)


def files_of(spool: Spool) -> list[Segment]:
    return spool._segments.all if spool._segments is not None else []


def fill(spool: Spool, files: int) -> None:
    """Adds records of several users until there are that many files."""
    at = 0
    while len(files_of(spool)) < files:
        spool.add([record(at + n, f"u{(at + n) % 9}", granted=n % 2 == 0, text="x" * 2000) for n in range(8)])
        at += 8
        assert not spool.status().lost


def first_numbers(place: Place) -> list[int]:
    """The number of the first record in each file."""
    found = []
    for path in sorted(place.directory.glob("*.records")):
        (payload,) = spool_format.read(path.read_bytes(), limit=1).payloads
        found.append(spool_format.decode_header(payload).first)
    return found


def test_an_agent_that_begins_decodes_the_newest_file_and_no_other(place: Place, decoded: list[int]) -> None:
    spool = place.begin(bound=MIB)
    fill(spool, 8)
    last = spool._counter.now.given
    after = place.begin(bound=MIB)  # the one before it was killed
    assert decoded == list(range(first_numbers(place)[-1], last + 1))
    assert (after.status().waiting, held_by(after)) == (spool.status().waiting, held_by(spool))
    assert numbers(take(after)) == list(range(1, last + 1))


def test_of_files_that_were_sent_in_part_it_decodes_the_one_in_whose_middle_that_is(
    place: Place, decoded: list[int]
) -> None:
    spool = place.begin(bound=MIB)
    fill(spool, 8)
    last, firsts = spool._counter.now.given, first_numbers(place)
    while spool._counter.now.settled <= firsts[3]:
        batch = spool.batch(5, MIB)
        assert batch is not None
        spool.sent(batch)
    sent = spool._counter.now.settled
    assert firsts[3] <= sent < firsts[4] - 1
    decoded.clear()
    after = place.begin(bound=MIB)
    assert decoded == [*range(firsts[3], firsts[4]), *range(firsts[-1], last + 1)]
    assert (after.status().waiting, held_by(after)) == (spool.status().waiting, held_by(spool))
    assert numbers(take(after)) == list(range(sent + 1, last + 1))


def test_a_file_that_was_sent_and_is_still_there_is_not_sent_again(place: Place, decoded: list[int]) -> None:
    """An agent was killed after the broker had the file, and before it was removed."""
    spool = place.begin(bound=MIB)
    fill(spool, 4)
    first = min(place.directory.glob("*.records"))
    shutil.copy(first, place.directory.parent / "kept")
    while first.exists():
        batch = spool.batch(100, MIB)
        assert batch is not None
        spool.sent(batch)
    sent, last = spool._counter.now.settled, spool._counter.now.given
    shutil.copy(place.directory.parent / "kept", first)
    decoded.clear()
    after = place.begin(bound=MIB)
    assert 1 not in decoded
    assert (after.status().waiting, held_by(after)) == (spool.status().waiting, held_by(spool))
    assert numbers(take(after)) == list(range(sent + 1, last + 1))


def test_files_that_other_versions_wrote_and_that_say_nothing_are_decoded(
    place: Place, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr("persona_guest.audit.segments.Segment.summary", lambda _segment: None)
        spool = place.begin(bound=MIB)
        fill(spool, 4)
    last = spool._counter.now.given
    after = place.begin(bound=MIB)
    assert decoded == list(range(1, last + 1))
    assert (after.status().waiting, held_by(after)) == (spool.status().waiting, held_by(spool))


@pytest.mark.parametrize("lives", [10, pytest.param(200, marks=pytest.mark.soak)])
def test_what_files_say_of_each_other_is_what_is_in_them(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: int
) -> None:
    """Agents that write, send, lose, end or are killed; each spool is opened with what its files say, and without."""
    chance = random.Random(7)  # noqa: S311 - the same lives each time
    boot, summed = 0, 0
    for life in range(lives):
        boot += chance.random() < 0.2
        spool = place.begin(bound=MIB, boot=f"{boot:032x}")
        for _ in range(chance.randrange(60)):
            place.clock += chance.choice([0.1, 11])
            users = [f"u{chance.randrange(4)}" for _ in range(chance.randrange(20))]
            text = "x" * chance.choice([1, 2000])
            spool.add([record(life, user, granted=chance.random() < 0.5, text=text) for user in users])
            for _ in range(chance.randrange(2)):
                batch = spool.batch(chance.randrange(1, 15), 20_000)
                if batch is not None:
                    spool.sent(batch)
        if chance.random() < 0.3:
            spool.close()
        found: list[object] = []
        for name in ("with", "without"):
            shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-{life}-{name}")
            other = Place(tmp_path.parent / f"{tmp_path.name}-{life}-{name}")
            with monkeypatch.context() as context:
                if name == "without":
                    context.setattr("persona_guest.audit.segments._is_of", lambda *_: False)
                again = other.begin(bound=MIB, boot=f"{boot:032x}")
            taken_up = files_of(again)
            summed += sum(one.digest is None for one in taken_up)
            same = [
                replace(one, path=Path(one.path.name), digest=None, ever=Counter(), bytes_of=Counter(one.bytes_of))
                for one in taken_up
            ]
            state = held_by(again), again.status(), set(again._explained), again._counter.now, same
            sent = [{**one, "at": 0 if "lost" in one else one["at"]} for one in take(again)]
            found.append((state, sent, other.files()))
            other.close()
        assert found[0] == found[1], life
    assert summed > lives, "there was nothing to compare"


@pytest.mark.parametrize("step", [1009, pytest.param(61, marks=pytest.mark.soak)])
def test_files_of_which_any_byte_is_changed_cost_nothing_of_the_others(place: Place, tmp_path: Path, step: int) -> None:
    spool = place.begin(bound=MIB)
    fill(spool, 3)
    spool.close()
    waiting = spool.status().waiting
    firsts, last = first_numbers(place), spool._counter.now.given
    shutil.copytree(place.directory, tmp_path / "kept")
    count = place.counter.read_bytes()
    for index, name in enumerate(some(sorted(path.name for path in place.directory.glob("*.records")))):
        data = (tmp_path / "kept" / name).read_bytes()
        for at in [*range(0, 600, 37), *range(0, len(data), step)]:
            shutil.rmtree(place.directory)
            shutil.copytree(tmp_path / "kept", place.directory)
            spoilt = bytearray(data)
            spoilt[at] ^= 0x55
            (place.directory / name).write_bytes(spoilt)
            place.counter.write_bytes(count)
            after = place.begin(bound=MIB)
            assert after.status().waiting < waiting, "it is found when the agent begins, not when it sends"
            found = take(after)
            assert whole(found) == set(range(1, max(numbers(found)) + 1)), (name, at)
            there = [one for one in found if "lost" not in one]
            assert all(one["at"] == one["number"] - 1 for one in there), (name, at)
            end = [*firsts, last + 1][index + 1]
            others = {*range(1, firsts[index]), *range(end, last + 1)}
            assert others <= set(numbers(there)) and len(there) < last, (name, at)
            assert after.status().waiting == 0
            place.close()
