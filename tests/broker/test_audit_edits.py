"""Every edit of the chain and of checkpoints is found, and said where; what is whole is called whole."""

import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from persona_broker.audit import checkpoints
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.check import Finding, check, check_quickly
from persona_broker.audit.core.checkpoint import Checkpoint
from persona_broker.audit.core.format import Stream, split
from persona_broker.audit.core.streams import Gap
from persona_broker.audit.delivery import Delivery
from persona_broker.audit.keys import SigningKey
from persona_broker.audit.segment import Segment
from persona_broker.audit.verify import _BARE, _LINKS, verify

from tests.broker.test_audit_chain import BEGAN, DAY_S, STREAM, Clock, said

Edit = Callable[[Path, random.Random], None]
Found = list[tuple[str, str | None]]


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return SigningKey(Ed25519PrivateKey.generate())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, key: SigningKey) -> tuple[Path, list[Checkpoint]]:
    """Three days with records of two guests, and checkpoints."""
    directory = tmp_path_factory.mktemp("whole") / "audit"
    clock, found = Clock(), []
    with closing(Chain(directory, clock)) as chain:
        for day in range(3):
            clock.now = BEGAN + day * DAY_S
            for batch in range(3):
                first = 30 * day + 10 * batch
                entries = [split(said(f"user{n % 3}", at=float(n)), n + 1) for n in range(first, first + 10)]
                chain.deliver([Delivery("vm-1", entries, STREAM), Delivery("vm-2", [split(said("bob"))])])
            made = checkpoints.make(chain, key, clock)
            assert made is not None
            found.append(made)
    for path in files(directory):
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return directory, found


@pytest.fixture
def copied(whole: tuple[Path, list[Checkpoint]], tmp_path: Path) -> Iterator[Callable[[], Path]]:
    def copy() -> Path:
        shutil.rmtree(tmp_path / "audit", ignore_errors=True)
        shutil.copytree(whole[0], tmp_path / "audit")
        return tmp_path / "audit"

    yield copy


def findings(directory: Path, held: list[Checkpoint], key: SigningKey) -> list[Finding]:
    right, wrong = checkpoints.sorted_out(held, [key.public], "a file")
    with closing(Chain(directory)) as chain:
        return [*verify(chain, right).findings, *wrong]


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.suffix == ".db")


def numbers(path: Path) -> list[int]:
    with closing(sqlite3.connect(path)) as db:
        return [number for (number,) in db.execute("SELECT number FROM records ORDER BY number")]


def sql(path: Path, *statements: tuple[str, tuple[object, ...]]) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement, values in statements:
            db.execute(statement, values)


# --- what somebody with the file, but not with the key, might do -------------------------------------


def change(directory: Path, rng: random.Random) -> None:
    path = rng.choice(files(directory))
    column, value = rng.choice(
        [
            ("at_us", "at_us + 1"),
            ("guest", "CASE WHEN guest = 'vm-1' THEN 'vm-2' ELSE 'vm-1' END"),
            ("counter", "ifnull(counter, 0) + 1000"),
            ("stream", "CASE WHEN stream IS NULL THEN 1 END"),
            ("facts", "replace(facts, 'e', 'f')"),
            ("person", "replace(person, '}', ' }')"),
            ("person", "NULL"),
            ("salt", "randomblob(16)"),
            ("salt", "NULL"),
            ("person", "CAST(person AS BLOB)"),
            ("facts", "CAST(facts AS BLOB)"),
            ("guest", "CAST(guest AS BLOB)"),
            ("salt", "CAST(salt AS TEXT)"),
            ("hash", "CAST(hash AS TEXT)"),
            ("salt = salt || person, person", "''"),
            ("digest", "randomblob(32)"),
            ("hash", "randomblob(32)"),
        ]
    )
    sql(path, (f"UPDATE records SET {column} = {value} WHERE number = ?", (rng.choice(numbers(path)),)))  # noqa: S608


def cut_head(directory: Path, rng: random.Random) -> None:
    if rng.random() < 0.5:
        for path in files(directory)[: rng.randint(1, 2)]:
            path.unlink()
        return
    path = files(directory)[0]
    sql(path, ("DELETE FROM records WHERE number <= ?", (rng.choice(numbers(path)[:-1]),)))


def cut_tail(directory: Path, rng: random.Random) -> None:
    if rng.random() < 0.3:
        files(directory)[-1].unlink()
        return
    path = rng.choice(files(directory))
    sql(path, ("DELETE FROM records WHERE number >= ?", (rng.choice(numbers(path)[1:]),)))


def cut_middle(directory: Path, rng: random.Random) -> None:
    if rng.random() < 0.2:
        files(directory)[1].unlink()
        return
    path = rng.choice(files(directory))
    first = rng.choice(numbers(path)[1:-2])
    sql(path, ("DELETE FROM records WHERE number BETWEEN ? AND ?", (first, first + rng.randint(0, 1))))
    if rng.random() < 0.5:  # and close the gap
        last = numbers(path)[-1]
        for number in range(first, last + 1):
            sql(path, ("UPDATE OR IGNORE records SET number = number - 1 WHERE number = ?", (number + 1,)))


def reorder(directory: Path, rng: random.Random) -> None:
    path = rng.choice(files(directory))
    one, other = rng.sample(numbers(path), 2)
    sql(
        path,
        ("UPDATE records SET number = -1 WHERE number = ?", (one,)),
        ("UPDATE records SET number = ? WHERE number = ?", (one, other)),
        ("UPDATE records SET number = ? WHERE number = -1", (other,)),
    )


def insert(directory: Path, rng: random.Random) -> None:
    path = rng.choice(files(directory))
    there = numbers(path)
    at = rng.choice(there[1:])
    for number in reversed([number for number in there if number >= at]):
        sql(path, ("UPDATE records SET number = number + 1 WHERE number = ?", (number,)))
    columns = "at_us, guest, stream, counter, facts, person, salt, digest, hash"
    query = f"INSERT INTO records SELECT ?, {columns} FROM records WHERE number = ?"  # noqa: S608
    sql(path, (query, (at, rng.choice([number for number in there if number < at]))))


def swap_files(directory: Path, rng: random.Random) -> None:
    one, other = rng.sample(files(directory), 2)
    scratch = directory / "scratch"
    one.rename(scratch)
    other.rename(one)
    scratch.rename(other)


def foreign_file(directory: Path, rng: random.Random) -> None:
    path = rng.choice(files(directory))
    path.unlink()
    with closing(Chain(directory.parent / "foreign", Clock())) as chain:
        chain.deliver([Delivery("vm-1", [split(said())])])
        (made,) = chain.segments()
    made.rename(path)
    shutil.rmtree(directory.parent / "foreign")


EDITS_OF_FILES: list[Edit] = [
    change, cut_head, cut_tail, cut_middle, reorder, insert, swap_files, foreign_file,
]  # fmt: skip


def test_what_is_whole_is_called_whole(whole: tuple[Path, list[Checkpoint]], key: SigningKey) -> None:
    assert findings(*whole, key) == []
    assert findings(whole[0], [], key) == []


@pytest.mark.parametrize("count", [15, pytest.param(500, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("edit", EDITS_OF_FILES, ids=lambda edit: edit.__name__)
def test_every_edit_of_the_chain_is_found(
    edit: Edit,
    count: int,
    copied: Callable[[], Path],
    whole: tuple[Path, list[Checkpoint]],
    key: SigningKey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("persona_broker.audit.verify._PART", 7)  # a change may be where two parts meet
    monkeypatch.setattr("persona_broker.audit.verify._BLOCK", 5)
    seed = random.randrange(1 << 32)  # noqa: S311 - no secret
    rng = random.Random(seed)  # noqa: S311
    missed = []
    for number in range(count):
        directory = copied()
        before = [list(sqlite_rows(path)) for path in files(directory)]
        edit(directory, rng)
        if before == [list(sqlite_rows(path)) for path in files(directory)]:
            continue  # it changed nothing
        if not findings(directory, whole[1], key):
            missed.append(number)
    assert missed == [], f"seed {seed}"


def sqlite_rows(path: Path) -> Iterator[object]:
    with closing(sqlite3.connect(path)) as db:
        db.text_factory = lambda data: ("text", data)  # an edit may leave what is no UTF-8
        yield from db.execute("SELECT * FROM records")


def test_several_processes_find_the_same(
    copied: Callable[[], Path],
    whole: tuple[Path, list[Checkpoint]],
    key: SigningKey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("persona_broker.audit.verify._PART", 7)
    directory = copied()
    for path in files(directory):
        sql(path, ("UPDATE records SET facts = facts || ' ' WHERE number % 9 = 0", ()))
        sql(path, ("DELETE FROM records WHERE number % 17 = 0", ()))
    alone = findings(directory, whole[1], key)
    assert {item.kind for item in alone} >= {"changed", "cut"}
    monkeypatch.setattr("persona_broker.audit.verify._ALONE_MAX", 0)
    assert findings(directory, whole[1], key) == alone
    assert findings(*whole, key) == []


def test_the_quick_look_finds_the_same_as_the_thorough_one(tmp_path: Path) -> None:
    """Guests in turn, erased records, what has no number, late numbers, markers and conflicts."""
    other = Stream("c" * 32, "d" * 32)
    lost = split(said(event="lost", lost={"first": 70, "last": 75, "why": "full"}), 76, Gap(70, 75, "full"))
    with closing(Chain(tmp_path / "audit", Clock())) as chain:
        for first in range(1, 60, 6):
            mine = [split(said(f"u{number}"), number) for number in range(first, first + 6)]
            chain.deliver(
                [Delivery("vm-1", mine, STREAM), Delivery("vm-2", [split(said("\udc80"), first // 6 + 1)], other)]
            )
            chain.deliver([Delivery("vm-3", [split(said("bob"))])])
        chain.deliver([Delivery("vm-1", [split(said(), 68), split(said(), 65), lost], STREAM)])
        chain.deliver([Delivery("vm-1", [split(said("eve"), 3)], STREAM)])
        (path,) = chain.segments()
    with closing(Segment(path, writable=True)) as segment:
        segment.erase([4, 5, 30])
        streams = {None: "\n", 1: f"{STREAM.machine}\n{STREAM.boot}", 2: f"{other.machine}\n{other.boot}"}
        in_bytes = {ident: text.encode() for ident, text in streams.items()}
        last, quick = segment.head()[0], 0
        hashes = {0: segment_opening(segment), **dict(segment.rows("SELECT number, hash FROM records"))}
        for first in range(1, last + 1):
            for end in range(first, min(first + 40, last) + 1):
                before, wanted = (hashes[first - 1], first - 1), frozenset({5, end})
                found = check_quickly(segment.rows_in_bytes(_BARE, first, end), in_bytes, *before, wanted)
                thorough = check(path.name, segment.rows(_LINKS, first, end), streams, *before, wanted)
                assert found in (None, thorough)
                quick += found is not None
    assert thorough.findings == []
    assert quick > 1000


def segment_opening(segment: Segment) -> bytes:
    return bytes.fromhex(segment.meta("previous"))


def test_a_number_that_is_out_of_reach_does_not_take_for_ever(
    copied: Callable[[], Path], whole: tuple[Path, list[Checkpoint]], key: SigningKey
) -> None:
    for far in (1 << 60, (1 << 63) - 1):
        directory = copied()
        last = files(directory)[-1]
        columns = "at_us, guest, stream, counter, facts, person, salt, digest, hash"
        sql(last, (f"INSERT INTO records SELECT ?, {columns} FROM records WHERE number = ?", (far, numbers(last)[-1])))  # noqa: S608
        assert [item.kind for item in findings(directory, whole[1], key)][:2] == ["cut", "changed"]


def test_text_that_is_moved_into_the_salt_is_found(
    copied: Callable[[], Path], whole: tuple[Path, list[Checkpoint]], key: SigningKey
) -> None:
    """The digest is over salt and text in one, so only the salt's length tells where one ends."""
    directory = copied()
    moved = "salt = CAST(salt || substr(person, 1, 30) AS BLOB), person = substr(person, 31)"
    sql(files(directory)[1], (f"UPDATE records SET {moved} WHERE number = ?", (numbers(files(directory)[1])[4],)))  # noqa: S608
    (found,) = findings(directory, whole[1], key)
    assert (found.kind, found.number) == ("changed", numbers(files(directory)[1])[4])


def test_one_change_is_one_finding_that_says_where(
    copied: Callable[[], Path], whole: tuple[Path, list[Checkpoint]], key: SigningKey
) -> None:
    directory = copied()
    path = files(directory)[1]
    number = numbers(path)[4]
    sql(path, ("UPDATE records SET person = replace(person, 'user', 'abus') WHERE number = ?", (number,)))
    (found,) = findings(directory, whole[1], key)
    assert (found.kind, found.segment, found.number, found.vm) == ("changed", "2026-09-22.db", number, "vm-1")
    directory = copied()
    sql(files(directory)[1], ("DELETE FROM records WHERE number = ?", (number,)))
    first, *_ = findings(directory, whole[1], key)
    assert (first.kind, first.segment, first.number) == ("cut", "2026-09-22.db", number)
    directory = copied()
    reorder_two(files(directory)[1], number)
    found = findings(directory, whole[1], key)[0]
    assert (found.kind, found.segment, found.number) == ("reordered", "2026-09-22.db", number)


def reorder_two(path: Path, number: int) -> None:
    sql(
        path,
        ("UPDATE records SET number = -1 WHERE number = ?", (number,)),
        ("UPDATE records SET number = ? WHERE number = ?", (number, number + 1)),
        ("UPDATE records SET number = ? WHERE number = -1", (number + 1,)),
    )


def test_a_chain_made_anew_with_right_hashes_is_found_by_a_checkpoint_only(
    tmp_path: Path, whole: tuple[Path, list[Checkpoint]], key: SigningKey
) -> None:
    """What docs/audit.md says that the chain alone does not prove."""
    clock = Clock()
    with closing(Chain(tmp_path / "audit", clock)) as chain:
        chain.deliver([Delivery("vm-1", [split(said("nobody"), n + 1) for n in range(100)], STREAM)])
    assert findings(tmp_path / "audit", [], key) == []
    assert {item.kind for item in findings(tmp_path / "audit", whole[1], key)} == {"checkpoint"}


def test_every_edit_of_a_checkpoint_is_found(whole: tuple[Path, list[Checkpoint]], key: SigningKey) -> None:
    directory, (first, *_) = whole
    other = SigningKey(Ed25519PrivateKey.generate())
    for wrong in (
        replace(first, number=first.number - 1),
        replace(first, hash="0" * 64),
        replace(first, at_us=first.at_us + 1),
        replace(first, pruned_from=1),
        replace(first, chain="0" * 32),
        replace(first, key="0" * 16),
        replace(first, signature="0" * 128),
        other.sign(first),
        replace(other.sign(first), key=key.public.id),
        key.sign(replace(first, number=10**6)),
        key.sign(replace(first, hash="0" * 64)),
        key.sign(replace(first, chain="0" * 32)),
    ):
        assert len(findings(directory, [wrong], key)) == 1, wrong
    assert findings(directory, [key.sign(first)], key) == []


def test_what_a_torn_file_is_and_what_to_do_is_said_by_its_name(
    copied: Callable[[], Path], whole: tuple[Path, list[Checkpoint]], key: SigningKey
) -> None:
    for damage in (b"", b"this is no database at all, however long it is" * 100, None):
        directory = copied()
        path = files(directory)[-1]
        if damage is not None:
            path.write_bytes(damage)
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 // 4096 * 4096])
        before = path.read_bytes()
        found = findings(directory, whole[1], key)
        assert "broken" in {item.kind for item in found}
        assert {item.segment for item in found if item.kind == "broken"} == {"2026-09-23.db"}
        with closing(Chain(directory, Clock(BEGAN + 2 * DAY_S))) as chain, pytest.raises(sqlite3.DatabaseError):
            chain.deliver([Delivery("vm-1", [split(said())])])
            chain.read(0, 1000)
        assert path.read_bytes() == before or damage is None
        path.rename(directory / "broken")  # as the message says
        with closing(Chain(directory, Clock(BEGAN + 2 * DAY_S))) as chain:
            chain.deliver([Delivery("vm-1", [split(said(), 1)], Stream("0" * 32, "0" * 32))])
            assert [path.name for path in chain.segments()][-1] == "2026-09-23.db"
        assert {item.kind for item in findings(directory, whole[1], key)} == {"cut"}


def test_numbers_go_on_over_segments(whole: tuple[Path, list[Checkpoint]]) -> None:
    every = [number for path in files(whole[0]) for number in numbers(path)]
    assert every == list(range(1, len(every) + 1))
    with closing(Segment(files(whole[0])[1])) as segment:
        assert segment.rows("SELECT last FROM streams") == [(60,)]  # known from the day before
