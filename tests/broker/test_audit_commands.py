"""The operator's commands about the audit as evidence: verify, checkpoints, the key, gaps, who did what."""

import json
import stat
import subprocess
from contextlib import closing
from pathlib import Path

from persona_broker.audit import checkpoints, keys
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.events import EVENTS
from persona_broker.audit.core.format import split
from persona_broker.audit.core.streams import Gap
from persona_broker.audit.delivery import Delivery
from persona_broker.audit.segment import Segment
from persona_broker.store.sqlite import SqliteStore

from tests.broker.conftest import ROOT, Broker
from tests.broker.filled import answer
from tests.broker.test_audit_chain import STREAM, numbered, said
from tests.some import some


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


def test_what_operators_do_is_noted_under_names_that_are_listed() -> None:
    noted = set()
    for file in (ROOT / "broker" / "persona_broker").rglob("*.py"):
        text = file.read_text()
        for call in ('note(db, "', 'event("', "event(\n"):
            for part in text.split(call)[1:]:
                noted.add(part.lstrip(' "\n').partition('"')[0])
    assert noted - {""} == set(EVENTS)


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
