"""Two versions at once: the code of 0.1.0 against this one's, both ways, over a real broker's sockets.

What is new in this version must not cost anybody an answer, a record or a session.
"""

import json
import lzma
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from persona_broker.audit.chain import Chain
from persona_broker.audit.search import Wanted, each

from persona import wire
from persona.canonical import to_mapping
from persona.documents import Persona, parse_document
from persona.parsing import DocumentError
from tests import releases
from tests.broker.conftest import ROOT, VM, Broker, environment
from tests.releases.ask import Agent
from tests.some import some

ASK = Path(releases.__file__).with_name("ask.py")
READ = """
import json, sys
from persona.documents import parse_document
for line in sys.stdin:
    try:
        parse_document(json.loads(line))
        print()
    except Exception as error:
        print(str(error).replace(chr(10), " "), line.rstrip())
"""
DOCUMENTS = """
kind: Persona
name: Quoted
command_whitelist: [ls, "psql -c 'select *'"]
---
kind: Policy
name: office
subjects: {users: [ann]}
vms: ["other-*"]
persona: Quoted
---
kind: Policy
name: anns
subjects: {users: [ann]}
commands: ["psql -c 'select *'", ls]
persona: Quoted
---
kind: Policy
name: anns-rest
subjects: {users: [ann]}
persona: Quoted
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return releases.unpack(tmp_path_factory.mktemp("release"))


def test_what_runs_as_0_1_0_is_all_of_0_1_0(old: Path) -> None:
    show = "import persona as p, persona_broker as b, persona_guest as g; print(*p.__path__, *b.__path__, *g.__path__)"
    done = subprocess.run([sys.executable, "-c", show], env=environment(old), capture_output=True, text=True, cwd=ROOT)
    folders = ("persona", "broker/persona_broker", "guest/persona_guest")
    assert done.stdout.split() == [str(old / folder) for folder in folders]


def broker(directory: Path, root: Path) -> Broker:
    """A broker, which does not run yet, of the version whose tree is ``root``."""
    found = Broker(directory, root)
    (directory / "documents.yaml").write_text(DOCUMENTS)
    assert found.run("load", "set", "cpu=30").returncode == 0
    shutil.copytree(root / "examples", directory / "examples")
    assert found.run("apply", str(directory / "examples"), str(directory / "documents.yaml")).returncode == 0
    return found


@pytest.fixture
def new_broker(tmp_path: Path) -> Iterator[Broker]:
    """Of this version; it cannot read the policy ``office``, which has a reason that 0.1.0 does not know."""
    found = broker(tmp_path, ROOT)
    office = {"kind": "Policy", "name": "office", "subjects": {"users": ["ann"]}, "persona": "Quoted", "moon": "new"}
    spoil = "UPDATE documents SET body = ? WHERE name = 'office'"
    with sqlite3.connect(tmp_path / "db") as db:
        db.execute(spoil, (json.dumps({**office, "commands": ["cat"]}),))
    db.close()
    found.start(applied=())
    yield found
    found.stop()


@pytest.fixture
def old_broker(tmp_path: Path, old: Path) -> Iterator[Broker]:
    found = broker(tmp_path, old)
    found.start(applied=())
    yield found
    found.stop()


def ask(broker: Broker, root: Path) -> Any:
    """What an agent of the version whose tree is ``root`` makes of a broker."""
    command = [sys.executable, str(ASK), str(broker.directory), VM]
    done = subprocess.run(command, env=environment(root), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def kept(broker: Broker) -> tuple[int, int]:
    """How many records are kept, but for those that say what is lost, and how many count as lost.

    They are in the audit, or where 0.1.0 keeps them.
    """
    audited = [found for found in each(Chain(broker.directory / "audit"), Wanted()) if found.record["event"] != "lost"]
    with sqlite3.connect(broker.directory / "db") as db:
        ((rows,),) = db.execute("SELECT count(*) FROM records WHERE json_extract(body, '$.event') != 'lost'").fetchall()
        ((lost,),) = db.execute("SELECT value FROM meta WHERE key = 'records_lost'").fetchall()
    db.close()
    return rows + len(audited), int(lost)


def well(broker: Broker) -> bool:
    """Whether the broker has a report of the guest's health."""
    with sqlite3.connect(broker.directory / "db") as db:
        rows = db.execute("SELECT * FROM health WHERE guest = ?", (VM,)).fetchall()
    db.close()
    return len(rows) == 1


ADMITTED = {
    "alice": ["admitted", "DataAnalyst", "analysts-by-day"],
    "olga": ["admitted", "Operator", "operators-on-call"],
    "ann": ["admitted", "Quoted", "anns"],
    "nobody": ["denied", "no_matching_policy"],
}
DECIDED = {
    "alice": ["granted", "DataAnalyst", "analysts-by-day"],
    "olga": ["granted", "Operator", "operators-on-call"],
    "ann": ["granted", "Quoted", "anns"],
}


def test_a_guest_of_0_1_0_and_this_broker(new_broker: Broker, old: Path) -> None:
    told = ask(new_broker, old)
    assert told["admitted"] == {**ADMITTED, "ann": ["admitted", None, None]}
    assert told["decided"] == DECIDED
    assert told["refused"][:2] == ["denied", "no_matching_policy"]
    assert told["unreadable"][:2] == ["denied", "invalid_persona"]  # the nearest that 0.1.0 knows
    assert "moon" in told["unreadable"][2]
    assert told["entries"]["ann"] == [["office", "invalid_persona"], ["anns", None], ["anns-rest", None]]
    assert len(told["whitelists"]["DataAnalyst"]) > 50
    assert told["current"]["s-alice"] == [["analysts-by-day", ["**"]], ["analysts-on-busy-host", ["**"]]]
    # what is kept from a policy's commands is not left to the next one
    assert told["current"]["s-ann"] == [
        ["anns", ["psql -c 'select *'", "ls", "!cat"]],
        ["anns-rest", ["**", "!cat"]],
    ]
    assert kept(new_broker) == (told["records"], 1)
    assert well(new_broker)
    assert "agent: 0.1.0" in new_broker.run("health", VM).stdout


def test_a_guest_of_this_version_and_a_broker_of_0_1_0(old_broker: Broker, old: Path) -> None:
    told = ask(old_broker, ROOT)
    assert told["admitted"] == ADMITTED
    assert told["decided"] == DECIDED
    assert told["refused"][:2] == ["denied", "no_matching_policy"]
    assert told["entries"]["ann"] == [["anns", None], ["anns-rest", None]]
    assert told["whitelists"]["Quoted"] == ["ls", "psql -c 'select *'"]
    assert told["current"]["s-olga"] == [["operators-on-call", ["**"]]]
    # what 0.1.0's broker could not keep, or cannot be told
    assert told["loader"][:2] == told["groups"][:2] == ["denied", "broker_misbehaved"]
    assert "too old to know what kind of program /usr/bin/ld.so is; upgrade it" in told["loader"][2]
    assert "takes at most 256 groups of a user" in told["groups"][2]
    assert kept(old_broker) == (told["records"], 1)
    assert well(old_broker)
    same = ask(old_broker, old)  # and its own guest goes on beside it
    assert {name: told[name] for name in same if name != "records"} == {n: same[n] for n in same if n != "records"}


def test_a_broker_of_this_version_goes_on_with_what_0_1_0_stored(tmp_path: Path, old: Path) -> None:
    before = broker(tmp_path, old)
    before.start(applied=())
    try:
        first = ask(before, old)
    finally:
        before.stop()
    after = Broker(tmp_path)
    assert after.run("check").returncode == 3  # it writes nothing
    assert after.run("migrate").returncode == 0
    assert after.run("check").returncode == 0
    after.start(applied=())
    try:
        second = ask(after, ROOT)
        assert kept(after) == (second["records"], 1)  # of 0.1.0 with itself one bad record took all others with it
        assert {name: second[name] for name in ("admitted", "decided", "current", "entries")} == {
            name: first[name] for name in ("admitted", "decided", "current", "entries")
        }
    finally:
        after.stop()


def test_an_agent_goes_on_while_its_broker_is_upgraded(tmp_path: Path, old: Path) -> None:
    before, after = broker(tmp_path, old), Broker(tmp_path)
    before.start(applied=())
    agent = Agent(tmp_path, VM)
    try:
        assert agent.admit("alice") == ADMITTED["alice"]
        assert agent.decide("alice", "ls") == DECIDED["alice"]
        assert "upgrade it" in str(agent.decide("alice", "ld.so", loader=True)[2])
        before.stop()
        after.start(applied=())
        deadline = time.monotonic() + 20
        while agent.decide("alice", "ls")[1] == "broker_unreachable" and time.monotonic() < deadline:
            time.sleep(0.1)
        assert agent.decide("alice", "ls") == DECIDED["alice"]
        # all know by now whom they ask: the session is the same, and so is its place
        assert "allows it only by its own name" in str(agent.decide("alice", "ld.so", loader=True)[2])
        assert agent.current("alice") == {"s-alice": [["analysts-by-day", ["**"]], ["analysts-on-busy-host", ["**"]]]}
    finally:
        agent.close()
        before.stop()
        after.stop()


def test_this_version_with_itself(new_broker: Broker) -> None:
    told = ask(new_broker, ROOT)
    assert told["admitted"] == {**ADMITTED, "ann": ["admitted", None, None]}
    assert told["decided"] == DECIDED
    assert told["unreadable"][:2] == ["denied", "invalid_policy"]
    assert told["loader"][:2] == ["denied", "no_matching_policy"]
    assert told["groups"] == DECIDED["alice"]
    assert "agent: 0.2.0" in new_broker.run("health", VM).stdout
    assert kept(new_broker) == (told["records"], 1)


def test_every_document_that_0_1_0s_agents_are_told_is_one_that_they_read(old: Path) -> None:
    chance = random.Random(13)  # noqa: S311 - the same documents each time
    words = ["*", "**", "ls", "-l", "/var/log/*", "'a b'", "--x=/y/**", '"*"', "\\*", "[a-z]", "'[x'", "..", "-h", "!"]
    programs = [
        "ls",
        "git",
        "**",
        "/usr/bin/git",
        "/bin/git",
        "/opt/*/x",
        "/opt/**/x",
        "'my prog'",
        "'g*'",
        "[",
        "@set",
    ]
    documents = []
    for _ in range(3000):
        whitelist = [
            chance.choice(["", "", "!"])
            + " ".join([chance.choice(programs), *chance.choices(words, k=chance.randrange(4))])
            for _ in range(chance.randrange(1, 6))
        ]
        try:
            persona = parse_document({"kind": "Persona", "name": "P", "command_whitelist": whitelist})
        except DocumentError:
            continue
        told = wire.persona_for(to_mapping(persona), wire.FIRST)
        if not isinstance(told, wire.Unsuited):
            documents.append(json.dumps(told))
    examples = [file for file in (ROOT / "examples").rglob("*.yaml") if "kind: Persona" in file.read_text()]
    for document in (document for file in some(examples) for document in yaml.safe_load_all(file.read_text())):
        persona = parse_document(document)
        if isinstance(persona, Persona):
            documents.append(json.dumps(wire.persona_for(to_mapping(persona), wire.FIRST)))
    assert len(documents) > 300
    command = [sys.executable, "-c", READ]
    read = subprocess.run(
        command, env=environment(old), input="\n".join(documents), capture_output=True, text=True, check=True
    )
    assert [line for line in read.stdout.splitlines() if line.strip()] == []


def test_both_versions_skip_what_is_new_in_an_event(old: Path) -> None:
    line = b'{"generation": 8, "why": "eclipse", "session": "s-1", "moon": {"phase": "new"}}\n'
    for root, package in ((old, "broker_client"), (ROOT, "broker")):
        parse = f"from persona_guest.{package}.events import _parse; event = _parse({line!r})"
        parse += "; print(event.generation, event.why, event.session)"
        done = subprocess.run([sys.executable, "-c", parse], env=environment(root), capture_output=True, text=True)
        assert done.stdout == "8 eclipse s-1\n", done.stderr


def test_the_archive_is_the_commit_where_the_history_is_known() -> None:
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    known = subprocess.run([*git, "cat-file", "-e", releases.COMMIT], capture_output=True).returncode == 0
    archive = [*git, "archive", releases.COMMIT, *releases.PATHS]
    expected = subprocess.run(archive, capture_output=True, check=True).stdout if known else None
    found = lzma.decompress(releases.ARCHIVE.read_bytes())
    assert found[:512].startswith(b"pax_global_header")
    assert releases.COMMIT.encode() in found[:2048]  # where git archive says what it was made of
    assert expected in (found, None)
