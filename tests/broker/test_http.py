"""The HTTP interface of a real broker: what it answers, and to whom, whatever is thrown at it."""

import json
import re
import select
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

from persona_broker import metrics

from persona import wire
from tests.broker.conftest import ROOT, TOKEN, VM, Broker, UnixHttp, environment

Ask = Callable[..., tuple[int, Any]]


def test_granted_and_denied(ask: Ask) -> None:
    status, granted = ask("ls", "-l")
    assert status == 200
    assert granted["decision"] == "granted"
    assert granted["persona"] == {"name": "DataAnalyst", "version": 1}
    status, denied = ask("nmap")
    assert (status, denied["decision"], denied["reason"]) == (200, "denied", "no_matching_policy")
    assert denied["policy"] == "analysts-by-day"


def test_a_guest_may_ask_only_about_itself(broker: Broker, ask: Ask) -> None:
    status, problem = ask("ls", vm="other")
    assert (status, problem["code"]) == (403, "not_your_vm")
    session = {
        "session": "s-x",
        "subject": {"user": "alice", "groups": [], "vm": "other"},
        "service": "sshd",
        "remote": "",
    }
    assert broker.call("POST", "/v1/sessions", session)[0] == 403
    broker.run("guest", "add", "second", "--token-file", str(broker.directory / "second"))
    second = (broker.directory / "second").read_text().strip()
    mine = {**session, "session": "s-mine", "subject": {"user": "alice", "groups": [], "vm": VM}}
    assert broker.call("POST", "/v1/sessions", mine)[0] == 201
    assert broker.call("GET", "/v1/sessions/s-mine/personas", token=second)[0] == 404
    assert broker.call("DELETE", "/v1/sessions/s-mine", token=second)[0] == 404
    theirs = {**mine, "subject": {"user": "alice", "groups": [], "vm": "second"}}
    assert broker.call("POST", "/v1/sessions", theirs, token=second)[0] == 200  # not admitted there: no such VM
    status, answer = broker.call("GET", "/v1/sessions/s-mine/personas")
    assert status == 200
    assert [entry["policy"] for entry in answer["entries"]] == ["analysts-by-day", "analysts-on-busy-host"]
    assert broker.call("DELETE", "/v1/sessions/s-mine")[0] == 204


def test_tokens(broker: Broker) -> None:
    for token in ("", "wrong", TOKEN + "x"):
        status, problem = broker.call("GET", "/v1/personas", token=token)
        assert (status, problem["code"]) == (401, "unauthenticated")
    assert broker.call("GET", "/v1/personas")[0] == 200
    for path in ("/healthz", "/readyz", "/metrics", "/v1/schema"):
        assert broker.call("GET", path, token="")[0] == 200


def test_bodies_that_are_refused(broker: Broker, ask: Ask) -> None:
    for body, status in (
        (b"", 400),
        (b"not json", 400),
        (b"[" * 100_000, 400),
        (b'{"request": {}}', 400),
        (json.dumps({"request": None, "x": 1}).encode(), 400),
        (b" " * 300_000, 413),
    ):
        found, problem = broker.call("POST", "/v1/decisions", body)
        assert found == status, body[:40]
        assert problem["status"] == status
        assert problem["code"] in ("bad_request", "too_large")
    assert broker.call("GET", "/v1/decisions")[0] == 405
    assert broker.call("GET", "/v1/nothing")[0] == 404
    assert ask("ls", min_generation=10**9)[0] == 503
    assert ask("ls")[0] == 200


def test_documents(broker: Broker) -> None:
    status, answer = broker.call("GET", "/v1/personas/DataAnalyst")
    assert status == 200
    assert answer["document"]["name"] == "DataAnalyst"
    assert broker.call("GET", f"/v1/personas/DataAnalyst/versions/{answer['version']}")[1] == answer
    assert broker.call("GET", "/v1/personas/Nobody")[0] == 404
    assert len(broker.call("GET", "/v1/policies")[1]["items"]) == 4


def test_changes_are_pushed_at_once_and_decided_at_once(broker: Broker, ask: Ask) -> None:
    connection, response = broker.stream()
    try:
        hello = json.loads(response.readline())
        assert hello["why"] == "hello"
        for cpu, decision in ((82, "denied"), (65, "denied"), (40, "granted")):
            broker.run("load", "set", f"cpu={cpu}")
            if cpu != 65:  # between the two thresholds nothing changes
                event = json.loads(response.readline())
                assert event["generation"] > hello["generation"]
            assert ask("git", min_generation=hello["generation"])[1]["decision"] == decision
    finally:
        connection.close()


def test_apply_under_load_never_answers_wrongly(broker: Broker, ask: Ask) -> None:
    stop = threading.Event()
    wrong: list[Any] = []

    def loop() -> None:
        while not stop.is_set():
            status, answer = ask("ls")
            if status != 200 or answer["decision"] != "granted":
                wrong.append(answer)

    threads = [threading.Thread(target=loop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        assert broker.run("apply", str(ROOT / "examples")).returncode == 0
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_records(broker: Broker) -> None:
    record = {
        "at": 1.5, "session": "s", "user": "alice", "program": "/usr/bin/ls", "argv": ["ls"], "decision": "granted",
        "reason": None, "persona": "DataAnalyst", "persona_version": 1, "policy": "p", "policy_version": 2,
        "event": "exec", "leased": True, "complain": False,
    }  # fmt: skip
    assert broker.call("POST", "/v1/records", {"records": [record], "lost": 3})[0] == 204
    shown = [json.loads(line) for line in broker.run("records", "tail", "--json").stdout.splitlines()]
    assert shown[-1] == {"vm": VM, **record, "at": "1970-01-01T00:00:01.500Z"}
    assert broker.run("records", "tail", "-n", "0").stdout == ""
    following = subprocess.Popen(
        broker.argv("records", "tail", "-n", "0", "-f", "--json"), env=environment(), text=True, stdout=subprocess.PIPE
    )
    try:
        assert following.stdout is not None
        for _ in range(60):  # until it follows
            broker.call("POST", "/v1/records", {"records": [{**record, "at": 2.5}], "lost": 0})
            if select.select([following.stdout], [], [], 0.5)[0]:
                break
        assert json.loads(following.stdout.readline())["at"].endswith("02.500Z")  # and nothing that was there before
    finally:
        following.kill()
        following.communicate()
    assert b"persona_broker_records_lost_total 3" in broker.call("GET", "/metrics")[1]
    assert broker.call("POST", "/v1/records", {"records": {}, "lost": 0})[0] == 400
    assert broker.call("POST", "/v1/records", {"records": [record] * 501, "lost": 0})[0] == 400


def test_numbered_records_are_kept_and_what_a_marker_says_is_lost_counts(broker: Broker) -> None:
    def lost() -> int:
        return int(broker.call("GET", "/metrics")[1].split(b"\npersona_broker_records_lost_total ")[1].split()[0])

    record = {
        "at": 8.5, "session": "s", "user": "alice", "program": "", "argv": [], "decision": "granted",
        "reason": None, "persona": None, "persona_version": None, "policy": None, "event": "lost",
        "leased": False, "complain": False, "number": 12, "lost": {"first": 2, "last": 11, "why": "spool_full"},
    }  # fmt: skip
    before = lost()
    stream = {"machine": "0" * 32, "boot": "1" * 32}
    assert broker.call("POST", "/v1/records", {"stream": stream, "records": [record], "lost": 0}) == (204, b"")
    assert lost() == before + 10
    shown = [json.loads(line) for line in broker.run("records", "tail", "--json").stdout.splitlines()]
    del record["number"]  # the audit keeps it beside the record
    assert shown[-1] == {"vm": VM, **record, "at": "1970-01-01T00:00:08.500Z"}
    status, answer = broker.call("POST", "/v1/records", {"stream": {**stream, "boot": "?"}, "records": [], "lost": 0})
    assert (status, answer["detail"]) == (400, "stream.boot: expected 32 hexadecimal digits")


def test_a_record_that_is_none_keeps_no_other_from_being_kept(broker: Broker) -> None:
    def lost() -> int:
        return int(broker.call("GET", "/metrics")[1].split(b"\npersona_broker_records_lost_total ")[1].split()[0])

    record = {
        "at": 7.5, "session": "s", "user": "alice", "program": "/usr/bin/ls", "argv": ["ls"], "decision": "granted",
        "reason": "of_tomorrow", "persona": None, "persona_version": None, "policy": None, "event": "lunar",
        "leased": False, "complain": False, "moon": {"phase": "new"},
    }  # fmt: skip
    before = lost()
    sent = {"records": [record, {**record, "at": "soon"}, 7, record], "lost": 0}
    status, answer = broker.call("POST", "/v1/records", sent)
    assert status == 200
    assert [refused["index"] for refused in answer["refused"]] == [1, 2]
    assert "at: expected a number" in answer["refused"][0]["detail"]
    assert lost() == before  # the guest tells of them with the next ones
    assert broker.call("POST", "/v1/records", sent, speaks=None) == (204, b"")
    assert lost() == before + 2
    shown = [json.loads(line) for line in broker.run("records", "tail", "--json").stdout.splitlines()]
    assert shown[-4:] == [{"vm": VM, **record, "at": "1970-01-01T00:00:07.500Z"}] * 4


def test_every_answer_names_the_version_of_the_protocol(broker: Broker) -> None:
    for path, status in (("/healthz", 200), ("/nowhere", 404), ("/v1/personas", 401)):
        connection = UnixHttp(broker.api)
        connection.request("GET", path)
        response = connection.getresponse()
        assert (response.status, response.headers["Persona-Wire"]) == (status, str(wire.CURRENT))
        connection.close()
    for wrong in ("", "two", "0"):
        headers = {"Authorization": f"Bearer {TOKEN}", "Persona-Wire": wrong}
        connection = UnixHttp(broker.api)
        connection.request("GET", "/v1/personas", headers=headers)
        assert connection.getresponse().status == 400
        connection.close()


def test_a_revoked_session_is_denied_everything_and_hears_of_it(broker: Broker, ask: Ask) -> None:
    subject = {"user": "alice", "groups": [], "vm": VM}
    opened = {"session": "s-1", "subject": subject, "service": "sshd", "remote": ""}
    assert broker.call("POST", "/v1/sessions", opened)[0] == 201
    connection, response = broker.stream()
    try:
        hello = json.loads(response.readline())
        assert broker.run("sessions", "revoke", "s-1").returncode == 0
        event = json.loads(response.readline())
        assert (event["why"], event["generation"] > hello["generation"]) == ("changed", True)
        assert ask("ls", min_generation=event["generation"])[1]["reason"] == "session_revoked"
        assert broker.call("POST", "/v1/sessions", opened)[0] == 201  # an agent that restarts opens it again:
        assert ask("ls")[1]["reason"] == "session_revoked"
    finally:
        connection.close()
        assert broker.call("DELETE", "/v1/sessions/s-1")[0] == 204
    assert broker.run("sessions", "revoke", "s-1").returncode == 1


def test_a_user_is_revoked_on_all_vms_and_the_guest_hears_who_is_to_end(broker: Broker) -> None:
    def opened(ident: str, user: str) -> None:
        session = {"session": ident, "subject": {"user": user, "groups": [], "vm": VM}, "service": "sshd", "remote": ""}
        assert broker.call("POST", "/v1/sessions", session)[0] == 201

    def current() -> dict[str, Any]:
        status, answer = broker.call("POST", "/v1/sessions/current", {"sessions": ["s-1", "s-2"]})
        assert status == 200
        return dict(answer["sessions"])

    for ident in ("s-1", "s-2"):
        opened(ident, "alice")
    done = broker.run("sessions", "revoke", "alice", "--vm", "elsewhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert "none of such a user on elsewhere" in done.stderr
    done = broker.run("sessions", "revoke", "s-1")
    assert done.stdout.splitlines()[0].endswith("  revoked")
    assert current()["s-1"] == {"revoked": True, "personas": [], "others": []}  # just as guests of 0.1.0 know it
    assert not current()["s-2"]["revoked"]
    done = broker.run("sessions", "revoke", "alice", "--end", "--json")
    assert [session["id"] for session in json.loads(done.stdout)["items"]] == ["s-1", "s-2"]
    assert current() == {
        ident: {"revoked": True, "personas": [], "others": [], "end": True} for ident in ("s-1", "s-2")
    }
    assert broker.run("sessions", "list").stdout.count("  ending\n") == 2
    assert broker.call("DELETE", "/v1/sessions/s-1")[0] == 204
    assert broker.call("DELETE", "/v1/sessions/s-2")[0] == 204


def test_a_guest_says_which_sessions_it_has(broker: Broker) -> None:
    subject = {"user": "alice", "groups": [], "vm": VM}
    for ident in ("s-old", "s-kept", "s-new"):
        opened = {"session": ident, "subject": subject, "service": "sshd", "remote": ""}
        assert broker.call("POST", "/v1/sessions", opened)[0] == 201
    with closing(sqlite3.connect(broker.directory / "db", isolation_level=None)) as record:
        record.execute("UPDATE sessions SET opened_at = opened_at - 100 WHERE id != 's-new'")
    assert broker.call("POST", "/v1/sessions/open", {"sessions": ["s-kept"]}) == (204, b"")
    shown = broker.run("sessions", "list").stdout
    assert [ident in shown for ident in ("s-old", "s-kept", "s-new")] == [False, True, True]
    assert broker.call("POST", "/v1/sessions/open", {"sessions": ["x"] * 4097})[0] == 400
    assert broker.call("POST", "/v1/sessions/open", {"sessions": "x"})[0] == 400
    for ident in ("s-kept", "s-new"):
        assert broker.call("DELETE", f"/v1/sessions/{ident}")[0] == 204


def test_numbers_are_of_all_workers(broker: Broker, ask: Ask) -> None:
    def counted() -> int:
        text = broker.call("GET", "/metrics")[1].decode()
        return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("persona_broker_decisions_"))

    before = counted()
    for _ in range(40):  # a new connection each: both workers get some
        ask("ls")
        ask("ls", explain=True)  # is answered, but is no program start
    assert {counted() for _ in range(10)} == {before + 40}
    text = broker.call("GET", "/metrics")[1].decode()
    for line in ('load_percent{metric="cpu"} ', "streams ", 'decision_seconds_bucket{le="+Inf"} ', "generation "):
        assert f"persona_broker_{line}" in text


def test_every_metric_says_what_it_is(broker: Broker) -> None:
    report = {
        "disks": {}, "memory": None, "pressure": {}, "load": None, "failed_units": None, "errors": None,
        "clock_skew_s": None, "layers": {"seccomp": True},
    }  # fmt: skip
    assert broker.call("POST", "/v1/health", report)[0] == 204
    described: dict[str, list[str]] = {}
    for line in broker.call("GET", "/metrics")[1].decode().splitlines():
        if line.startswith("# "):
            _, word, name, text = line.split(" ", 3)
            described.setdefault(name, []).append(word)
            assert text
        else:
            name = re.split("[{ ]", line)[0]
            family = name if name in described else re.sub("_(bucket|sum|count)$", "", name)
            assert described[family] == ["HELP", "TYPE"]  # once each, before the first number
    assert described.keys() == {f"persona_broker_{name}" for name in metrics.METRICS}
    documented = (ROOT / "docs" / "broker.md").read_text()
    assert [name for name in metrics.METRICS if f"`{name}`" not in documented] == []
