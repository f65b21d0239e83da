"""What applies to running sessions, as a guest asks for all of its own at once."""

from tests.broker.conftest import VM, Broker


def opened(broker: Broker, name: str, user: str = "alice") -> None:
    subject = {"user": user, "groups": [], "vm": VM}
    session = {"session": name, "subject": subject, "service": "sshd", "remote": ""}
    assert broker.call("POST", "/v1/sessions", session)[0] in (200, 201)


def test_what_holds_in_policy_order_and_what_may(broker: Broker) -> None:
    opened(broker, "s-a")
    opened(broker, "s-b")
    status, answer = broker.call("POST", "/v1/sessions/current", {"sessions": ["s-a", "s-b", "s-none"]})
    assert status == 200
    assert set(answer["sessions"]) == {"s-a", "s-b"}
    found = answer["sessions"]["s-a"]
    assert not found["revoked"]
    named = [item["name"] for item in found["personas"]] + [item["name"] for item in found["others"]]
    assert set(named) == {"DataAnalyst", "AnalystOnBusyHost"}
    assert found["personas"][0].keys() == {"name", "version", "policy", "commands"}
    broker.run("sessions", "revoke", "s-a")
    after = broker.call("POST", "/v1/sessions/current", {"sessions": ["s-a", "s-b"]})[1]
    assert after["sessions"]["s-a"] == {"personas": [], "others": [], "revoked": True}
    assert after["sessions"]["s-b"] == answer["sessions"]["s-b"]
    assert after["generation"] > answer["generation"]


def test_nobody_asks_about_anothers_sessions_or_too_many(broker: Broker) -> None:
    opened(broker, "s-mine")
    broker.run("guest", "add", "third", "--token-file", str(broker.directory / "third"))
    theirs = (broker.directory / "third").read_text().strip()
    body = {"sessions": ["s-mine"]}
    assert broker.call("POST", "/v1/sessions/current", body, token=theirs)[1]["sessions"] == {}
    assert broker.call("POST", "/v1/sessions/current", body, token="")[0] == 401
    for bad in ({}, {"sessions": "s-mine"}, {"sessions": ["s"] * 501}, {"sessions": ["x" * 65]}, {**body, "more": 1}):
        assert broker.call("POST", "/v1/sessions/current", bad)[0] == 400
    assert broker.call("POST", "/v1/sessions/current", {**body, "min_generation": 1 << 40})[0] == 503
