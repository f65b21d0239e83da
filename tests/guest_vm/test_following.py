"""Running processes follow: limits, freeze, kill and finish in a session that stays open."""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from persona_broker.store.sqlite import SqliteStore

from tests.guest_vm.bound import CGROUPS, DOCUMENTS, USER, apply, cgroup, persona, policy
from tests.guest_vm.login import Terminal
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker

COUNT = (
    "python3 -c 'import itertools, time\n"
    "for n in itertools.count():\n"
    '    open("/tmp/count", "w").write(str(n))\n'
    "    time.sleep(0.05)'"
)


def site(broker: Broker, on_revoke: str, *, rest: list[str] | None = None, pids: int = 77) -> None:
    """bob is at Work while the host is idle, and at Rest, without python3, while it is busy."""
    documents: list[dict[str, Any]] = [
        persona("Work", {"pids": pids, "memory": "300MiB"}, on_revoke=on_revoke),
        persona("Rest", {"pids": 33}, rest or ["cat", "sleep", "ls", "persona"]),
        policy("work", "Work", when={"host_load": {"cpu": {"below": 70, "again_below": 60}}}),
        policy("rest", "Rest"),
    ]
    apply(broker, *documents)


@pytest.fixture(autouse=True)
def _as_before(broker: Broker) -> Iterator[None]:
    yield
    broker.load(30)
    broker.documents(*DOCUMENTS)


def until(guest: Machine, command: str, timeout: float = 20) -> None:
    """Until root's command succeeds."""
    deadline = time.monotonic() + timeout
    while guest.root(command).code:
        assert time.monotonic() < deadline, command
        time.sleep(0.2)


def counted(guest: Machine) -> int:
    """How far the counting process is."""
    return int(guest.must("cat /tmp/count") or 0)


def test_what_the_next_persona_allows_moves_under_it(guest: Machine, broker: Broker) -> None:
    site(broker, "kill")
    with guest.session(USER) as session:
        pid = session.ask("sleep 100 >/dev/null 2>&1 & echo $!").strip()
        work = cgroup(session.ask("cat /proc/self/cgroup"))
        broker.load(90)
        until(guest, f"grep -q /Rest$ /proc/{pid}/cgroup")
        assert cgroup(session.ask("cat /proc/self/cgroup")) == work.replace("Work", "Rest")
        assert guest.root(f"test -e {CGROUPS}{work}").code == 1  # nothing is left there
        broker.load(30)
        until(guest, f"grep -q /Work$ /proc/{pid}/cgroup")
        session.ask(f"kill {pid}")


def test_a_new_version_changes_the_limits_of_what_runs(guest: Machine, broker: Broker) -> None:
    site(broker, "finish")
    with guest.session(USER) as session:
        here = cgroup(session.ask("cat /proc/self/cgroup"))
        assert guest.must(f"cat {CGROUPS}{here}/pids.max") == "77\n"
        site(broker, "finish", pids=55)
        until(guest, f"test $(cat {CGROUPS}{here}/pids.max) = 55")
        assert "processes  2 of 55" in session.ask("persona status")


def test_freeze_and_thaw(guest: Machine, broker: Broker) -> None:
    site(broker, "freeze")
    began = guest.moment()
    with guest.session(USER) as session:
        pid = session.ask(f"{COUNT} >/dev/null & echo $!").strip()
        work = CGROUPS + cgroup(session.ask("cat /proc/self/cgroup"))
        time.sleep(1)
        broker.load(90)
        apart = work.replace("Work", "-Work")
        until(guest, f"grep -q 'frozen 1' {apart}/cgroup.events")
        before = counted(guest)
        time.sleep(1)
        assert counted(guest) == before
        assert '"withdrawn": true' in session.ask("persona status --json")
        broker.load(30)
        until(guest, f"grep -q /Work$ /proc/{pid}/cgroup && ! test -e {apart}")
        time.sleep(1)
        assert counted(guest) > before
        session.ask(f"kill {pid}")
    time.sleep(2)
    assert ("frozen", "persona_withdrawn") in {(one["event"], one["reason"]) for one in broker.records(began)}


def test_the_user_is_told_of_a_freeze_and_of_its_end(guest: Machine, broker: Broker) -> None:
    site(broker, "freeze")
    with contextlib.closing(Terminal(guest.ssh_argv(USER, "-tt"))) as terminal:
        terminal.expect("$ ")
        guest.must("rm -f /tmp/count")
        terminal.type(f"{COUNT} &\n")
        until(guest, "test -s /tmp/count")
        broker.load(90)
        terminal.expect("persona: Work no longer applies: python3.11 frozen until it does again")
        broker.load(30)
        terminal.expect("persona: Work applies again; what was frozen goes on")
        terminal.type("kill %1\n")


def test_kill_asks_first_and_then_does(guest: Machine, broker: Broker) -> None:
    site(broker, "kill")
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(100)"
    with guest.session(USER) as session:
        polite = session.ask("python3 -c 'import time; time.sleep(100)' >/dev/null 2>&1 & echo $!").strip()
        deaf = session.ask(f"python3 -c '{stubborn}' >/dev/null 2>&1 & echo $!").strip()
        time.sleep(2)
        broker.load(90)
        until(guest, f"! test -e /proc/{polite}", 4)
        assert guest.root(f"test -e /proc/{deaf}").code == 0
        until(guest, f"! test -e /proc/{deaf}", 12)
        assert cgroup(session.ask("cat /proc/self/cgroup")).endswith("/Rest")  # the shell lives


def test_finish_goes_on_under_the_new_limits(guest: Machine, broker: Broker) -> None:
    site(broker, "finish")
    with guest.session(USER) as session:
        pid = session.ask(f"{COUNT} >/dev/null 2>&1 & echo $!").strip()
        time.sleep(2)
        broker.load(90)
        until(guest, f"grep -q /Rest$ /proc/{pid}/cgroup")
        before = counted(guest)
        time.sleep(1)
        assert counted(guest) > before
        assert "denied" in session.ask("python3 -c 1")
        session.ask(f"kill {pid}")


def test_a_session_that_nothing_is_for_keeps_a_shell_with_crumbs(guest: Machine, broker: Broker) -> None:
    when = {"host_load": {"cpu": {"below": 70, "again_below": 60}}}
    apply(broker, persona("Work", {"pids": 77}), policy("work", "Work", when=when))
    with guest.session(USER) as session:
        pid = session.ask("sleep 100 >/dev/null 2>&1 & echo $! $$").split()
        broker.load(90)
        until(guest, f"grep -q /_nobody$ /proc/{pid[1]}/cgroup")
        until(guest, f"grep -q /-Work$ /proc/{pid[0]}/cgroup")  # it may finish
        broker.load(30)
        until(guest, f"grep -q /Work$ /proc/{pid[1]}/cgroup")
        session.ask(f"kill {pid[0]}")


@pytest.mark.parametrize(("on_revoke", "words"), [("kill", []), ("finish", ["--end"])])
def test_a_revoked_session_ends_where_its_persona_or_the_operator_says_so(
    guest: Machine, broker: Broker, on_revoke: str, words: list[str]
) -> None:
    site(broker, on_revoke)
    with guest.session(USER) as session:
        shell = session.ask("echo $$").strip()
        ident = json.loads(session.ask("persona status --json"))["session"]
        broker.run("sessions", "revoke", ident, *words)
        until(guest, f"! test -e /proc/{shell}", 15)


def test_the_user_manager_follows(guest: Machine, broker: Broker) -> None:
    site(broker, "kill")
    with guest.session(USER) as session:
        unit = f"{CGROUPS}user.slice/user-1001.slice/user@1001.service/pids.max"
        until(guest, f"test $(cat {unit}) = 77")
        session.ask("systemd-run --user -q python3 -c 'import time; time.sleep(200)'")
        broker.load(90)
        until(guest, f"test $(cat {unit}) = 33")
        until(guest, f"! pgrep -u {USER} -f 'time.sleep.200'", 15)
        assert guest.root("systemctl is-active user@1001.service").out == "active\n"


def test_it_follows_within_a_second(guest: Machine, broker: Broker) -> None:
    """Shorter than the benchmark's 200 changes: ``follow.p99_s`` has the numbers."""
    site(broker, "finish")
    store = SqliteStore(broker.directory / "broker.db")
    seconds = []
    with guest.session(USER) as session:
        session.ask("exec 9<> <(:); ls /")  # the login is done; 9 is a pipe to wait at, which takes no CPU
        for _ in range(10):
            for load, name in ((82.0, "Rest"), (30.0, "Work")):
                session.write(f"until read -r at < /proc/$$/cgroup; [[ $at == */{name} ]]; do read -rt 0.01 -u 9; done")
                time.sleep(0.3)
                began = time.monotonic()
                store.put_set_load({"cpu": load})
                session.read()
                seconds.append(time.monotonic() - began)
    assert max(seconds) < 1.0, sorted(seconds)
