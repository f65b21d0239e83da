"""What goes from the audit by an operator's or the settings' word, and what never does: prune, erase, hold."""

import pkgutil
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from persona_broker import metrics
from persona_broker.audit import checkpoints, holds, keys
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.format import link, message, person_digest
from persona_broker.audit.delivery import Delivery
from persona_broker.audit.search import Wanted, each
from persona_broker.audit.segment import Segment
from persona_broker.serve.audit_process import Worker
from persona_broker.settings import Audit, Settings
from persona_broker.store.interface import Author
from persona_broker.store.sqlite import SqliteStore

from tests.broker.conftest import Broker
from tests.broker.filled import SECRET, answer, days
from tests.broker.test_audit_chain import BEGAN, DAY_S, STREAM, numbered


def test_prune_takes_whole_days_and_leaves_a_signed_checkpoint(filled: Broker) -> None:
    done = filled.run("audit", "prune", "--before", "2026-09-23")
    assert (done.returncode, "add --yes" in done.stderr) == (1, True)
    assert days(filled) == ["21", "22", "23", "24"]
    value = answer(filled, "prune", "--before", "2026-09-23", "--dry-run")
    assert [item["segment"] for item in value["pruned"]] == ["2026-09-21", "2026-09-22"]
    value = answer(filled, "prune", "--before", "2026-09-23", "--yes", "-m", "retention")
    assert days(filled)[:2] == ["23", "24"]
    assert answer(filled, "verify")["whole"]
    told = answer(filled, "tail", "-n", "1")
    record = (told[0] if isinstance(told, list) else told)["record"]
    assert (record["event"], record["message"], record["before"]) == ("audit_pruned", "retention", "2026-09-23")
    assert [day["first"] for day in record["days"]] == [1, 6]
    # without the checkpoints nobody could tell a pruning from a cut
    with closing(SqliteStore(filled.directory / "db")) as store, store.writing() as db:
        db.execute("DELETE FROM audit_checkpoints WHERE pruned_from > 0")
    assert {item["kind"] for item in answer(filled, "verify", code=1)["items"]} == {"cut"}


def keeping(broker: Broker, keep_days: int, *, recent: bool = True) -> Worker:
    """A broker that has just started; ``recent``: it ran until now."""
    if recent:
        with closing(Chain(broker.directory / "audit")) as chain:
            chain.add([])
    worker = Worker(Settings(db=str(broker.directory / "db"), audit=Audit(keep_days=keep_days)))
    worker.look()
    return worker


def test_the_broker_prunes_by_itself_where_it_is_asked_to(filled: Broker) -> None:
    assert filled.run("audit", "hold", "add", "--session", "s-1").returncode == 0
    keep = int(time.time() // DAY_S - BEGAN // DAY_S) - 3  # the fourth day is the first that is not older
    for setting, left in ((0, ["21", "22", "23", "24"]), (keep + 900, ["21", "22", "23", "24"]), (keep, ["22", "24"])):
        worker = keeping(filled, setting)
        for _ in range(6):
            there = len(days(filled))
            worker.look()
            assert len(days(filled)) >= there - 1  # one day at a time: SIGTERM is heard, and records are taken over
        assert days(filled)[: len(left)] == left, setting
    assert answer(filled, "verify")["whole"]
    told = [one["record"] for one in answer(filled, "search", "--event", "audit_pruned")]
    assert {(one["author"], one["message"]) for one in told} == {("broker", f"audit.keep_days = {keep}")}
    assert sorted(day["segment"] for one in told for day in one["days"]) == ["2026-09-21", "2026-09-23"]


def test_the_broker_deletes_no_evidence_and_says_so(filled: Broker, caplog: pytest.LogCaptureFixture) -> None:
    with closing(Segment(filled.directory / "audit" / "2026-09-21.db", writable=True)) as segment:
        segment.rows("UPDATE records SET guest = 'vm-3' WHERE number = 2")
    forge(filled.directory / "audit" / "2026-09-23.db")
    worker = keeping(filled, 1)
    for _ in range(6):
        worker.look()
    assert "what was tampered with is evidence" in caplog.text
    assert "2026-09-23 stays: " in caplog.text
    assert days(filled)[:3] == ["21", "23", "24"]


def test_a_day_that_cannot_be_pruned_fails_until_it_is_gone(filled: Broker, caplog: pytest.LogCaptureFixture) -> None:
    with closing(Segment(filled.directory / "audit" / "2026-09-21.db", writable=True)) as segment:
        segment.rows("UPDATE records SET guest = 'vm-3' WHERE number = 2")
    worker = keeping(filled, 1)
    for _ in range(6):
        worker.look()
    assert days(filled)[:1] == ["21"] and "23" not in days(filled)
    assert metrics.is_audit_failing()
    assert caplog.text.count("what was tampered with is evidence") == 1
    (filled.directory / "audit" / "2026-09-21.db").unlink()
    worker._prune_at = 0.0
    worker.look()
    assert not metrics.is_audit_failing()


def test_a_new_chain_is_no_clock_that_is_off(cli: Broker, caplog: pytest.LogCaptureFixture) -> None:
    SqliteStore(cli.directory / "db").close()
    worker = keeping(cli, 1, recent=False)
    worker.look()
    assert "nothing is deleted" not in caplog.text


@pytest.mark.parametrize("right", [True, False])
def test_a_newest_record_that_could_not_be_read_at_the_start_is_read_later(
    filled: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, right: bool
) -> None:
    """What came meanwhile says nothing of a clock that is far off."""

    def fails(_chain: Chain, _began: float) -> float:
        raise OSError("no such disk")

    monkeypatch.setattr(Chain, "newest_before", fails)
    worker = keeping(filled, 1, recent=right)
    with closing(Chain(filled.directory / "audit")) as chain:
        chain.add([])
        chain.deliver([Delivery("vm-9", numbered(1), STREAM)])
    for _ in range(3):
        worker.look()
    assert days(filled)[:4] == ["21", "22", "23", "24"]
    assert metrics.is_audit_failing()
    assert "nothing is deleted" not in caplog.text
    with closing(SqliteStore(filled.directory / "db")) as store:  # only pruning waits for it
        assert store.rows("SELECT max(number) FROM audit_checkpoints WHERE pruned_from = 0")[0][0] > 12
        started = [one.record["event"] for one in each(Chain(filled.directory / "audit"), Wanted(guests_only=False))]
    assert "broker_started" in started
    monkeypatch.undo()
    for _ in range(6):
        worker.look()
    assert ("21" in days(filled), "nothing is deleted" in caplog.text) == (not right, not right)
    assert not metrics.is_audit_failing()


@pytest.mark.parametrize("jumps", ["before the start", "after it", "back"])
def test_a_clock_that_is_far_off_deletes_nothing(
    filled: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, jumps: str
) -> None:
    worker = keeping(filled, 1, recent=jumps != "before the start")
    real = time.time
    if jumps != "before the start":
        monkeypatch.setattr(time, "time", lambda: real() + {"after it": 8, "back": -8}[jumps] * DAY_S)
    for _ in range(6):
        worker.look()
        worker._prune_at = 0.0
    assert days(filled)[:4] == ["21", "22", "23", "24"]
    assert caplog.text.count("audit.keep_days: nothing is deleted") == 1


def test_prune_goes_on_where_it_was_interrupted(filled: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(_path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("persona_broker.audit.index.remove", dies)
    assert filled.run("audit", "prune", "--before", "2026-09-23", "--yes").returncode == 130
    monkeypatch.undo()
    assert days(filled)[:4] == ["21", "22", "23", "24"]
    assert answer(filled, "verify")["whole"]
    assert answer(filled, "prune", "--before", "2026-09-23", "--yes")["ok"]
    assert days(filled)[:2] == ["23", "24"]
    assert answer(filled, "verify")["whole"]


def test_prune_goes_no_further_than_a_signed_checkpoint_and_takes_no_evidence(filled: Broker) -> None:
    with closing(SqliteStore(filled.directory / "db")) as store, store.writing() as db:
        db.execute("DELETE FROM audit_checkpoints WHERE number > 9")
    value = answer(filled, "prune", "--before", "2027-01-01", "--dry-run")
    assert [item["segment"] for item in value["pruned"]] == ["2026-09-21"]
    assert {item["why"] for item in value["kept"]} == {"no signed checkpoint reaches its end yet", "it is the newest"}
    with closing(Segment(filled.directory / "audit" / "2026-09-21.db", writable=True)) as segment:
        segment.rows("UPDATE records SET guest = 'vm-3' WHERE number = 2")
    done = filled.run("audit", "prune", "--before", "2026-09-22", "--yes")
    assert (done.returncode, "what was tampered with is evidence" in done.stderr) == (1, True)
    assert days(filled)[:2] == ["21", "22"]


def forge(path: Path) -> None:
    """Writes a day anew, so that everything in it is right by itself: another VM, and hashes that say so."""
    with closing(Segment(path, writable=True)) as segment:
        hashed = bytes.fromhex(segment.meta("previous"))
        people = dict(segment.rows("SELECT number, salt FROM records"))
        segment.rows("UPDATE records SET guest = 'vm-9' WHERE guest = 'vm-2'")
        for row in segment.read(0):
            stated = message(row.number, row.at_us, row.guest, row.stream, row.counter, row.facts)
            hashed = link(hashed, person_digest(people[row.number], row.person or ""), stated)
            segment.rows("UPDATE records SET hash = ? WHERE number = ?", hashed, row.number)


@pytest.mark.parametrize(
    ("day", "stay"),
    [("21", ["21", "22"]), ("22", ["22", "23"]), ("23", ["23"])],
)
def test_a_day_that_was_forged_as_a_whole_is_not_pruned(filled: Broker, day: str, stay: list[str]) -> None:
    forge(filled.directory / "audit" / f"2026-09-{day}.db")
    with closing(SqliteStore(filled.directory / "db")) as store, store.writing() as db:
        db.execute("DELETE FROM audit_checkpoints WHERE number < 19")  # none is of the days themselves
    assert answer(filled, "verify", code=1)["items"]
    value = answer(filled, "prune", "--before", "2026-09-24", "--yes")
    assert [item["segment"][-2:] for item in value["kept"]] == stay
    assert all("evidence" in item["why"] for item in value["kept"])
    assert days(filled)[: len(stay)] == stay
    assert "changed" in {item["kind"] for item in answer(filled, "verify", code=1)["items"]}


def test_a_forged_day_is_not_pruned_where_the_next_was_made_to_name_it(filled: Broker) -> None:
    path = filled.directory / "audit" / "2026-09-23.db"
    forge(path)
    with closing(Segment(path)) as segment, closing(Segment(path.with_name("2026-09-24.db"), writable=True)) as after:
        after.rows("UPDATE meta SET value = ? WHERE key = 'previous'", segment.head()[1].hex())
    with closing(SqliteStore(filled.directory / "db")) as store, store.writing() as db:
        db.execute("DELETE FROM audit_checkpoints WHERE number < 19")
    value = answer(filled, "prune", "--before", "2026-09-24", "--yes")
    assert [item["segment"] for item in value["kept"]] == ["2026-09-23"]


def test_a_day_that_a_checkpoint_contradicts_is_not_pruned(filled: Broker) -> None:
    previous = ""
    for path in Chain(filled.directory / "audit").segments():  # each follows the one before it
        with closing(Segment(path, writable=True)) as segment:
            segment.rows("UPDATE meta SET value = ? WHERE key = 'previous' AND ? != ''", previous, previous)
            forge(path)
            previous = segment.head()[1].hex()
    with closing(SqliteStore(filled.directory / "db")) as store, store.writing() as db:
        db.execute("DELETE FROM audit_checkpoints WHERE number IN (4, 14)")
    value = answer(filled, "prune", "--before", "2026-09-24", "--yes")
    assert [item["segment"][-2:] for item in value["kept"]] == ["22"]
    assert value["kept"][0]["why"].startswith("record 9 had another hash when a checkpoint was made of it")


def test_a_day_that_contradicts_what_was_pruned_before_it_stays(filled: Broker) -> None:
    assert answer(filled, "prune", "--before", "2026-09-22", "--yes")["ok"]
    path = filled.directory / "audit" / "2026-09-22.db"
    with closing(Segment(path, writable=True)) as segment:
        segment.rows("UPDATE meta SET value = ? WHERE key = 'previous'", "ab" * 32)
    forge(path)
    with closing(SqliteStore(filled.directory / "db")) as store, store.writing() as db:
        db.execute("DELETE FROM audit_checkpoints WHERE number IN (9, 14)")
    with closing(Segment(path)) as segment, closing(Segment(path.with_name("2026-09-23.db"), writable=True)) as after:
        after.rows("UPDATE meta SET value = ? WHERE key = 'previous'", segment.head()[1].hex())
    forge(after.path)
    value = answer(filled, "prune", "--before", "2026-09-23", "--yes")
    assert [item["why"] for item in value["kept"]] == ["it does not follow what was pruned before it; it is evidence"]


def test_two_checkpoints_that_contradict_each_other_are_found_also_where_it_was_pruned(filled: Broker) -> None:
    assert answer(filled, "prune", "--before", "2026-09-23", "--yes")["ok"]
    assert answer(filled, "verify")["whole"]
    key, _ = keys.load_or_make(filled.directory / "audit.key")
    with closing(SqliteStore(filled.directory / "db")) as store:
        (item,) = [item for item in checkpoints.kept(store)[0] if item.number == 9]
        checkpoints.put(store, [key.sign(replace(item, hash="ab" * 32, at_us=item.at_us + 1, signature=""))])
    (found,) = answer(filled, "verify", code=1)["items"]
    assert (found["kind"], found["number"]) == ("changed", 9)
    assert "different hashes" in found["text"]


def test_what_is_held_is_neither_pruned_nor_erased(filled: Broker) -> None:
    assert answer(filled, "hold", "add", "--session", "s-1", "-m", "case 7")["held"]["name"] == "s-1"
    assert filled.run("audit", "hold", "add", "--session", "s-1").returncode == 1
    (held,) = answer(filled, "hold", "list")["items"]
    assert (held["kind"], held["name"], held["message"]) == ("session", "s-1", "case 7")
    value = answer(filled, "prune", "--before", "2026-09-24", "--yes")
    assert [item["segment"] for item in value["pruned"]] == ["2026-09-21", "2026-09-23"]
    assert "session s-1, who is held" in value["kept"][0]["why"]
    assert days(filled)[:2] == ["22", "24"]
    assert answer(filled, "verify")["whole"]  # there is a hole on either side of it
    done = filled.run("audit", "erase", "--user", "alice", "--yes")
    assert (done.returncode, "session s-1 is held" in done.stderr) == (1, True)
    assert filled.run("audit", "hold", "add", "--user", "bob").returncode == 0
    done = filled.run("audit", "erase", "--user", "bob", "--yes")
    assert (done.returncode, "'bob' is held" in done.stderr) == (1, True)
    assert len(answer(filled, "search", "--user", "bob")) == 2
    for words in (("--user", "bob"), ("--session", "s-1")):
        assert filled.run("audit", "hold", "remove", *words).returncode == 0
    assert filled.run("audit", "hold", "remove", "--user", "bob").returncode == 1
    assert answer(filled, "erase", "--user", "bob", "--yes")["erased"] == 2
    events = [one["record"]["event"] for one in answer(filled, "tail", "-n", "100")]
    assert (events.count("audit_held"), events.count("audit_released")) == (2, 2)


@pytest.mark.parametrize(
    "during", ["persona_broker.audit.prune.verify_segments", "persona_broker.cli.audit_changes._confirmed"]
)
@pytest.mark.parametrize("touched", [True, False])
def test_a_hold_that_is_set_while_days_are_pruned_counts(
    filled: Broker, monkeypatch: pytest.MonkeyPatch, during: str, touched: bool
) -> None:
    """During the look at the days, which takes minutes, and while the operator is asked."""
    real = pkgutil.resolve_name(during)

    def held_meanwhile(*values: Any) -> Any:
        with closing(SqliteStore(filled.directory / "db")) as store:
            holds.add(store, "session", "s-1" if touched else "s-9", Author("carol", "case 8"))
        return real(*values)

    monkeypatch.setattr(during, held_meanwhile)
    value = answer(filled, "prune", "--before", "2026-09-24", "--yes")
    monkeypatch.undo()
    gone = ["2026-09-21", "2026-09-23"] if touched else ["2026-09-21", "2026-09-22", "2026-09-23"]
    assert [item["segment"] for item in value["pruned"]] == gone
    assert [item["why"] for item in value["kept"]] == ["it has records of the session s-1, who is held"] * touched
    assert days(filled)[:1] == (["22"] if touched else ["24"])
    assert answer(filled, "verify")["whole"]
    with closing(SqliteStore(filled.directory / "db")) as store:
        assert {item.pruned_from for item in checkpoints.kept(store)[0]} == ({0, 1, 11} if touched else {0, 1, 6, 11})


def test_erased_is_the_text_and_not_the_fact(filled: Broker) -> None:
    filled.run("audit", "search", "--user", "alice")  # it is in an index, too
    assert SECRET.encode() in contents(filled.directory)
    done = filled.run("audit", "erase", "--user", "alice")
    assert (done.returncode, "for ever" in done.stderr) == (1, True)
    value = answer(filled, "erase", "--user", "alice", "--yes", "-m", "asked for it")
    assert value["erased"] == 8
    assert answer(filled, "search", "--user", "alice") == []
    assert SECRET.encode() not in contents(filled.directory)
    assert b"alice" not in contents(filled.directory)
    found = answer(filled, "search", "--session", "s-2")
    assert [one["erased"] for one in found] == [True, True]
    assert found[0]["record"] == {
        "at": "1970-01-01T00:00:01.500Z", "session": "s-2", "decision": "granted", "reason": None, "persona": "A",
        "persona_version": 1, "policy": "a", "event": "exec", "leased": False, "complain": False,
    }  # fmt: skip
    value = answer(filled, "verify")
    assert (value["whole"], value["erased"]) == (True, 8)
    assert "8 records without the text: 'audit search --event audit_erased'" in filled.run("audit", "verify").stdout
    with closing(Chain(filled.directory / "audit")) as chain:  # what comes again is not told from what was erased
        (kept,) = chain.deliver([Delivery("vm-1", numbered(1, 2, session="s-0", argv=["mysql", SECRET]), STREAM)])
        assert kept.again == 2
        records = [one.record for one in each(chain, Wanted(event="audit_erased", guests_only=False))]
    assert [(one["count"], one["message"]) for one in records] == [(8, "asked for it")]


def contents(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in (directory / "audit").rglob("*") if path.is_file())
