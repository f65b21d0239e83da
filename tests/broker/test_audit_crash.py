"""Whatever happens to who appends: kills at any moment, full and read-only disks; records are there once, or are kept.

The short runs kill a few times, ``make soak`` 200 times.
"""

import contextlib
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from persona_broker import metrics
from persona_broker.audit import checkpoints
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.format import split
from persona_broker.audit.delivery import Delivery
from persona_broker.audit.inbox import take_over, waiting
from persona_broker.audit.search import Wanted, each
from persona_broker.audit.segment import Segment
from persona_broker.audit.verify import verify
from persona_broker.serve import app
from persona_broker.serve.audit_process import Worker
from persona_broker.settings import Audit, Settings
from persona_broker.store.sqlite import SqliteStore

from persona import wire
from tests.broker.conftest import Broker, environment
from tests.broker.test_audit_chain import BEGAN, STREAM, numbered, said
from tests.waiting import until

SOAK = [pytest.mark.soak, pytest.mark.timeout(3600)]
# several days pass in each of these processes, so that some die while they roll over
APPEND = """
import sys
from pathlib import Path
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.format import Stream, split
from persona_broker.audit.delivery import Delivery
from tests.broker.test_audit_chain import STREAM, numbered
began, day = float(sys.argv[2]), [0]
chain = Chain(Path(sys.argv[1]), lambda: began + day[0] * 86400.0)
guest, number = sys.argv[3], int(sys.argv[4])
while True:
    chain.deliver([Delivery(guest, numbered(*range(number, number + 20)), STREAM)])
    print(number + 19, flush=True)
    number += 20
    day[0] += 1
"""
MOVE = """
import sys
from pathlib import Path
from persona_broker.audit.chain import Chain
from persona_broker.audit.inbox import take_over
from persona_broker.store.sqlite import SqliteStore
take_over(SqliteStore(Path(sys.argv[1]) / "db"), Chain(Path(sys.argv[1]) / "audit"))
"""


def run(program: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *words], env=environment(), stdout=subprocess.PIPE, text=True
    )


@pytest.mark.long
@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=SOAK)])
def test_a_kill_at_any_moment_loses_nothing_that_was_acknowledged(tmp_path: Path, kills: int) -> None:
    directory = tmp_path / "audit"
    acknowledged = {"vm-1": 0, "vm-2": 0}
    for kill in range(kills):
        began = BEGAN + kill * 86400.0 * 5
        processes = {
            vm: run(APPEND, str(directory), str(began), vm, str(done + 1)) for vm, done in acknowledged.items()
        }
        for process in processes.values():
            assert process.stdout is not None
            process.stdout.readline()
        time.sleep(random.random() * 0.2)  # noqa: S311 - a moment, no secret
        for process in processes.values():
            process.send_signal(signal.SIGKILL)
        for vm, process in processes.items():
            out, _ = process.communicate()
            acknowledged[vm] = max([acknowledged[vm] + 20, *map(int, out.split())])
    with closing(Chain(directory)) as chain:
        found = verify(chain, ())
        assert [
            item for item in found.findings if item.kind != "cut" or "no broker has begun it" not in item.text
        ] == []
        for vm, done in acknowledged.items():
            there = counters(chain, vm)
            assert there == list(range(1, len(there) + 1))  # none is lost, none is doubled
            assert done <= len(there) <= done + 20  # the last was perhaps not acknowledged
        chain.deliver([Delivery("vm-3", numbered(1), STREAM)])
        assert verify(chain, ()).findings == []


def counters(chain: Chain, vm: str) -> list[int]:
    found: list[int] = []
    for path in chain.segments():
        with closing(Segment(path)) as segment:
            found += [row.counter for row in segment.read(0) if row.guest == vm and row.counter is not None]
    return found


# --- the table of before --------------------------------------------------------------------------


def old(directory: Path, records: int) -> None:
    """A database with records as 0.1.0 and earlier versions of this one have them."""
    SqliteStore(directory / "db").close()
    with closing(sqlite3.connect(directory / "db")) as db, db:
        rows = [("vm-1", json.dumps(said(at=float(number)))) for number in range(records)]
        db.executemany("INSERT INTO records (guest, body) VALUES (?, ?)", rows)


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=SOAK)])
def test_old_records_move_once_however_often_that_is_killed(tmp_path: Path, kills: int) -> None:
    count = 200 * max(kills, 20)
    old(tmp_path, count)
    for _ in range(kills):
        with run(MOVE, str(tmp_path)) as process:
            time.sleep(0.1 + random.random() * 0.6)  # noqa: S311 - a moment, no secret
            process.kill()
    with closing(SqliteStore(tmp_path / "db")) as store, closing(Chain(tmp_path / "audit")) as chain:
        take_over(store, chain)
        assert waiting(store) == 0
        assert [one.record["at"] for one in each(chain, Wanted())] == [float(number) for number in range(count)]
        assert verify(chain, ()).findings == []


def test_between_the_chain_and_the_deletion_there_is_no_moment_that_doubles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old(tmp_path, 30)
    with closing(SqliteStore(tmp_path / "db")) as store, closing(Chain(tmp_path / "audit")) as chain:
        with monkeypatch.context() as patch:
            patch.setattr(SqliteStore, "writing", lambda _self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                take_over(store, chain)
        assert waiting(store) == 30
        store.put_set_load({"cpu": 5.0})  # something new waits beside what is there already
        take_over(store, chain)
        take_over(store, chain)
        assert len(list(each(chain, Wanted()))) == 30
        assert len(list(each(chain, Wanted(event="load_set", guests_only=False)))) == 1


def test_records_come_over_with_migrate_and_with_the_broker(cli: Broker) -> None:
    old(cli.directory, 3)
    done = cli.run("records", "tail")
    assert (done.returncode, done.stdout, "3 records waiting in the database" in done.stderr) == (0, "", True)
    assert cli.run("migrate").stdout == "3 records moved into the audit\n"
    assert len(cli.run("records", "tail").stdout.splitlines()) == 3
    with closing(sqlite3.connect(cli.directory / "db")) as db, db:
        db.execute("INSERT INTO records (guest, body) VALUES ('vm-1', ?)", (json.dumps(said("late")),))
    cli.start(applied=())
    try:
        deadline = time.monotonic() + 10
        while not list(each(Chain(cli.directory / "audit"), Wanted(user="late"))):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        cli.stop()
    found = [one.record["event"] for one in each(Chain(cli.directory / "audit"), Wanted(guests_only=False))]
    assert [event for event in found if event != "exec"] == [
        "segment_opened", "broker_started", "audit_key_made", "guest_added", "broker_stopped",
    ]  # fmt: skip
    value = json.loads(cli.run("audit", "verify", "--json").stdout)
    assert (value["whole"], value["checkpoints"]) == (True, 2)  # of the start and of the end
    assert value["last"] == Chain(cli.directory / "audit").head()[0]


# --- disks ----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real one, of 1 MiB, with the audit; the database is elsewhere."""
    path = tmp_path / "audit"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(path)], check=True)
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@contextlib.contextmanager
def client(directory: Path, when_full: str) -> Iterator[FlaskClient]:
    """The broker's application in this process, with a guest ``vm-1`` whose token is ``t``."""
    settings = replace(Settings(), db=str(directory / "db"), audit=Audit(when_full=when_full))
    with closing(SqliteStore(directory / "db")) as store:
        store.add_guest("vm-1", "t")
    made = app.api(settings)
    with made.test_client() as found, closing(made.extensions["keeper"].chain):
        yield found


def send(found: FlaskClient, first: int, count: int = 100) -> int:
    stream = {"machine": STREAM.machine, "boot": STREAM.boot}
    records = [said(number=number, argv=["x" * 200]) for number in range(first, first + count)]
    headers = {"Authorization": "Bearer t", wire.HEADER: str(wire.CURRENT)}
    body = {"stream": stream, "records": records, "lost": 0}
    return found.post("/v1/records", json=body, headers=headers).status_code


def fill(found: FlaskClient) -> int:
    """Sends until the disk is full; the number of the first record that it did not take."""
    for first in range(1, 10_000, 100):
        if send(found, first) != 204:
            return first
    raise AssertionError("the disk is never full")


def test_on_a_full_disk_guests_keep_their_records_and_everything_says_so(
    tmp_path: Path, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with client(tmp_path, "refuse") as found:
        first = fill(found)
        assert send(found, first) == 503
        assert "database or disk is full; guests keep their records" in caplog.text
        ready = found.get("/readyz")
        assert (ready.status_code, ready.json["status"], ready.json["failing"]) == (200, "degraded", ["audit"])  # type: ignore[index]
        assert b"\npersona_broker_audit_failing 1\n" in found.get("/metrics").data
        subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
        assert send(found, first) == 204
        assert found.get("/readyz").json["status"] == "ready"  # type: ignore[index]
    with closing(Chain(small_disk)) as chain:
        assert verify(chain, ()).findings == []
        assert counters(chain, "vm-1") == list(range(1, first + 100))


def test_on_a_full_disk_they_are_dropped_where_an_operator_chose_that(tmp_path: Path, small_disk: Path) -> None:
    with client(tmp_path, "drop") as found:
        for first in range(1, 10_000, 100):
            assert send(found, first) == 204
            if b"\npersona_broker_audit_failing 1\n" in found.get("/metrics").data:
                break
        subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
        assert send(found, first + 100) == 204
    with closing(Chain(small_disk)) as chain:
        (record,) = [one.record for one in each(chain, Wanted(event="records_dropped", guests_only=False))]
        assert (record["vm"], record["count"]) == ("vm-1", 100)
        (gap,) = verify(chain, ()).findings  # and the numbers prove it
        assert gap.text.startswith(f"numbers {first} to {first + 99} of ")


def test_on_a_read_only_disk_nothing_is_taken(tmp_path: Path, small_disk: Path) -> None:
    with client(tmp_path, "refuse") as found:
        assert send(found, 1) == 204
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        with client(tmp_path, "refuse") as found:
            assert send(found, 101) == 503
            assert found.get("/readyz").json["failing"] == ["audit"]  # type: ignore[index]
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    with client(tmp_path, "refuse") as found:
        assert send(found, 101) == 204
    with closing(Chain(small_disk)) as chain:
        assert counters(chain, "vm-1") == list(range(1, 201))


def test_a_broken_file_is_named_and_left_and_the_way_out_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with client(tmp_path, "refuse") as found:
        assert send(found, 1) == 204
        (path,) = Chain(tmp_path / "audit").segments()
    path.with_name(path.name + "-wal").unlink(missing_ok=True)
    path.write_bytes(b"garbage" * 1000)
    with client(tmp_path, "drop") as found:
        send(found, 101)
        assert f"{path}: file is not a database; nothing was changed in it; move it away" in caplog.text
        assert path.read_bytes() == b"garbage" * 1000
        for left in (tmp_path / "audit").glob(path.name + "*"):
            left.rename(tmp_path / left.name)
        assert send(found, 201) == 204


def test_what_waits_is_said_where_the_audit_cannot_take_it(cli: Broker) -> None:
    old(cli.directory, 1)
    (cli.directory / "audit").write_text("in the way")
    done = cli.run("audit", "hold", "add", "--user", "alice")
    assert "what waits in the database does not get into the audit" in done.stderr
    assert cli.run("migrate").returncode == 3
    with closing(SqliteStore(cli.directory / "db")) as store:
        assert waiting(store) == 2


def test_many_threads_share_a_wait_for_the_disk(tmp_path: Path) -> None:
    """Of what waits for one commit, all goes with the next."""
    commits: list[int] = []
    with closing(Chain(tmp_path / "audit")) as chain:
        chain.add([])
        commit = chain._commit

        def counted(taken: Any) -> None:
            if not commits:  # the first one takes as long as the others need to queue up behind it
                until(lambda: len(chain._queue) + len(taken) == 16)
            commits.append(len(taken))
            commit(taken)

        chain._commit = counted  # type: ignore[method-assign]

        def work(number: int) -> None:
            chain.deliver([Delivery(f"vm-{number}", [split(said())])])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sum(commits) == 16
    assert len(commits) <= 2


def test_whatever_fails_in_the_audit_s_process_ends_no_other_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(_path: Path) -> None:
        raise ImportError("no cryptography here")

    monkeypatch.setattr("persona_broker.audit.keys.load_or_make", missing)
    worker = Worker(replace(Settings(), db=str(tmp_path / "db")))
    worker.begin()
    worker.look()
    assert metrics.is_audit_failing()
    assert "the audit does not work: no cryptography here" in caplog.text
    monkeypatch.undo()
    worker.look()
    worker.end()
    assert not metrics.is_audit_failing()
    with closing(SqliteStore(tmp_path / "db")) as store, closing(Chain(tmp_path / "audit")) as chain:
        newest = checkpoints.newest(store)
        assert newest is not None and newest.number == chain.head()[0]


@pytest.mark.parametrize("broken", ["checkpoints.put", "keys.load_or_make"])
def test_a_step_that_fails_is_not_covered_up_by_one_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def fails(*_values: object) -> None:
        raise OSError("no more room")

    monkeypatch.setattr(f"persona_broker.audit.{broken}", fails)
    worker = Worker(replace(Settings(), db=str(tmp_path / "db")))
    for _ in range(5):
        worker.look()
        assert metrics.is_audit_failing()
    assert caplog.text.count("the audit does not work: no more room") == 1
    monkeypatch.undo()
    worker._checkpoint_at = 0.0
    worker.look()
    assert not metrics.is_audit_failing()
    with closing(Chain(tmp_path / "audit")) as chain:
        told = [json.loads(row.facts)["event"] for row in chain.read(0, 100)]
    assert told == ["segment_opened", "broker_started", "audit_key_made"]


def test_a_chain_that_is_gone_is_told_at_the_next_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        worker = Worker(replace(Settings(), db=str(tmp_path / "db")))
        worker.begin()
        worker.end()
    assert "records are gone" not in caplog.text
    shutil.rmtree(tmp_path / "audit")
    worker = Worker(replace(Settings(), db=str(tmp_path / "db")))
    worker.begin()
    worker.end()
    assert "records are gone" in caplog.text
