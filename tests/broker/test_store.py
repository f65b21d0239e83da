"""What every implementation of the store promises (``persona_broker.store.interface``)."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from persona_broker.host.core.readings import Domain, DomainState
from persona_broker.host.core.sample import HostSample
from persona_broker.policy.conditions import Sample
from persona_broker.policy.merge import ADD, WHOLE
from persona_broker.policy.origin import Origin
from persona_broker.policy.rollout import Seen
from persona_broker.store.hosts import SeenHosts
from persona_broker.store.interface import Author, SessionRow, Store, StoreError
from persona_broker.store.sqlite import SqliteStore
from persona_broker.view import State

from persona.conditions import Threshold
from persona.decisions import Granted, Program, Request, Subject
from persona.documents import Document, Persona, Policy, parse_document
from persona.health import Report
from persona.problems import Fault, PersonaError
from tests.broker.test_apply import persona, policy

IMPLEMENTATIONS: dict[str, Callable[[Path], Store]] = {"sqlite": lambda folder: SqliteStore(folder / "db")}
ANN = Author("ann", "why")
# what an implementation has put on the record, oldest first
RECORDED: dict[str, Callable[[Path], list[dict[str, Any]]]] = {"sqlite": lambda folder: _pending(folder / "db")}
Open = Callable[[], Store]
Recorded = Callable[[], list[dict[str, Any]]]


@pytest.fixture(params=IMPLEMENTATIONS)
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Each call is another process's view of the same store."""
    make = IMPLEMENTATIONS[request.param]
    with ExitStack() as stack:
        yield lambda: stack.enter_context(closing(make(tmp_path)))


def _pending(path: Path) -> list[dict[str, Any]]:
    with closing(SqliteStore(path)) as store:
        return [json.loads(body) for (body,) in store.rows("SELECT body FROM audit_pending ORDER BY id")]


@pytest.fixture
def recorded(request: pytest.FixtureRequest, connect: Open, tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """What operators did, of the store of ``connect``."""
    return lambda: RECORDED[request.node.callspec.params["connect"]](tmp_path)


def documents(*values: dict[str, Any]) -> list[Document]:
    return [parse_document(value) for value in values]


def test_what_one_changes_the_others_see_and_within_one_reading_none_of_it(connect: Open) -> None:
    writer, reader = connect(), connect()
    seen = reader.data_version()
    assert reader.data_version() == seen
    with reader.reading():
        before = reader.generation()
        writer.change(documents(persona("A")), WHOLE, ANN)
        assert (reader.generation(), reader.documents(), reader.revision()) == (before, [], 0)
    assert reader.data_version() != seen
    assert (reader.generation() > before, reader.count(), reader.revision()) == (True, 1, 1)


def test_the_generation_rises_with_what_can_change_a_decision_and_with_nothing_else(connect: Open) -> None:
    store = connect()
    store.add_guest("vm", "token")
    store.open_session(SessionRow("s", "vm", Subject("alice", (), "vm"), "", "", 1.0, False))
    one = documents(persona("A"))
    changes: list[Callable[[], object]] = [
        lambda: store.change(one, WHOLE, ANN), store.raise_generation, lambda: store.revoke("alice"),
        lambda: store.bind("vm", "u"), lambda: store.raise_generation_for(["vm"]), lambda: store.unbind("vm"),
        lambda: store.remove_guest("vm"),
    ]  # fmt: skip
    same: list[Callable[[], object]] = [
        lambda: store.change(one, WHOLE, ANN), lambda: store.revoke("nobody"), lambda: store.remove_guest("nobody"),
        lambda: store.put_sample(Sample(1.0, {"cpu": 1.0}, "set"), frozenset()), lambda: store.add_guest("other"),
        lambda: store.put_report("other", Report(), (), 1.0), lambda: store.add_lost(1),
        lambda: store.put_hosts([(host_sample("lab"), frozenset())]), lambda: store.unbind("vm"),
    ]  # fmt: skip
    for act, rises in [(act, 1) for act in changes] + [(act, 0) for act in same]:
        before = store.generation()
        act()
        assert store.generation() == before + rises


UUIDS = [f"00000000-0000-4000-8000-{number:012}" for number in range(2)]


def host_sample(name: str, at: float | None = None) -> HostSample:
    at = time.time() if at is None else at
    domains = (
        Domain(UUIDS[0], "one", DomainState.RUNNING, {"cpu": 5.0}),
        Domain(UUIDS[1], "two", DomainState.SHUT_OFF),
    )
    return HostSample(name, "qemu:///system", at, {"cpu": 80.0}, at, domains)


def test_of_a_host_the_newest_sample_is_kept_with_its_latches(connect: Open) -> None:
    store, seen = connect(), SeenHosts(connect())
    latches = frozenset({Threshold("cpu", 70, 60)})
    assert seen.look() == {}
    first, second = host_sample("lab"), host_sample("lab", time.time() + 1)
    store.put_hosts([(first, frozenset()), (host_sample("other"), frozenset())])
    store.put_hosts([(second, latches)])
    found = seen.look()
    assert (sorted(found), found["lab"].sample.at, found["lab"].latches) == (["lab", "other"], second.at, latches)
    assert (found["lab"].runs, found["lab"].domains_at) == (dict(zip(UUIDS, (True, False), strict=True)), second.at)
    assert seen.seen["lab"].sample == second
    assert seen.look() is found  # nothing is new
    assert SeenHosts(connect()).look() == found  # another process's
    store.put_hosts([(host_sample("old", time.time() - 90_000), frozenset())])
    assert sorted(seen.look()) == ["lab", "old", "other"]  # however old: somebody has to hear of it
    store.keep_hosts(["lab"])
    assert sorted(seen.look()) == ["lab"]


def test_a_domain_is_one_guest(connect: Open) -> None:
    store, other = connect(), connect()
    for name in ("vm-1", "vm-2"):
        store.add_guest(name)
    store.bind("vm-1", "u1")
    for guest, code in (("vm-2", Fault.CONFLICT), ("nobody", Fault.NOT_FOUND)):
        with pytest.raises(PersonaError) as error:
            other.bind(guest, "u1")
        assert error.value.code is code
    assert {guest: binding.uuid for guest, binding in other.bindings().items()} == {"vm-1": "u1"}
    other.bind("vm-1", "u3")  # it was wrong
    other.bind("vm-2", "u1")
    store.add_guest("vm-2", "another token")
    assert {guest: binding.uuid for guest, binding in store.bindings().items()} == {"vm-1": "u3", "vm-2": "u1"}
    assert store.unbind("vm-2") and not store.unbind("vm-2")
    store.remove_guest("vm-1")
    assert store.bindings() == {}


def test_what_concerns_some_guests_leaves_what_concerns_the_others(connect: Open) -> None:
    store, other = connect(), connect()
    for number in (1, 2):
        store.add_guest(f"vm-{number}")
        store.bind(f"vm-{number}", f"u{number}")
    shared = store.shared_generation()
    assert shared == store.generation()
    first = store.raise_generation_for(["vm-1"])
    second = other.raise_generation_for(["vm-2"])
    assert (first, second, store.generation()) == (shared + 1, shared + 2, shared + 2)
    assert store.shared_generation() == shared
    assert {guest: binding.generation for guest, binding in store.bindings().items()} == {"vm-1": first, "vm-2": second}
    every = other.raise_generation()  # whoever knows nothing of that
    assert store.shared_generation() == every == second + 1
    assert store.raise_generation_for(["vm-1"]) == every + 1
    assert other.shared_generation() == every


def test_of_those_who_planned_for_the_same_revision_one_gets_through(connect: Open) -> None:
    together = threading.Barrier(6, timeout=60)  # or five would wait for ever for one that failed

    def change(number: int) -> str:
        store = connect()
        plan = store.plan(documents(persona("A", f"x{number}")), WHOLE)
        together.wait()
        try:
            return str(store.carry_out(plan, Author(f"u{number}")).revision)
        except PersonaError as error:
            assert error.code is Fault.CONFLICT
            return "refused"

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(change, range(6))) == ["1", *["refused"] * 5]
    (only,) = connect().history(10)
    assert only.revision == 1


def test_what_is_refused_or_fails_changes_nothing(connect: Open) -> None:
    store = connect()
    store.change(documents(persona("A"), policy("a")), WHOLE, ANN)
    before = store.documents(), store.generation(), store.revision()
    with pytest.raises(PersonaError):
        store.change(documents(policy("b", persona="nobody")), ADD, ANN)
    with pytest.raises(PersonaError) as caught:
        store.documents_at(9)
    assert caught.value.code is Fault.NOT_FOUND
    assert (store.documents(), store.generation(), store.revision()) == before


def test_who_is_revoked_stays_so_while_the_session_is_open(connect: Open) -> None:
    store, other = connect(), connect()
    row = SessionRow("s", "vm", Subject("alice", ("g",), "vm"), "sshd", "::1", 1.0, False)
    assert store.open_session(row) and store.session("s") == row
    assert [found.id for found in other.revoke("alice", end=True)] == ["s"]
    assert store.open_session(row)  # an agent that restarts
    assert store.revoked() == store.ending() == {"s"}
    assert store.end_session("s", "vm") and not store.end_session("s", "vm")
    assert store.revoked() == store.ending() == frozenset()


def test_what_operators_do_is_put_on_the_record_with_who_did_it(connect: Open, recorded: Recorded) -> None:
    store = connect()
    store.add_guest("vm", "token", ANN)
    store.add_guest("vm", "token", ANN)  # the same again is no act
    store.add_guest("vm", "another", ANN)
    store.open_session(SessionRow("s", "vm", Subject("alice", (), "vm"), "", "", 1.0, False))
    store.revoke("alice", end=True, author=ANN)
    store.put_set_load({"cpu": 3.0}, ANN)
    store.change(documents(persona("A")), WHOLE, ANN)
    store.change(documents(persona("A")), WHOLE, ANN)
    store.bind("vm", "u", ANN)
    store.bind("vm", "u", ANN)
    store.unbind("vm", ANN)
    store.unbind("vm", ANN)
    store.remove_guest("vm", ANN)
    store.remove_guest("vm", ANN)  # nor is what changes nothing
    store.revoke("x", author=ANN)
    store.readmit(["vm"], ANN)
    found = recorded()
    assert [one.pop("author") for one in found] == ["ann"] * 8
    assert all(one.pop("at") > 1e9 for one in found)
    document = {"kind": "Persona", "name": "A", "before": None, "after": 1}
    assert found == [
        {"event": "guest_added", "vm": "vm", "renewed": False},
        {"event": "guest_added", "vm": "vm", "renewed": True},
        {"event": "session_revoked", "session": "s", "vm": "vm", "user": "alice", "end": True},
        {"event": "load_set", "load": {"cpu": 3.0}},
        {"event": "change_set", "message": "why", "revision": 1, "count": 1, "documents": [document]},
        {"event": "guest_bound", "vm": "vm", "uuid": "u"},
        {"event": "guest_unbound", "vm": "vm", "uuid": "u"},
        {"event": "guest_removed", "vm": "vm"},
    ]


def test_an_act_that_does_not_happen_is_not_on_the_record(connect: Open, recorded: Recorded) -> None:
    store = connect()
    with pytest.raises(PersonaError):
        store.change(documents(policy("b", persona="nobody")), ADD, ANN)
    store.close()
    with pytest.raises(StoreError):
        store.add_guest("vm", author=ANN)
    assert recorded() == []


def test_records_that_guests_lost_are_counted(connect: Open) -> None:
    store = connect()
    store.add_lost(2)
    store.add_lost(3)
    assert store.records_lost() == 5


def test_what_guests_were_told_and_say_only_rises(connect: Open) -> None:
    store = connect()
    store.add_guest("vm")
    store.put_told({"vm": 5, "stranger": 5}, 1.0)
    store.put_asked({"vm": 4}, 2.0)
    store.put_asked({"vm": 3}, 3.0)
    assert connect().seen() == {"vm": Seen(5, 1.0, 4, 3.0)}
    store.remove_guest("vm")
    assert (store.seen(), store.quarantined(), store.readmit(["vm"])) == ({}, {}, [])


def test_where_documents_are_written_is_told_by_revision(connect: Open) -> None:
    store, one = connect(), documents(persona("A"))
    key = ("Persona", "A")
    store.change(one, WHOLE, ANN, {key: Origin("a.yaml", 1)})
    store.change(documents(persona("A", "cat")), WHOLE, ANN, {key: Origin("b.yaml", 2)})
    before = store.stamp()
    store.change(documents(persona("A", "cat")), WHOLE, ANN, {key: Origin("b.yaml", 3)})
    assert (store.stamp()[0] == before[0], store.stamp() == before, store.revision()) == (True, False, 2)
    assert [str(store.origins(number)[key]) for number in (1, 2)] == ["a.yaml:1", "b.yaml:3"]
    assert (str(store.origin_of(*key, 1)), store.origins()[key]) == ("a.yaml:1", Origin("b.yaml", 3))
    store.change(one, WHOLE, ANN)
    assert store.origins() == {}  # nobody said


def test_one_that_cannot_be_used_says_so_everywhere(connect: Open) -> None:
    store = connect()
    store.close()
    calls: list[Callable[[], object]] = [
        store.generation, store.stamp, store.data_version, store.snapshot, store.tokens, store.revision, store.sample,
        store.raise_generation, lambda: store.change(documents(persona("A")), WHOLE, ANN), lambda: store.revoke("x"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(StoreError):
            call()


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(n, marks=pytest.mark.soak) for n in range(3, 60))])
def test_the_versions_that_a_decision_names_can_be_looked_up_for_ever(connect: Open, seed: int) -> None:
    """Over a random history of changes, moves, removals and rollbacks: each is what decided then."""
    chance, store = random.Random(seed), connect()  # noqa: S311 - a history, no secret
    state = State(connect(), 15)
    named: dict[tuple[str, str, int], Document] = {}
    revisions = 0
    for _ in range(25):
        if revisions and chance.random() < 0.3:
            number = chance.randint(1, revisions)
            store.change([item for item, _ in store.documents_at(number)], WHOLE, ANN)
        else:
            values = [persona(name, "ls", *chance.sample(["cat", "git", "vim"], 2)) for name in ("A", "B")]
            users = [chance.choice(["alice", "bob"]) for _ in range(3)]
            values += [
                policy(f"p{n}", user, chance.choice("AB")) for n, user in enumerate(users) if chance.random() < 0.8
            ]
            store.change(documents(*values), WHOLE, ANN)
        revisions = store.revision()
        view = state.current(store.generation())
        now = {(type(document).__name__, document.name): document for document, _ in store.documents()}
        for user in ("alice", "bob"):
            for name in ("ls", "vim", "nmap"):
                program = Program(f"/usr/bin/{name}", (name,), (f"/usr/bin/{name}",))
                request = Request(Subject(user, (), "vm"), "s", program, (name,), "/")
                decision = view.snapshot.decide(request, view.condition_state)
                if decision.policy is None:
                    continue
                assert decision.policy_version is not None
                entry = now["Policy", decision.policy]
                assert isinstance(entry, Policy)
                named["Policy", decision.policy, decision.policy_version] = entry
                held = now["Persona", entry.persona]
                version = decision.persona.version if isinstance(decision, Granted) else decision.persona_version
                assert isinstance(held, Persona) and version is not None
                named["Persona", entry.persona, version] = held
    assert len(named) > 10
    for (kind, name, version), document in named.items():
        assert store.version(kind, name, version) == (version, document)
