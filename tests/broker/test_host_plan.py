"""What ``persona-host plan`` says, from a database that has hosts, guests, sessions, documents and reports."""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from persona_broker import host_command
from persona_broker.host.core.readings import Domain, DomainState
from persona_broker.host.core.sample import HostSample
from persona_broker.store.interface import SessionRow
from persona_broker.store.sqlite import SqliteStore

from persona.decisions import Subject
from persona.documents import parse_document
from persona.health import Report, Space
from tests.broker.conftest import apply

GIB = 1 << 30
UUIDS = [f"00000000-0000-4000-8000-{number:012}" for number in range(4)]
DOCUMENTS: list[dict[str, Any]] = [
    {
        "kind": "Persona", "name": "Low", "command_whitelist": ["ls"], "priority": 20,
        "resource_limits": {"cpu": "50%", "memory": "2GiB"},
    },
    {
        "kind": "Persona", "name": "Lower", "command_whitelist": ["ls"], "priority": 10,
        "resource_limits": {"cpu": "150%"},
    },
    {"kind": "Persona", "name": "High", "command_whitelist": ["ls"], "priority": 80},
    {"kind": "Policy", "name": "a", "subjects": {"users": ["ann"]}, "persona": "Low"},
    {"kind": "Policy", "name": "b", "subjects": {"users": ["bob"]}, "persona": "High"},
    {"kind": "Policy", "name": "c", "subjects": {"users": ["cem"]}, "persona": "Low"},
    {"kind": "Policy", "name": "d", "subjects": {"users": ["cem"]}, "persona": "Lower"},
    {
        "kind": "Policy", "name": "e", "subjects": {"users": ["cem"]}, "persona": "High",
        "when": {"host_load": {"disk": {"below": 50}}},  # which is not known
    },
]  # fmt: skip


def domain(number: int, **figures: float) -> Domain:
    has = {"cpus": 4.0, "memory": 4.0 * GIB, "memory_max": 4.0 * GIB, **figures}
    return Domain(UUIDS[number], f"domain {number}", DomainState.RUNNING, has)


class Lab:
    def __init__(self, directory: Path) -> None:
        self.config = directory / "broker.toml"
        self.config.write_text(
            f'db = "{directory}/db"\n[host]\nuris = ["qemu:///a", "qemu:///b"]\nnames = ["a", "b"]\n'
        )
        self.store = SqliteStore(directory / "db")
        apply(self.store, [parse_document(document) for document in DOCUMENTS])
        for number in range(3):
            self.store.add_guest(f"vm-{number}")
            self.store.bind(f"vm-{number}", UUIDS[number])
            report = Report(memory=Space(4 * GIB, 3 * GIB))
            self.store.put_report(f"vm-{number}", report, (), time.time())

    def sees(self, *domains: Domain, cpu: float = 20, memory: float = 20, at: float | None = None) -> None:
        at = time.time() if at is None else at
        capacity = {"memory": 64.0 * GIB, "memory_free": 32.0 * GIB}
        load = {"cpu": cpu, "memory": memory}
        sample = HostSample("a", "qemu:///a", at, load, at, domains, "", capacity)
        self.store.put_hosts([(sample, frozenset())])

    def opens(self, vm: str, *users: str) -> None:
        for user in users:
            row = SessionRow(f"s-{vm}-{user}", vm, Subject(user, (), vm), "sshd", "", time.time(), False)
            assert self.store.open_session(row)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    with closing(lab.store):
        yield lab


def planned(lab: Lab, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and what ``a`` has."""
    code = host_command.main(["--config", str(lab.config), "plan", "--json", *words])
    return code, json.loads(capsys.readouterr().out)["items"][0]


def test_limits_of_live_sessions_cap_a_vm_that_nobody_contends_with(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.opens("vm-0", "ann", "cem")
    lab.opens("vm-1", "bob")
    lab.sees(domain(0), domain(1), domain(2), domain(3))
    code, host = planned(lab, capsys, "a")
    assert (code, host["host"], host["is_seen"]) == (0, "a", True)
    everything = {"weight": 100, "cpus": None, "memory": 4 * GIB}
    by_name = {row.pop("vm"): row for row in host["vms"]}
    assert [*by_name] == ["vm-1", "vm-0", "vm-2", UUIDS[3]]
    assert by_name["vm-1"] == {
        "sessions": 1, "priority": 80, "class": 1, "now": everything, "target": everything,
        "why": "personas", "detail": "",
    }  # fmt: skip
    # ann has half a core and 2 GiB; cem may use a core and a half, and one persona without a limit of memory
    assert by_name["vm-0"]["target"] == {"weight": 100, "cpus": 2.2, "memory": 4 * GIB}
    assert (by_name["vm-0"]["sessions"], by_name["vm-0"]["priority"]) == (2, 20)
    assert (by_name["vm-2"]["why"], by_name["vm-2"]["target"]) == ("no_sessions", everything)
    stranger = by_name[UUIDS[3]]
    assert (stranger["why"], stranger["detail"], stranger["target"]) == ("left_alone", "no guest is bound to it", None)


def test_contention_shows_who_would_gain_and_who_would_give(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.opens("vm-0", "ann")
    lab.opens("vm-1", "bob")
    lab.sees(domain(0), domain(1), cpu=99, memory=95)
    _, host = planned(lab, capsys, "a")
    high, low = host["vms"]
    assert (high["vm"], high["target"], high["why"]) == (
        "vm-1", {"weight": 400, "cpus": None, "memory": 4 * GIB}, "contention",
    )  # fmt: skip
    assert (low["vm"], low["target"], low["why"]) == (
        "vm-0", {"weight": 100, "cpus": 0.7, "memory": 2 * GIB}, "contention",
    )  # fmt: skip


def test_what_is_not_known_of_a_vm_is_not_planned(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.opens("vm-0", "ann")
    lab.store.revoke("s-vm-0-ann")
    lab.opens("vm-2", "nobody in particular")
    no_balloon = Domain(UUIDS[1], "one", DomainState.RUNNING, {"cpus": 4.0})
    off = Domain(UUIDS[2], "two", DomainState.SHUT_OFF)
    lab.sees(domain(0, memory=3.0 * GIB), no_balloon, off)
    _, host = planned(lab, capsys, "a")
    assert [(row["vm"], row["why"], row["sessions"]) for row in host["vms"]] == [
        ("vm-1", "unknown", 0), ("vm-0", "no_sessions", 0),
    ]  # fmt: skip
    assert (host["vms"][1]["now"]["memory"], host["vms"][1]["target"]["memory"]) == (3 * GIB, 4 * GIB)


@pytest.mark.parametrize("age_s", [None, 60.0])
def test_a_host_that_is_not_seen_has_no_plan(lab: Lab, capsys: pytest.CaptureFixture[str], age_s: float | None) -> None:
    if age_s is not None:
        lab.sees(domain(0), at=time.time() - age_s)
    assert planned(lab, capsys) == (1, {"host": "a", "is_seen": False, "vms": []})
    assert host_command.main(["--config", str(lab.config), "plan"]) == 1
    hosts = [line.partition(": the broker does not see it")[0] for line in capsys.readouterr().out.splitlines()]
    assert hosts == ["a", "b"]


def test_people_read_a_table(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.opens("vm-0", "ann")
    lab.sees(domain(0), domain(3))
    assert host_command.main(["--config", str(lab.config), "plan", "a"]) == 0
    head, names, first, second = capsys.readouterr().out.splitlines()
    assert (head, names.split()[:3]) == ("a: 2 running VMs", ["VM", "SESSIONS", "PRIORITY"])
    assert first.split(maxsplit=3)[:3] == ["vm-0", "1", "20"]
    assert "weight 100, 4 of 4 cores, 4 GiB" in first
    assert "weight 100, 0.7 of 4 cores, 2.25 GiB" in first
    assert first.endswith("personas")
    assert second.endswith("left_alone: no guest is bound to it")


def test_a_host_that_is_not_in_the_settings_is_refused(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert host_command.main(["--config", str(lab.config), "plan", "c"]) == 1
    assert "'c' is not in host.names; those are a, b" in capsys.readouterr().err


def test_a_database_that_cannot_be_used_is_an_answer(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    with lab.store.writing() as db:
        db.execute("PRAGMA user_version = 99")
    assert host_command.main(["--config", str(lab.config), "plan", "--json"]) == 3
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["code"]) == (False, "not_ready")
    assert "schema version 99" in said["message"]


@pytest.mark.parametrize("most", [0.0, 0.5])
def test_a_memory_of_nothing_is_not_known(lab: Lab, capsys: pytest.CaptureFixture[str], most: float) -> None:
    lab.sees(domain(0, memory_max=most))
    assert [row["why"] for row in planned(lab, capsys, "a")[1]["vms"]] == ["unknown"]


def test_without_a_database_it_says_so(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.config.write_text('db = "/nonexistent/db"\n')
    assert host_command.main(["--config", str(lab.config), "plan"]) == 3
    assert "there is no database /nonexistent/db" in capsys.readouterr().err
