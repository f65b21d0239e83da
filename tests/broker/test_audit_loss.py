"""A lost chain is acknowledged once; what contradicts the chain after that is found as ever."""

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from persona_broker.audit import checkpoints, holds, keys
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.checkpoint import Checkpoint
from persona_broker.audit.core.events import event
from persona_broker.audit.core.format import split
from persona_broker.audit.core.loss import Loss
from persona_broker.audit.delivery import Delivery
from persona_broker.audit.keys import SigningKey
from persona_broker.audit.loss import acknowledge as acknowledge_loss
from persona_broker.audit.loss import contradicting
from persona_broker.serve.audit_process import Worker
from persona_broker.settings import Settings
from persona_broker.store.interface import Author
from persona_broker.store.sqlite import SqliteStore

from tests.broker.conftest import Broker
from tests.broker.test_audit_chain import Clock, said

OLD = "0" * 31 + "1"


def put(broker: Broker, number: int, chain: str = OLD, key: SigningKey | None = None, pruned_from: int = 0) -> None:
    key = key or keys.load_or_make(broker.directory / "audit.key")[0]
    made = key.sign(Checkpoint(chain, number, "ab" * 32, int(time.time() * 1e6) + number, pruned_from, key.public.id))
    with closing(SqliteStore(broker.directory / "db")) as store:
        checkpoints.put(store, [made])


@pytest.fixture
def lost(cli: Broker) -> Iterator[Broker]:
    """A chain, and three checkpoints of one that is gone, of which one is of what was pruned."""
    with closing(Chain(cli.directory / "audit")) as chain:
        chain.deliver([Delivery("vm-1", [split(said())] * 5)])
    for number in (20, 40):
        put(cli, number)
    put(cli, 10, pruned_from=1)
    yield cli


def verified(broker: Broker, *words: str) -> tuple[int, dict[str, Any]]:
    done = broker.run("audit", "verify", "--json", *words)
    return done.returncode, json.loads(done.stdout)


def acknowledge(broker: Broker, *words: str) -> Any:
    return broker.run("audit", "acknowledge-loss", "-m", "the disk died", "--yes", *words)


def test_a_loss_that_was_acknowledged_is_told_once_and_is_no_finding(lost: Broker) -> None:
    code, before = verified(lost)
    assert (code, len(before["items"])) == (1, 3)
    done = acknowledge(lost, "--json")
    assert (done.returncode, json.loads(done.stdout)["acknowledged"]) == (0, [{"chain": OLD, "through": 40}])
    code, after = verified(lost)
    assert (code, after["whole"], after["items"]) == (0, True, [])
    (told,) = after["acknowledged"]
    assert (told["chain"], told["through"], told["checkpoints"], told["message"]) == (OLD, 40, 3, "the disk died")
    assert after["checkpoints"] == 4  # the command signed one of its own record
    text = lost.run("audit", "verify").stdout
    assert text.startswith(f"acknowledged loss: the chain {OLD} is gone up to record 40, as {told['author']} said on")
    assert "the disk died" in text and "the chain is whole" in text


def test_what_contradicts_the_chain_later_is_found(lost: Broker) -> None:
    assert acknowledge(lost).returncode == 0
    put(lost, 41)  # further than what was acknowledged
    put(lost, 3, chain="0" * 31 + "2")  # of a third chain
    code, found = verified(lost)
    assert (code, [item["number"] for item in found["items"]]) == (1, [3, 41])
    assert acknowledge(lost).returncode == 0  # they are lost as well
    code, found = verified(lost)
    assert (code, sorted(item["through"] for item in found["acknowledged"])) == (0, [3, 40, 41])
    with closing(sqlite3.connect(Chain(lost.directory / "audit").segments()[0])) as db, db:
        db.execute("DELETE FROM records WHERE number = 3")
    assert [item["kind"] for item in verified(lost)[1]["items"]] == ["cut", "changed"]


@pytest.mark.parametrize("harm", ["removed", "changed", "person"])
def test_an_acknowledgement_that_was_removed_or_changed_is_found(lost: Broker, harm: str) -> None:
    assert acknowledge(lost).returncode == 0
    (told,) = verified(lost)[1]["acknowledged"]
    statement = {
        "removed": "DELETE FROM records WHERE number = ?",
        "changed": "UPDATE records SET facts = replace(facts, ':40,', ':90,') WHERE number = ?",
        "person": "UPDATE records SET person = replace(person, 'disk', 'cat') WHERE number = ?",
    }[harm]
    with closing(sqlite3.connect(Chain(lost.directory / "audit").segments()[0])) as db, db:
        assert db.execute(statement, (told["number"],)).rowcount == 1
    code, found = verified(lost)
    numbers = {item["number"] for item in found["items"]}
    assert (code, told["number"] in numbers) == (1, True), found["items"]
    assert (found["acknowledged"] == []) is (harm != "person")
    assert ({20, 40} <= numbers) is (harm != "person")


def test_an_acknowledgement_that_nobody_with_the_key_signed_is_found(lost: Broker) -> None:
    """Whoever owns the files can append a record with right hashes; the signature is what they cannot make."""
    other = SigningKey(Ed25519PrivateKey.generate())
    mine = keys.load_or_make(lost.directory / "audit.key")[0].public
    with closing(Chain(lost.directory / "audit")) as chain:
        for key, claimed in ((other, other.public.id), (other, mine.id)):
            loss = Loss(OLD, 40, "ab" * 32, 5.0, "root", claimed)
            signed = Loss(OLD, 40, "ab" * 32, 5.0, "root", claimed, key.over(loss.signed(chain.id())))
            chain.add([event("audit_loss_acknowledged", 5.0, message="x", **signed.members())])
        chain.add([event("audit_loss_acknowledged", 5.0, message="x", author="root")])
        chain.deliver([Delivery("vm-1", [split(said(**signed.members(), event="audit_loss_acknowledged"))])])
    code, found = verified(lost)
    assert (code, found["acknowledged"]) == (1, [])
    numbers = [item["number"] for item in found["items"]]
    assert numbers == [9, 7, 8, 10, 20, 40]
    assert acknowledge(lost).returncode == 0  # theirs do not count
    assert len(verified(lost)[1]["items"]) == 3


def test_an_acknowledgement_of_another_chain_does_not_count(lost: Broker) -> None:
    assert acknowledge(lost).returncode == 0
    with closing(Chain(lost.directory / "audit")) as chain:
        (told,) = [row for row in chain.read(0, 1000) if "audit_loss_acknowledged" in row.facts]
        facts = json.loads(told.facts)
    for file in (lost.directory / "audit").glob("*.db*"):
        file.unlink()
    with closing(Chain(lost.directory / "audit")) as chain:
        members = {name: facts[name] for name in facts if name not in ("event", "at")}
        chain.add([event("audit_loss_acknowledged", facts["at"], **members)])
    code, found = verified(lost)
    assert (code, found["acknowledged"]) == (1, [])


def test_what_is_refused(lost: Broker, tmp_path: Path) -> None:
    done = lost.run("audit", "acknowledge-loss", "-m", "x")
    assert (done.returncode, "add --yes" in done.stderr) == (1, True)
    assert lost.run("audit", "acknowledge-loss", "--yes").returncode == 2  # why?
    other = SigningKey(Ed25519PrivateKey.generate())
    put(lost, 50, key=other)
    done = acknowledge(lost)
    assert (done.returncode, "'acknowledge-loss --key' takes it" in done.stderr) == (1, True), done.stderr
    assert verified(lost)[1]["acknowledged"] == []
    (tmp_path / "old.pem").write_text("no key")
    assert acknowledge(lost, "--key", str(tmp_path / "old.pem")).returncode == 2
    (tmp_path / "old.pem").write_text(other.public.pem())
    assert acknowledge(lost, "--key", str(tmp_path / "old.pem")).returncode == 0
    assert verified(lost, "--key", str(tmp_path / "old.pem"))[0] == 0
    done = acknowledge(lost, "--key", str(tmp_path / "old.pem"))
    assert (done.returncode, "there is no loss to acknowledge" in done.stderr) == (1, True)


def test_nothing_is_acknowledged_where_there_is_no_chain_or_no_key(cli: Broker) -> None:
    SqliteStore(cli.directory / "db").close()
    assert "has no chain" in acknowledge(cli).stderr
    with closing(Chain(cli.directory / "audit")) as chain:
        chain.add([])
    assert "audit.key is missing" in acknowledge(cli).stderr


def test_a_checkpoint_of_an_earlier_chain_lets_nothing_of_this_one_be_pruned(lost: Broker) -> None:
    for file in (lost.directory / "audit").glob("*.db*"):
        file.unlink()
    clock = Clock()
    with closing(Chain(lost.directory / "audit", clock)) as chain:
        chain.add([])
        clock.now += 86_400
        chain.add([])
    done = lost.run("audit", "prune", "--before", "2027-01-01", "--dry-run", "--json")
    assert json.loads(done.stdout)["pruned"] == []


def test_the_broker_warns_of_a_loss_until_it_is_acknowledged(lost: Broker, caplog: pytest.LogCaptureFixture) -> None:
    for warned in (True, False):
        caplog.clear()
        worker = Worker(Settings(db=str(lost.directory / "db")))
        worker.look()
        assert ("records are gone" in caplog.text) is warned
        assert acknowledge(lost).returncode in (0, 1)


def test_a_cut_end_is_told_also_where_an_older_day_is_damaged(cli: Broker, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    key, _ = keys.load_or_make(cli.directory / "audit.key")
    with closing(SqliteStore(cli.directory / "db")) as store, closing(Chain(cli.directory / "audit", clock)) as chain:
        for _ in range(3):
            chain.deliver([Delivery("vm-1", [split(said())] * 9)])
            clock.now += 86_400
        made = checkpoints.make(chain, key)
        assert made is not None
        checkpoints.put(store, [made])
        paths = chain.segments()
    paths[0].write_bytes(b"garbage" * 1000)
    with closing(sqlite3.connect(paths[2])) as db, db:
        db.execute("DELETE FROM records WHERE number > ?", (made.number - 8,))
    put(cli, 900)  # and of a chain before it, of which nobody can read whether it was acknowledged
    Worker(Settings(db=str(cli.directory / "db"))).look()
    assert f"ends before record {made.number}, of which there is a checkpoint: records are gone" in caplog.text
    assert "ends before record 900, of which" in caplog.text
    assert "cannot be read" in caplog.text and paths[0].name in caplog.text


def test_the_first_take_over_waits_for_no_search_of_the_chain(lost: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    with closing(SqliteStore(lost.directory / "db")) as store:
        holds.add(store, "user", "alice", Author("carol", "case 7"))

    def searched(chain: Chain, _known: object) -> list[Loss]:
        order.extend(json.loads(row.facts)["event"] for row in chain.read(0, 100))
        return []

    monkeypatch.setattr("persona_broker.serve.audit_process.acknowledged", searched)
    Worker(Settings(db=str(lost.directory / "db"))).look()
    assert order[-2:] == ["broker_started", "audit_held"]


def test_the_day_that_acknowledges_a_loss_stays_while_its_checkpoints_do(
    cli: Broker,
) -> None:
    put(cli, 40)
    clock = Clock()
    with closing(Chain(cli.directory / "audit", clock)) as chain, closing(SqliteStore(cli.directory / "db")) as store:
        key, _ = keys.load_or_make(cli.directory / "audit.key")
        chain.add([])
        clock.now += 86_400
        gone = contradicting(chain, checkpoints.kept(store)[0], [key.public])
        assert len(acknowledge_loss(store, chain, key, gone, Author("root", "the disk died"))) == 1
        clock.now += 86_400
        chain.add([])
        made = checkpoints.make(chain, key)
        assert made is not None
        checkpoints.put(store, [made])
        paths = chain.segments()
    prune = ("audit", "prune", "--before", "2027-01-01", "--yes", "--json")
    done = json.loads(cli.run(*prune).stdout)
    assert [item["segment"] for item in done["pruned"]] == [paths[0].stem]
    assert [item["why"] for item in done["kept"]] == [
        f"it acknowledges that the chain {OLD} is gone, of which there are checkpoints",
        "it is the newest",
    ]
    assert verified(cli)[0] == 0
    with closing(SqliteStore(cli.directory / "db")) as store, store.writing() as db:
        db.execute("DELETE FROM audit_checkpoints WHERE chain = ?", (OLD,))
    assert [item["segment"] for item in json.loads(cli.run(*prune).stdout)["pruned"]] == [paths[1].stem]
    assert verified(cli)[0] == 0
