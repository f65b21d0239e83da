"""Which guest is which domain, by an operator's word alone, and what has no other half."""

import json
import time
from contextlib import closing
from pathlib import Path

import pytest
from persona_broker.coverage import Ages, Gap, Lack, gaps
from persona_broker.host.core.readings import Domain, DomainState
from persona_broker.host.core.sample import HostSample
from persona_broker.policy.conditions import Sample
from persona_broker.policy.host_load import HostState
from persona_broker.policy.vm_health import Reported
from persona_broker.store.hosts import SeenHost
from persona_broker.store.sqlite import SqliteStore

from persona.health import Report
from tests.broker.conftest import Broker

NOW = 1000.0
U1, U2, U3 = (f"0000000{number}-0000-4000-8000-000000000000" for number in (1, 2, 3))
ON, OFF, PAUSED = DomainState.RUNNING, DomainState.SHUT_OFF, DomainState.PAUSED


def seen(name: str, *domains: Domain, at: float = NOW, domains_at: float | None = NOW, problem: str = "") -> SeenHost:
    sample = HostSample(name, "qemu:///system", at, {}, domains_at, domains, problem)
    runs = {domain.uuid: domain.state is not OFF for domain in domains}
    return SeenHost(sample, HostState(name, Sample(at, {}, name), frozenset(), domains_at, runs))


def found(
    hosts: list[SeenHost], bindings: dict[str, str], reports: dict[str, Reported], watched: tuple[str, ...] = ()
) -> list[Gap]:
    return gaps({host.sample.host: host for host in hosts}, bindings, ("vm-1",), reports, watched, Ages(NOW, 15, 45))


def heard(at: float = NOW, uuid: str = "", **layers: bool) -> dict[str, Reported]:
    return {"vm-1": Reported(at, Report(layers=layers, uuid=uuid), frozenset())}


BOUND, HEARD = {"vm-1": U1}, heard()


@pytest.mark.parametrize(
    ("hosts", "bindings", "reports", "lacks"),
    [
        ([seen("a", Domain(U1, "one", ON))], BOUND, HEARD, []),
        ([], {}, HEARD, []),  # nobody watches hosts: nothing is missing
        ([seen("a", Domain(U1, "one", ON))], {}, HEARD, [Lack.DOMAIN_WITHOUT_AGENT, Lack.AGENT_WITHOUT_DOMAIN]),
        ([seen("a", Domain(U1, "one", ON), Domain(U2, "two", OFF))], BOUND, HEARD, []),  # it does not run
        ([seen("a")], BOUND, HEARD, [Lack.DOMAIN_NOT_SEEN]),
        ([seen("a", Domain(U1, "one", ON))], BOUND, {}, [Lack.AGENT_SILENT]),
        ([seen("a", Domain(U1, "one", ON))], BOUND, heard(NOW - 46), [Lack.AGENT_SILENT]),
        ([seen("a", Domain(U1, "one", ON))], BOUND, heard(NOW - 46, U2, bpf=False), [Lack.AGENT_SILENT]),  # as it was
        ([seen("a", Domain(U1, "one", ON))], BOUND, heard(NOW, U1, seccomp=True), []),
        ([seen("a", Domain(U1, "one", ON))], BOUND, heard(NOW, U2), [Lack.UUID_DISAGREES]),
        ([], {}, heard(NOW, U2), []),  # it is bound to none
        ([], {}, heard(seccomp=True, bpf=False, verify=False), [Lack.LAYERS_OFF]),
        ([seen("a", Domain(U1, "one", OFF))], BOUND, heard(NOW - 46), []),  # no wonder
        ([seen("a", Domain(U1, "one", ON, {}, "hangs"))], BOUND, HEARD, [Lack.DOMAIN_UNKNOWN]),
        (
            [seen("a", Domain(U1, "one", ON)), seen("b", Domain(U1, "one", ON))], BOUND, HEARD,
            [Lack.DOMAIN_ON_SEVERAL_HOSTS],
        ),
        ([seen("a", Domain(U1, "one", ON)), seen("b", Domain(U1, "one", OFF))], BOUND, HEARD, []),  # it moved
        (
            [seen("a", Domain(U1, "one", ON)), seen("b", Domain(U1, "one", PAUSED))], BOUND, HEARD,  # or half
            [Lack.DOMAIN_ON_SEVERAL_HOSTS],
        ),
        ([seen("a", Domain(U1, "one", PAUSED))], BOUND, heard(NOW - 46), [Lack.AGENT_SILENT]),
        ([seen("a", Domain(U1, "one", ON), at=NOW - 16, domains_at=NOW - 16)], BOUND, HEARD,
         [Lack.HOST_NOT_SEEN, Lack.DOMAIN_NOT_SEEN]),
        ([seen("a", Domain(U1, "one", ON), domains_at=None)], BOUND, HEARD, [Lack.HOST_NOT_SEEN, Lack.DOMAIN_NOT_SEEN]),
    ],
)  # fmt: skip
def test_each_gap_is_found_and_no_other(
    hosts: list[SeenHost], bindings: dict[str, str], reports: dict[str, Reported], lacks: list[Lack]
) -> None:
    assert [gap.lack for gap in found(hosts, bindings, reports)] == lacks


def test_a_host_that_is_to_be_watched_and_has_no_sample_is_missing() -> None:
    (gap,) = found([seen("a", Domain(U1, "one", ON))], BOUND, HEARD, ("a", "b"))
    assert (gap.lack, gap.host, gap.detail) == (Lack.HOST_NOT_SEEN, "b", "it has no sample")


def test_a_gap_says_what_it_is() -> None:
    layers, other = found([], BOUND, heard(NOW, U2, verify=False, seccomp=True, bpf=False))[1:]
    assert (layers.vm, layers.detail) == ("vm-1", "not active: bpf, verify")
    assert (other.uuid, other.detail) == (U1, f"its agent says that its domain is {U2}")


@pytest.fixture
def lab(cli: Broker, tmp_path: Path) -> Broker:
    """Two guests, and a host that has three domains."""
    with closing(SqliteStore(tmp_path / "db")) as store:
        store.add_guest("vm-1")
        store.add_guest("vm-2")
        domains = (Domain(U2, "two", OFF), Domain(U1, "one", ON), Domain(U3, "th\x1bree", ON))
        at = time.time()
        store.put_hosts([(HostSample("lab-1", "qemu:///system", at, {"cpu": 5.0}, at, domains), frozenset())])
    return cli


def test_an_operator_binds_a_guest_and_takes_it_back(lab: Broker) -> None:
    done = lab.run("guest", "bind", "vm-1", "--uuid", U1.upper())
    assert (done.returncode, done.stdout) == (0, "vm-1 is domain one on lab-1\n")
    assert lab.run("guest", "list").stdout == f"vm-1  domain {U1} on lab-1\nvm-2\n"
    first, second = json.loads(lab.run("guest", "list", "--json").stdout)["items"]
    assert (first["uuid"], first["host"], second["uuid"], second["host"]) == (U1, "lab-1", None, None)
    assert lab.run("guest", "unbind", "vm-1").stdout == "vm-1 is bound to no domain any more\n"
    assert lab.run("guest", "list").stdout == "vm-1\nvm-2\n"


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("vm-1", "--uuid", "one"), 1, "'one' is not a UUID: expected one as 'virsh domuuid NAME'"),
        (("vm-9", "--uuid", U1), 1, "there is no guest 'vm-9'"),
        (
            ("vm-1", "--uuid", U1[::-1].replace("0", "a", 1)),
            1,
            f"not bound yet: {U3} ('th\\x1bree' on lab-1, running), {U2} (two on lab-1, shut_off)",
        ),
        (("vm-1", "--uuid", U1), 1, f"guest vm-2 is bound to domain {U1} already; 'persona-broker guest unbind vm-2'"),
    ],
)
def test_what_cannot_be_bound_is_refused_and_what_could_be_is_offered(
    lab: Broker, words: tuple[str, ...], code: int, why: str
) -> None:
    assert lab.run("guest", "bind", "vm-2", "--uuid", U1).returncode == 0
    done = lab.run("guest", "bind", *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert why.replace("'th\\x1bree'", _shown("th\x1bree")) in done.stderr
    assert lab.run("guest", "unbind", "vm-1").returncode == 1


def _shown(text: str) -> str:
    from persona.shown import line

    return line(text)


def test_without_a_poller_nothing_is_bound(cli: Broker) -> None:
    assert cli.run("guest", "add", "vm-1").returncode == 0
    done = cli.run("guest", "bind", "vm-1", "--uuid", U1)
    assert (done.returncode, "is persona-host running?" in done.stderr) == (1, True)


def test_coverage_is_one_list(lab: Broker) -> None:
    assert lab.run("guest", "bind", "vm-1", "--uuid", U1).returncode == 0
    done = lab.run("coverage")
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "domain_without_agent", "agent_silent", "agent_without_domain", "agent_silent"
    ]  # fmt: skip
    items = json.loads(lab.run("coverage", "--json").stdout)["items"]
    assert items[0] == {
        "lack": "domain_without_agent", "vm": None, "host": "lab-1", "uuid": U3,
        "detail": "domain th\x1bree runs, and no guest is bound to it",
    }  # fmt: skip


def test_coverage_of_nothing_lacks_nothing(cli: Broker, tmp_path: Path) -> None:
    SqliteStore(tmp_path / "db").close()
    done = cli.run("coverage")
    assert (done.returncode, done.stdout) == (0, "nothing is missing\n")


def test_explain_goes_by_the_guest_s_host(lab: Broker, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "{kind: Persona, name: A, command_whitelist: [ls]}\n---\n"
        "{kind: Policy, name: a, subjects: {users: [u]}, persona: A, when: {host_load: {cpu: {below: 70}}}}\n"
    )
    assert lab.run("apply", str(tmp_path / "a.yaml")).returncode == 0
    words = ("explain", "--user", "u", "--vm", "vm-1")
    assert "load is not known" in lab.run(*words, "--", "ls").stdout  # no broker has measured its own
    assert lab.run("guest", "bind", "vm-1", "--uuid", U1).returncode == 0
    assert lab.run(*words, "--", "ls").stdout.startswith("granted under A")
    assert "CPU load is 80 %" in lab.run(*words, "--load", "cpu=80", "--", "ls").stdout
