"""The operator's commands about the audit: verify, search, export, prune, hold, erase, gaps, key."""

import contextlib
import json
import os
import pkgutil
import sqlite3
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from persona_broker.audit import checkpoints, holds, keys
from persona_broker.audit.chain import Chain
from persona_broker.audit.core import ocsf
from persona_broker.audit.core.events import EVENTS
from persona_broker.audit.core.format import link, message, person_digest, split
from persona_broker.audit.core.streams import Gap
from persona_broker.audit.delivery import Delivery
from persona_broker.audit.index import Index, Indexer, index_of
from persona_broker.audit.search import Wanted, each, later, newest
from persona_broker.audit.segment import Segment
from persona_broker.serve.audit_process import Worker
from persona_broker.settings import Audit, Settings
from persona_broker.store.interface import Author
from persona_broker.store.sqlite import SqliteStore

from tests.broker.conftest import ROOT, Broker
from tests.broker.test_audit_chain import BEGAN, BOOT, DAY_S, MACHINE, STREAM, Clock, numbered, said
from tests.some import some

SECRET = "s3cr3t-of-alice"
SOAK = [pytest.mark.soak, pytest.mark.timeout(600)]


@pytest.fixture
def filled(cli: Broker) -> Iterator[Broker]:
    """Four days of records, a key, and a checkpoint at the end of each day."""
    clock = Clock()
    key, _ = keys.load_or_make(cli.directory / "audit.key")
    with closing(SqliteStore(cli.directory / "db")) as store, closing(Chain(cli.directory / "audit", clock)) as chain:
        for day in range(4):
            clock.now = BEGAN + day * DAY_S
            mine = numbered(2 * day + 1, 2 * day + 2, argv=["mysql", SECRET], session=f"s-{day}")
            bobs = split(said("bob", decision="denied", reason="outside_hours", program="/usr/bin/nmap", session=""))
            chain.deliver([Delivery("vm-1", mine, STREAM), Delivery("vm-2", [bobs])])
            made = checkpoints.make(chain, key, clock)
            assert made is not None
            checkpoints.put(store, [made])
    yield cli


def answer(broker: Broker, *words: str, code: int = 0) -> Any:
    done = broker.run("audit", *words, "--json")
    assert done.returncode == code, (done.stdout, done.stderr)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return lines[0] if len(lines) == 1 and "ok" in lines[0] else lines


def days(broker: Broker) -> list[str]:
    return [path.stem[-2:] for path in Chain(broker.directory / "audit").segments()]


def test_verify_says_whether_it_is_whole_and_its_exit_code_too(filled: Broker, tmp_path: Path) -> None:
    done = filled.run("audit", "verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("the chain is whole; 19 records to number 19, 4 checkpoints in the database\n")
    value = answer(filled, "verify")
    assert (value["whole"], value["records"], value["checkpoints"], value["items"]) == (True, 19, 4, [])
    with closing(Segment(filled.directory / "audit" / "2026-09-22.db", writable=True)) as segment:
        segment.rows("UPDATE records SET guest = 'vm-3' WHERE number = 8")
    done = filled.run("audit", "verify")
    assert done.returncode == 1
    assert done.stdout.splitlines()[0] == ("changed: 2026-09-22.db, record 8, vm-3: it is not what its hash says")
    (found,) = answer(filled, "verify", code=1)["items"]
    assert (found["kind"], found["segment"], found["number"]) == ("changed", "2026-09-22.db", 8)


def test_verify_against_checkpoints_from_elsewhere(filled: Broker, tmp_path: Path) -> None:
    with closing(SqliteStore(filled.directory / "db")) as store:
        held, _ = checkpoints.kept(store)
    elsewhere = tmp_path / "sink.jsonl"
    lines = [json.dumps({"checkpoint": item.to_mapping()}) for item in held]
    elsewhere.write_text("\n".join([*lines[:2], json.dumps({"number": 5, "record": {}}), "", *lines[2:]]) + "\n")
    assert answer(filled, "verify", "--against", str(elsewhere))["checkpoints_given"] == 4
    # the tail is cut, and with it what the database knows of it: only what is elsewhere tells
    (filled.directory / "audit" / "2026-09-24.db").unlink()
    with closing(Segment(filled.directory / "audit" / "2026-09-23.db", writable=True)) as segment:
        segment.rows("DELETE FROM records WHERE number = 15")
        segment.rows("UPDATE meta SET value = '' WHERE key = 'sealed'")
    with closing(SqliteStore(filled.directory / "db")) as store, store.writing() as db:
        db.execute("DELETE FROM audit_checkpoints WHERE number > 14")
    assert answer(filled, "verify")["whole"]
    found = answer(filled, "verify", "--against", str(elsewhere), code=1)["items"]
    assert [item["kind"] for item in found] == ["cut"]
    for text in ("no json", '{"signature": 1}', "", "[]"):
        elsewhere.write_text(text)
        done = filled.run("audit", "verify", "--against", str(elsewhere))
        assert (done.returncode, done.stdout) == (2, "")
        assert str(elsewhere) in done.stderr
    assert filled.run("audit", "verify", "--against", str(tmp_path / "none")).returncode == 2


def test_a_checkpoint_of_another_key_is_told_and_taken_with_that_key(filled: Broker, tmp_path: Path) -> None:
    public = tmp_path / "old.pem"
    public.write_text(answer(filled, "key")["pem"])
    (filled.directory / "audit.key").unlink()
    assert filled.run("audit", "key").returncode == 1
    keys.load_or_make(filled.directory / "audit.key")
    found = answer(filled, "verify", code=1)["items"]
    assert {item["kind"] for item in found} == {"checkpoint"}
    assert "'audit verify --key' takes it" in found[0]["text"]
    assert answer(filled, "verify", "--key", str(public))["whole"]


def test_the_key_is_the_service_s_alone_and_openssl_knows_it(filled: Broker, tmp_path: Path) -> None:
    file = filled.directory / "audit.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for path in some((filled.directory / "audit").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    (tmp_path / "key.pem").write_text(filled.run("audit", "key").stdout)
    with closing(SqliteStore(filled.directory / "db")) as store:
        made = checkpoints.newest(store)
    assert made is not None
    (tmp_path / "signed").write_bytes(made.signed())
    (tmp_path / "signature").write_bytes(bytes.fromhex(made.signature))
    done = subprocess.run(
        ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "key.pem", "-rawin", "-in", "signed",
         "-sigfile", "signature"],
        cwd=tmp_path, capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "Signature Verified Successfully\n")
    file.write_text("nonsense")
    done = filled.run("audit", "key")
    assert (done.returncode, "this is no Ed25519 key" in done.stderr) == (1, True)
    assert file.read_text() == "nonsense"


@pytest.mark.parametrize(
    ("words", "right"),
    [
        (("--user", "alice"), [2, 3, 7, 8, 12, 13, 17, 18]),
        (("--user", "alice", "-n", "3"), [13, 17, 18]),
        (("--vm", "vm-2"), [4, 9, 14, 19]),
        (("--session", "s-2"), [12, 13]),
        (("--program", "nmap"), [4, 9, 14, 19]),
        (("--decision", "denied", "--until", "2026-09-23T00:00:00Z"), [4, 9]),
        (("--reason", "outside_hours", "--since", "2026-09-24T00:00:00Z"), [19]),
        (("--persona", "B"), []),
        (("--event", "segment_sealed"), [5, 10, 15]),
        (("--user", "alice", "--since", "2026-09-22T00:00:00Z", "--until", "2026-09-23T00:00:00Z"), [7, 8]),
    ],
)
def test_search(filled: Broker, words: tuple[str, ...], right: list[int]) -> None:
    found = answer(filled, "search", *words)
    assert sorted(one["number"] for one in found) == right
    assert len(filled.run("audit", "search", *words).stdout.splitlines()) == len(right)


def test_tail_has_everything_and_what_operators_did(filled: Broker) -> None:
    assert filled.run("apply", str(ROOT / "examples"), "-m", "first try").returncode == 0
    assert filled.run("guest", "add", "vm-9", "--token-file", str(filled.directory / "t")).returncode == 0
    assert filled.run("load", "set", "cpu=10").returncode == 0
    assert filled.run("guest", "remove", "vm-9").returncode == 0
    found = [one["record"] for one in answer(filled, "tail", "-n", "4")]
    assert [one["event"] for one in found] == ["change_set", "guest_added", "load_set", "guest_removed"]
    assert found[0]["count"] == len(found[0]["documents"]) > 5
    assert (found[0]["revision"], found[0]["message"], found[1]["vm"], found[1]["renewed"]) == (
        1,
        "first try",
        "vm-9",
        False,
    )
    assert {one["author"] for one in found} == {"root" if os.getuid() == 0 else found[0]["author"]}
    assert "change_set" in filled.run("audit", "tail", "-n", "4").stdout
    assert answer(filled, "verify")["whole"]


def test_what_operators_do_is_noted_under_names_that_are_listed() -> None:
    noted = set()
    for file in (ROOT / "broker" / "persona_broker").rglob("*.py"):
        text = file.read_text()
        for call in ('note(db, "', 'event("', "event(\n"):
            for part in text.split(call)[1:]:
                noted.add(part.lstrip(' "\n').partition('"')[0])
    assert noted - {""} == set(EVENTS)


def test_export_has_stable_names(filled: Broker) -> None:
    done = filled.run("audit", "export", "--user", "alice", "--vm", "vm-1")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 8
    assert lines[0].keys() == {
        "number", "received_at", "vm", "machine", "boot", "counter", "erased", "hash", "record",
    }  # fmt: skip
    first = lines[0]
    assert (first["machine"], first["boot"], first["counter"], first["erased"]) == (MACHINE, BOOT, 1, False)
    assert first["record"] == {**said(argv=["mysql", SECRET], session="s-0"), "at": "1970-01-01T00:00:01.500Z"}


def test_export_as_ocsf(filled: Broker) -> None:
    done = filled.run("audit", "export", "--format", "ocsf")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 12
    assert "left out: OCSF has no class for them" in done.stderr
    denied = next(line for line in lines if line["status_id"] == 2)
    assert (denied["class_uid"], denied["category_uid"], denied["type_uid"], denied["action_id"]) == (
        1007,
        1,
        100701,
        2,
    )
    assert denied["process"]["file"] == {"name": "nmap", "path": "/usr/bin/nmap", "type_id": 1}
    assert (denied["actor"]["user"], denied["device"]["hostname"]) == ({"name": "bob"}, "vm-2")
    login = ocsf.event_of(7, 1_000_000, "vm-1", said(event="admission"))
    assert login is not None
    assert (login["class_uid"], login["activity_id"], login["type_uid"], login["time"]) == (3002, 1, 300201, 1500)
    assert login["dst_endpoint"] == {"hostname": "vm-1"}
    # what https://schema.ocsf.io/1.1.0 requires of both classes
    for event in (denied, login):
        assert {"activity_id", "category_uid", "class_uid", "metadata", "severity_id", "time", "type_uid"} <= set(event)
        assert {"version", "product"} <= set(event["metadata"])
    assert ocsf.event_of(7, 1, "vm-1", said(event="network")) is None
    assert ocsf.event_of(7, 1, None, {"event": "exec"}) is None


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
    worker._started()
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


def test_a_new_chain_is_no_clock_that_is_off(cli: Broker, caplog: pytest.LogCaptureFixture) -> None:
    SqliteStore(cli.directory / "db").close()
    worker = keeping(cli, 1, recent=False)
    worker.look()
    assert "nothing is deleted" not in caplog.text


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


def test_gaps_are_listed_with_their_reasons(filled: Broker) -> None:
    assert filled.run("audit", "gaps").stdout == "no gaps: every number of every guest came\n"
    with closing(Chain(filled.directory / "audit")) as chain:
        lost = {"first": 12, "last": 14, "why": "spool full"}
        marker = split(said(event="lost", lost=lost), 15, Gap(12, 14, "spool full"))
        chain.deliver([Delivery("vm-1", [*numbered(11), marker], STREAM)])
    found = answer(filled, "gaps", code=1)["items"]
    assert [(gap["first"], gap["last"], gap["count"], gap["why"]) for gap in found] == [
        (9, 10, 2, None), (12, 14, 3, "spool full"),
    ]  # fmt: skip
    assert "LOST, and nobody said why" in filled.run("audit", "gaps").stdout


def test_the_broker_keeps_the_index(cli: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_broker.audit.index._EVERY_S", 0.02)
    with closing(Chain(cli.directory / "audit")) as chain:
        indexer = Indexer(chain)
        indexer.start()
        try:
            chain.deliver([Delivery("vm-1", [split(said())])])
            deadline = time.monotonic() + 10
            while indexed(chain.segments()[0]) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            indexer.stop(5)


def indexed(segment: Path) -> int:
    path = segment.parent / "index" / segment.name
    with contextlib.suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT count(*) FROM entries").fetchone()[0])
    return 0


def test_a_broken_index_is_read_around_and_made_anew(filled: Broker) -> None:
    segment = Chain(filled.directory / "audit").segments()[0]
    Index(segment).close()
    index_of(segment).write_bytes(b"garbage" * 1000)
    assert len(answer(filled, "search", "--user", "alice")) == 8
    assert index_of(segment).read_bytes() == b"garbage" * 1000
    Index(segment).close()
    assert indexed(segment) == Segment(segment).head()[0]


@pytest.mark.parametrize("through", ["nothing", "some", "everything"])
def test_a_search_writes_nothing_and_finds_everything_once(filled: Broker, through: str) -> None:
    """Whatever the index has: what it lacks is read from the records."""
    chain = Chain(filled.directory / "audit")
    for segment in chain.segments() if through != "nothing" else ():
        Index(segment).close()
        if through == "some":
            with closing(sqlite3.connect(index_of(segment))) as db, db:
                db.execute("DELETE FROM entries WHERE number > (SELECT min(number) + 1 FROM entries)")
    numbers = [one.number for one in each(chain, Wanted(guests_only=False))]
    assert numbers == list(range(1, chain.head()[0] + 1))
    assert [one.number for one in newest(chain, Wanted(guests_only=False), 7)[0]] == numbers[-7:]
    assert [one.number for one in later(chain, Wanted(guests_only=False), 2, 4)[0]] == [3, 4, 5, 6]
    (alike,) = newest(chain, Wanted(user="bob", distinct=True), 100)[0]
    assert (alike.count, alike.number) == (4, max(one.number for one in each(chain, Wanted(user="bob"))))
    before = {path: path.read_bytes() for path in some(filled.directory.rglob("*")) if path.is_file()}
    for words in ("audit tail", "audit search --user alice", "audit export", "audit verify", "records tail", "rollout"):
        assert filled.run(*words.split()).returncode in (0, 1)
    after = {path: path.read_bytes() for path in sorted(filled.directory.rglob("*")) if path.is_file()}
    logs = {path for path in after if path.name.endswith(("-wal", "-shm"))}  # SQLite's, of whoever reads
    assert {path: after[path] for path in after.keys() - logs} == {path: before[path] for path in before.keys() - logs}
    assert all(path.stat().st_size == 0 for path in logs - before.keys() if path.name.endswith("-wal"))


def test_odd_text_is_found(cli: Broker) -> None:
    SqliteStore(cli.directory / "db").close()
    odd = ["\udc80x", "a\x00b", "x" * 256, "\U0001f600", '"quoted\\"', "'; DROP TABLE records; --"]
    with closing(Chain(cli.directory / "audit")) as chain:
        extra = {"moon": {"phase": ["new", {"deep": [[[1e300, -0.0, None, ""]]]}]}, "person": {}, "number": "x"}
        chain.deliver([Delivery("vm-1", [split({**said(user), **extra}) for user in odd])])
        for user in set(odd) - {"a\x00b"}:  # SQLite ends a text of JSON there
            assert [one.record["user"] for one in each(chain, Wanted(user=user))] == [user]
    assert len(answer(cli, "tail", "-n", "6")) == 6
    assert answer(cli, "verify")["whole"]


@pytest.mark.parametrize(
    "count",
    [
        100_000,
        pytest.param(1_000_000, marks=[pytest.mark.long, pytest.mark.timeout(600)]),
        pytest.param(10_000_000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_a_search_by_user_and_day_takes_less_than_a_second(cli: Broker, count: int) -> None:
    SqliteStore(cli.directory / "db").close()
    with closing(Chain(cli.directory / "audit")) as chain:
        for first in range(0, count, 5000):
            entries = [split(said(f"user{n % 500}", odd={"n": [n]})) for n in range(first, first + 5000)]
            chain.deliver([Delivery(f"vm-{first % 7}", entries)])
        for path in chain.segments():
            Index(path).close()  # as the broker does every few seconds
        began = time.thread_time()  # what others on this machine take does not count
        found = list(each(chain, Wanted(user="user7", received_since=time.time() - DAY_S)))
        took = time.thread_time() - began
    assert len(found) == count // 500
    assert took < 1
