"""What an agent asks its broker, by the code of whichever version is on the path; prints what it understood as JSON.

Run it as a script: ``ask.py DIRECTORY VM``; the directory has the sockets ``api.sock`` and ``events.sock`` and the
file ``token``.  It takes nothing but what 0.1.0 has, or says why not.
"""

import contextlib
import importlib.util
import json
import queue
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or importlib.util.find_spec("persona_guest.session"):
    from persona_guest.audit.upload import Recorder
    from persona_guest.broker.client import BrokerClient
    from persona_guest.broker.current import Current
    from persona_guest.broker.documents import Personas
    from persona_guest.broker.events import Changed, Event, Stream
    from persona_guest.broker.pool import Pool
    from persona_guest.core.reassignment import Applicable
    from persona_guest.health.report import Reporter
    from persona_guest.session.model import Admitted, Session

    from persona.record_codec import Record

    def read_current(found: tuple[Current, ...]) -> list[tuple[str, tuple[Applicable, ...]]]:
        return [(one.session_id, one.holding) for one in found]

else:  # where 0.1.0 has them
    from persona_guest import follower
    from persona_guest.broker_client.events import Changed, Event, Stream
    from persona_guest.broker_client.link import Link as Pool
    from persona_guest.broker_client.recorder import Recorder
    from persona_guest.core.sessions import Session
    from persona_guest.health import Reporter
    from persona_guest.personas import Personas
    from persona_guest.questions import Admitted, Questions

    from persona.codec import Record

    def BrokerClient(link, leases, _subject_of):
        return Questions(link, leases)

    def read_current(found):
        return [(session, holding) for session, holding, _others, _revoked in follower._read(found)]


from persona_guest.core.leases import LeaseBook
from persona_guest.settings import Broker

from persona.decisions import Decision, Denied, Granted, PersonaRef, Program, Request, Subject
from persona.health import Report, Space
from persona.problems import Reason

WAIT_S = 20.0


class Watch:
    """A machine that is well; a fake."""

    def measure(self, clock_skew_s: float | None) -> Report:
        space = Space(100 << 30, 50 << 30)
        report = Report({"/": space}, space, {"cpu": 0.0}, 0.1, (), 0, clock_skew_s, {"seccomp": True, "bpf": True})
        return replace(report, wire=2) if hasattr(report, "wire") else report

    look = measure  # as 0.1.0 called it


class Agent:
    """The parts of an agent that speak to the broker, and a loop for them."""

    def __init__(self, directory: Path, vm: str) -> None:
        self.vm = vm
        token = str(directory / "token")
        self.settings = Broker(
            url=f"unix:{directory}/api.sock", events_url=f"unix:{directory}/events.sock", token_file=token, timeout_s=5
        )
        self._mail: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.events: list[Event] = []
        self.link = Pool(self.settings, self._mail.put)
        self.leases = LeaseBook()
        self.broker_client = BrokerClient(
            self.link, self.leases, lambda session: self.subject(session.removeprefix("s-"))
        )
        self.broker_client.streaming = True
        self.personas = Personas(directory / "personas", self.broker_client.persona)
        self.stream = Stream(self.settings, lambda event: self._mail.put(lambda: self.events.append(event)))

    def until(self, done: Callable[[], object]) -> None:
        """Runs the loop until it is done.  Raises ``TimeoutError``."""
        deadline = time.monotonic() + WAIT_S
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError("no answer")
            with contextlib.suppress(queue.Empty):
                self._mail.get(timeout=0.02)()
            self.link.sweep(time.monotonic())

    def get(self, ask: Callable[[Callable[[Any], None]], None]) -> Any:
        """What ``ask`` calls back with."""
        found: list[Any] = []
        ask(found.append)
        self.until(lambda: found)
        return found[0]

    def subject(self, user: str) -> Subject:
        return Subject(user, ("users", *(["operators"] if user == "olga" else [])), self.vm)

    def session(self, user: str) -> Session:
        return Session(f"s-{user}", self.subject(user), 1000, "sshd", "10.0.0.1", "/bin/bash", 1, None, 0.0)

    def decide(self, user: str, *argv: str, **more: Any) -> list[str | None]:
        path = f"/usr/bin/{argv[0]}"
        program = replace(Program(path, (argv[0],), (path,)), **more)
        request = Request(self.subject(user), f"s-{user}", program, argv, "/")
        found: Decision = self.get(lambda done: self.broker_client.decide(request, done))
        if isinstance(found, Granted):
            return ["granted", found.persona.name, found.policy]
        return ["denied", str(found.reason), found.help]

    def admit(self, user: str) -> list[str | None]:
        session = self.session(user)
        found: Admitted | Denied = self.get(lambda done: self.broker_client.admit(session, done, opening=True))
        if isinstance(found, Admitted):
            return ["admitted", found.persona.name if found.persona else None, found.policy]
        return ["denied", str(found.reason)]

    def whitelist(self, name: str, version: int = 1) -> list[str]:
        ref = PersonaRef(name, version)
        denied: Denied | None = self.get(lambda done: self.personas.ensure(ref, done))
        if denied is not None:
            return ["denied", denied.help]
        return [pattern.text for pattern in self.personas.get(ref).command_whitelist.patterns]

    def current(self, *users: str) -> Any:
        found = self.get(lambda done: self.broker_client.current([f"s-{user}" for user in users], done))
        if isinstance(found, Denied):
            return found.help
        return {
            session: [[held.policy, [pattern.text for pattern in held.commands.patterns]] for held in holding]
            for session, holding in read_current(found)
        }

    def entries(self, user: str) -> Any:
        found = self.get(lambda done: self.broker_client.entries(self.session(user), done))
        return found.help if isinstance(found, Denied) else [[entry["policy"], entry["reason"]] for entry in found]

    def record(self) -> int:
        """Sends a record for every reason that this version knows, and one that is none; returns how many."""
        recorder = Recorder(self.settings, lambda _record: None)
        record = Record(
            1.5, "s-alice", "alice", "/usr/bin/ls", ("ls",), "denied", None, None, None, None, "exec", False, False
        )
        for reason in Reason:
            recorder.add(replace(record, reason=reason))
        recorder.add(replace(record, session="x" * 300))
        recorder.add(replace(record, decision="granted"))
        recorder.close()
        return len(Reason) + 1

    def report(self) -> None:
        """A report of this machine's health."""
        reporter = Reporter(self.settings, Watch())  # type: ignore[arg-type]  # a fake
        self.until(lambda: reporter._sent is not None)
        reporter.close()

    def close(self) -> None:
        self.stream.close()
        self.link.close()


def main(directory: Path, vm: str) -> None:
    agent = Agent(directory, vm)
    agent.until(lambda: any(isinstance(event, Changed) for event in agent.events))
    agent.report()
    users = ("alice", "olga", "ann")
    told = {
        "why": next(event.why for event in agent.events if isinstance(event, Changed)),
        "admitted": {user: agent.admit(user) for user in (*users, "nobody")},
        "decided": {user: agent.decide(user, "ls") for user in users},
        "refused": agent.decide("alice", "nmap"),
        "unreadable": agent.decide("ann", "cat"),
        "whitelists": {name: agent.whitelist(name) for name in ("DataAnalyst", "Quoted")},
        "current": agent.current(*users),
        "entries": {user: agent.entries(user) for user in users},
        "records": agent.record(),
    }
    if "loader" in Program.__dataclass_fields__:
        told["loader"] = agent.decide("alice", "ld.so", loader=True)
        subject, many = agent.subject, tuple(f"group-{number}" for number in range(1000))
        agent.subject = lambda user: replace(subject(user), groups=many)  # type: ignore[method-assign]
        told["groups"] = agent.decide("alice", "ls")
    json.dump(told, sys.stdout)
    agent.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
