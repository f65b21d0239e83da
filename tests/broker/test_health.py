"""VM health: judged by VM, kept with hysteresis, told to nobody but its own guest, and never good when unknown."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from persona_broker.condition_watcher import Watcher
from persona_broker.host.load import SetSource
from persona_broker.policy.conditions import ConditionInputs, look
from persona_broker.policy.vm_health import HealthJudge, Reported, bounds_of, past_bounds
from persona_broker.store.health import EVERY_S, Reports
from persona_broker.store.sqlite import SqliteStore
from persona_broker.view import State

from persona.decisions import Denied, Granted
from persona.documents import parse_document
from persona.health import Bound, Report, Space, encode_report
from persona.problems import PersonaError, Reason
from tests.broker.conftest import TOKEN, Broker, apply
from tests.broker.test_snapshot import ask, persona, policy, snapshot

GOOD = Report(
    disks={"/": Space(100, 50), "/srv": Space(100, 40)},
    memory=Space(2 << 30, 1 << 30),
    pressure={"cpu": 5.0, "memory": 0.0, "io": 1.0},
    load=0.5,
    failed_units=(),
    errors=0,
    clock_skew_s=0.4,
    layers={"seccomp": True, "bpf": False},
)


def decided(report: Report | None, age: float = 0, vm: str = "vm-1", **asked: Any) -> Granted | Denied:
    found = snapshot(persona("A", "ls"), policy("a", "A", when={"vm_health": asked}, vms=["vm-*"]))
    reports = {} if report is None else {"vm-1": Reported(1000 - age, report, frozenset())}
    unhealthy = HealthJudge(45).look(found.vm_conditions, reports, 1000)
    condition_state = look(found.conditions, ConditionInputs(None, frozenset(), 1000, 15), 1, unhealthy)
    return found.decide(ask("ls", vm=vm), condition_state)


@pytest.mark.parametrize(
    ("asked", "change", "detail"),
    [
        ({"disk_free_above": "10%"}, {"disks": {"/": Space(100, 50), "/srv": Space(100, 9)}}, "/srv has 9 % free"),
        ({"disk_free_above": "10%"}, {"disks": {"/": Space(100, 10)}}, "above 10 %, again above 11 %"),
        ({"disk_free_above": "2MiB"}, {}, "/srv has 40 B free, the policy holds above 2 MiB"),
        ({"disk_free_above": "1%"}, {"disks": {}}, "its disk free is not known"),
        ({"disk_free_above": "1%"}, {"disks": {"/": Space(0, 0)}}, "/ has 0 % free"),
        ({"memory_available_above": "1.5GiB"}, {}, "memory has 1 GiB available"),
        ({"memory_available_above": "60%"}, {}, "memory has 50 % available"),
        ({"pressure_below": {"io": 1}}, {}, "pressure on io is 1 %"),
        ({"pressure_below": {"io": 5}}, {"pressure": {}}, "its pressure on io is not known"),
        ({"load_below": 0.5}, {}, "its load is 0.5 a CPU"),
        ({"failed_units_below": 1}, {"failed_units": ("x.service",)}, "1 units failed (x.service)"),
        ({"failed_units_below": 1}, {"failed_units": None}, "its failed units is not known"),
        ({"errors_below": 30}, {"errors": 30}, "30 errors a minute, the policy holds below 30, again below 27"),
        ({"clock_skew_below": 5}, {"clock_skew_s": -7.0}, "its clock is 7 s behind, the policy holds below 5 s"),
        ({"layers": ["seccomp", "bpf"]}, {}, "layer bpf of its gate is not active"),
        ({"layers": ["verify"]}, {}, "layer verify of its gate is not active"),
    ],
)
def test_each_figure(asked: dict[str, Any], change: dict[str, Any], detail: str) -> None:
    refused = decided(replace(GOOD, **change), **asked)
    assert isinstance(refused, Denied)
    assert (refused.reason, refused.policy, refused.persona) == (Reason.VM_UNHEALTHY, "a", "A")
    assert detail in refused.help


WHOLE: dict[str, Any] = {
    "disk_free_above": "39%", "memory_available_above": "1000MiB", "pressure_below": {"cpu": 60, "memory": 1},
    "load_below": 0.6, "failed_units_below": 1, "errors_below": 1, "clock_skew_below": 1, "layers": ["seccomp"],
}  # fmt: skip


def test_healthy() -> None:
    assert isinstance(decided(GOOD, **WHOLE), Granted)


@pytest.mark.parametrize("age", [46, 4000, -60])
def test_an_old_report_is_unknown_and_so_is_one_from_the_future(age: float) -> None:
    assert isinstance(decided(GOOD, 44, **WHOLE), Granted)
    refused = decided(GOOD, age, **WHOLE)
    assert isinstance(refused, Denied) and refused.reason is Reason.VM_UNHEALTHY
    assert "last reported more than 45 s ago" in refused.help


def test_no_report_is_unknown_and_another_vm_s_says_nothing() -> None:
    for refused in (decided(None, **WHOLE), decided(GOOD, vm="vm-2", **WHOLE)):
        assert isinstance(refused, Denied) and refused.reason is Reason.VM_UNHEALTHY
        assert "has not reported" in refused.help


def test_it_does_not_flap() -> None:
    bound, past, states = Bound("disk_free", 10, percent=True), frozenset[Bound](), []
    for free in (12, 11, 10, 11, 12, 11, 9, 10.9, 11.1):
        past = past_bounds({bound}, replace(GOOD, disks={"/": Space(1000, int(free * 10))}), past)
        states.append(bool(past))
    assert states == [False, False, True, True, False, False, True, True, False]
    for number in (90, 50):
        assert number < Bound("disk_free", number, percent=True).again < 100


def test_of_many_vms_only_what_changed_is_judged_again() -> None:
    found = snapshot(persona("A", "ls"), policy("a", "A", when={"vm_health": WHOLE}, vms=["vm-*"]))
    ward = HealthJudge(45)
    reports = {name: Reported(1000, GOOD, frozenset()) for name in ("vm-1", "vm-2", "other")}
    first = ward.look(found.vm_conditions, reports, 1000)
    reports["vm-2"] = Reported(1001, replace(GOOD, errors=9), frozenset())
    second = ward.look(found.vm_conditions, reports, 1001)
    assert set(first) == {"vm-1", "vm-2"}  # nothing is asked of the other
    assert second["vm-1"] is first["vm-1"]
    assert second["vm-2"] and not first["vm-2"]


# --- the database, the watcher and the workers ---------------------------------------------------------


def site(path: Path, **asked: Any) -> SqliteStore:
    store = SqliteStore(path)
    store.add_guest("vm-1")
    apply(
        store,
        [parse_document(persona("A", "ls")), parse_document(policy("a", "A", when={"vm_health": asked or WHOLE}))],
    )
    return store


def test_the_record_keeps_what_is_past(tmp_path: Path) -> None:
    store = site(tmp_path / "db", disk_free_above="10%")
    bounds = bounds_of(store.snapshot().vm_conditions)
    reports, other = Reports(store), Reports(SqliteStore(tmp_path / "db"))
    states = []
    for second, free in enumerate((20, 9, 10.5, 12)):
        store.put_report("vm-1", replace(GOOD, disks={"/": Space(1000, int(free * 10))}), bounds, 1000 + second)
        states.append(bool(reports.look(["vm-1"])["vm-1"].past))
    assert states == [False, True, True, False]
    assert other.look(["vm-1"])["vm-1"].at == 1003
    assert other.look(["vm-1"]) is other.look(["vm-1"])
    store.remove_guest("vm-1")
    assert other.look([]) == {} == Reports(store).look(["vm-1"])


def test_a_guest_cannot_report_all_the_time(tmp_path: Path) -> None:
    store = site(tmp_path / "db")
    store.put_report("vm-1", GOOD, (), 1000)
    with pytest.raises(PersonaError, match="at most one report"):
        store.put_report("vm-1", GOOD, (), 1000.1)
    store.put_report("vm-1", GOOD, (), 1000.6)


def test_a_report_of_another_version_is_none(tmp_path: Path) -> None:
    store = site(tmp_path / "db")
    store.put_report("vm-1", GOOD, (), 1000)
    with store.writing() as db:
        db.execute("""UPDATE health SET report = '{"mood": "fine"}'""")
    assert Reports(store).look(["vm-1"]) == {}
    store.close()


def test_crossings_raise_the_generation_and_only_they(tmp_path: Path) -> None:
    store = site(tmp_path / "db", errors_below=30)
    bounds = bounds_of(store.snapshot().vm_conditions)
    operator, watcher = SqliteStore(tmp_path / "db"), Watcher(store, SetSource(store.set_load), 15)
    watcher.look()
    steps, now = [], time.time()
    for index, errors in enumerate((0, 0, 29, 30, 31, 28, 26, 26)):
        before = watcher.generation
        operator.put_report("vm-1", replace(GOOD, errors=errors), bounds, now - 10 + index)
        watcher.look()
        steps.append(watcher.generation - before)
    assert steps == [1, 0, 0, 1, 0, 0, 1, 0]


def test_a_report_grows_old(tmp_path: Path) -> None:
    store = site(tmp_path / "db")
    writer, watcher = SqliteStore(tmp_path / "db"), Watcher(store, SetSource(store.set_load), 15, health_max_age_s=1)
    state = State(SqliteStore(tmp_path / "db"), 15, health_max_age_s=1)
    writer.put_report("vm-1", GOOD, (), time.time())
    watcher.look()
    before, view = watcher.generation, state.current()
    assert isinstance(view.snapshot.decide(ask("ls"), view.condition_state), Granted)
    time.sleep(2.1)
    watcher.look()
    assert watcher.generation == before + 1
    view = state.current(watcher.generation)
    assert isinstance(view.snapshot.decide(ask("ls"), view.condition_state), Denied)


# --- over HTTP --------------------------------------------------------------------------------------


@pytest.fixture
def asking(broker: Broker, tmp_path: Path) -> None:
    """The broker asks health of the VM."""
    documents = json.dumps(persona("A", "ls")), json.dumps(policy("a", "A", when={"vm_health": {"errors_below": 30}}))
    (tmp_path / "x.yaml").write_text("\n---\n".join(documents))
    assert broker.run("apply", "--prune", "--yes", str(tmp_path / "x.yaml")).returncode == 0


@pytest.mark.usefixtures("asking")
def test_a_report_changes_decisions(broker: Broker, ask: Callable[..., tuple[int, Any]]) -> None:
    assert "has not reported" in ask("ls")[1]["help"]
    assert broker.run("health").stdout == "analytics-1: has not reported\n"
    assert broker.call("POST", "/v1/health", encode_report(GOOD)) == (204, b"")
    assert broker.call("POST", "/v1/health", encode_report(GOOD))[0] == 503  # at once again
    assert ask("ls")[1]["decision"] == "granted"
    shown = broker.run("health")
    assert (shown.returncode, "disk /: 50 B of 100 B free (50 %)" in shown.stdout) == (0, True)
    time.sleep(EVERY_S)
    assert broker.call("POST", "/v1/health", encode_report(replace(GOOD, errors=50)))[0] == 204
    deadline = time.monotonic() + 5
    while (refused := ask("ls", explain=True)[1])["decision"] == "granted" and time.monotonic() < deadline:
        time.sleep(0.01)  # a worker looks every 2 ms whether the database has moved on
    assert refused["reason"] == "vm_unhealthy"
    assert "50 errors a minute" in refused["help"]
    shown = broker.run("health", "analytics-1")
    assert (shown.returncode, "! the VM is not healthy: its journal has 50" in shown.stdout) == (1, True)
    text = broker.call("GET", "/metrics")[1].decode()
    assert 'persona_broker_vm_conditions_unmet{vm="analytics-1"} 1\n' in text
    assert 'persona_broker_health_report_age_seconds{vm="analytics-1"}' in text
    assert 'persona_broker_vm_layer_active{vm="analytics-1",layer="bpf"} 0\n' in text
    denied = broker.run("explain", "--user", "alice", "--vm", "analytics-1", "--", "ls")
    assert denied.stdout.startswith(
        "denied, vm_unhealthy, policy a (x.yaml:3): the VM is not healthy: its journal has 50"
    )
    what_if = broker.run("explain", "--user", "alice", "--vm", "analytics-1", "--health", "errors=3", "--", "ls")
    assert what_if.stdout.startswith("granted under A")


def test_who_is_no_guest_reports_nothing(broker: Broker) -> None:
    assert broker.call("POST", "/v1/health", encode_report(GOOD), token="no" + TOKEN)[0] == 401
    for body in (b"x", {}, {**encode_report(GOOD), "errors": "no"}):
        assert broker.call("POST", "/v1/health", body)[0] == 400


@pytest.mark.parametrize(
    "figures",
    [
        "",
        "disk_free",
        "disk_free=x",
        "disk_free=inf%",
        "pressure.gpu=1",
        "layers=magic",
        "errors=nan",
        "load=nan",
        "x=1",
    ],
)
def test_what_if_figures_that_are_refused(broker: Broker, figures: str) -> None:
    done = broker.run("explain", "--user", "a", "--vm", "v", "--health", figures, "--", "ls")
    assert done.returncode == 2
    assert "--health" in done.stderr
