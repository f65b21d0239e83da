"""What tests of following share: a sorter over a fake hierarchy, and what may go wrong around it."""

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, cast

from persona_guest.broker.documents import Personas
from persona_guest.core.denials import Book
from persona_guest.core.file_id import Image
from persona_guest.core.masks import Masks
from persona_guest.core.reassignment import NO_PERSONA, NO_PERSONA_DOCUMENT, Applicable, Revocation
from persona_guest.enforce.cgroups.facility import Cgroups
from persona_guest.enforce.enforcer import Enforcer
from persona_guest.gate.hang_watchdog import HangWatchdog
from persona_guest.loop import Loop
from persona_guest.program.identity import Identifier
from persona_guest.reassign.migrate import REVOKED, Migrator
from persona_guest.reassign.user_notices import Notices
from persona_guest.session.model import Admitted, Login, Session, State
from persona_guest.session.placement import Placement
from persona_guest.session.registry import Registry
from persona_guest.settings import Gate, Settings

from persona.decisions import PersonaRef, Subject
from persona.documents import Persona, parse_document
from persona.patterns import Whitelist, parse_pattern
from persona.record_codec import Record
from tests.guest.fake_cgroups import FakeHierarchy

OLD, NEW = PersonaRef("Old", 1), PersonaRef("New", 1)
COUNTED = PersonaRef("Old", 2)  # for all sessions together
SCOPE = "user.slice/user-1000.slice/session-1.scope"
MANAGER = "user.slice/user-1000.slice/user@1000.service"
SESSION = Session("s-1", Subject("alice", (), "vm"), 1000, "sshd", "", "/bin/bash", 1, None, 0.0)
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


def document(name: str, whitelist: list[str], on_revoke: str, per: str = "session") -> Persona:
    found = parse_document(
        {
            "kind": "Persona",
            "name": name,
            "command_whitelist": whitelist,
            "on_revoke": on_revoke,
            "resource_limits": {"per": per},
        }
    )
    assert isinstance(found, Persona)
    return found


def gated(registry: Registry, session: Session, persona: PersonaRef | None = None) -> Login:
    """A session that is gated, with no listener."""
    login = registry.open(session)
    login.admitted, login.state = Admitted(persona, "p"), State.GATED
    return login


class Documents:
    """A fake store of personas."""

    def __init__(self, on_revoke: str) -> None:
        self.known = {
            OLD: document("Old", ["**"], on_revoke),
            COUNTED: document("Old", ["**"], on_revoke, "persona"),
            NEW: document("New", ["/usr/bin/true"], on_revoke),
            NO_PERSONA: NO_PERSONA_DOCUMENT,
        }

    def get(self, ref: PersonaRef) -> Persona:
        return self.known[ref]


class Site:
    """A sorter over a fake hierarchy, and a session under Old in it."""

    def __init__(self, directory: Path, on_revoke: str) -> None:
        self.loop = Loop()
        self.tree = FakeHierarchy(directory / "tree")
        self.tree.grow(SCOPE)
        self.told: list[str] = []
        self.revocations = 0  # how often its user was told of one; that is not in told
        self.registry = Registry(directory / "sessions")
        self.login = gated(self.registry, SESSION, OLD)
        self.placement = self.login.placement = Placement("s-1", 1000, SCOPE, Image(0, 0), OLD)
        personas = cast(Personas, Documents(on_revoke))
        enforcer = Enforcer(
            self.loop, self.registry, self.tree, [Cgroups(self.tree, "/dev/null")], personas, lambda _place: None
        )
        self.enforcer = enforcer
        self.registry.at_end(enforcer.ended)
        self.records: list[Record] = []
        self.denials = Book()
        self.notices = notices = Notices(
            self.loop, self.registry, self.tree, personas, HangWatchdog(lambda: None), self.denials,
            Masks(), self.records.append,
        )  # fmt: skip
        self.migrator = Migrator(
            Settings(), self.loop, self.registry, enforcer, Identifier(Gate()), HangWatchdog(lambda: None),
            self._tell, notices.note,
        )  # fmt: skip

    def _tell(self, _home: Placement, line: str) -> None:
        if line == REVOKED:
            self.revocations += 1
        else:
            self.told.append(line)

    def put(self, pid: int, *, withdrawn: bool = False) -> str:
        """The cgroup of Old, with a process in it."""
        place = self.enforcer.enter(self.placement, OLD, withdrawn=withdrawn)
        Path(self.tree.path(place.cgroup, "cgroup.kill")).write_text("0")
        self.tree.move(place.cgroup, pid)
        return place.cgroup

    def serve(self, pid: int) -> None:
        """A session that is a service manager under Old, with a process in it."""
        self.tree.grow(f"{MANAGER}/app.slice/a.service", pid)
        self.enforcer.enter(self.placement, OLD, MANAGER)
        Path(self.tree.path(MANAGER, "cgroup.kill")).write_text("0")

    def follow(self) -> bool:
        """New applies now, which allows nothing that these tests run."""
        holding = (Applicable(NEW, "p", Whitelist((parse_pattern("/usr/bin/true"),))),)
        return self.migrator.follow(self.placement, self.login, holding, Revocation.REVOKED)

    def revoke(self, word: Revocation = Revocation.REVOKED) -> bool:
        """No policy holds for it any more, by an operator's word."""
        return self.migrator.follow(self.placement, self.login, (), word)

    def run(self, seconds: float) -> None:
        self.loop.call_later(seconds, self.loop.stop)
        self.loop.run()


@contextlib.contextmanager
def short(spare: int) -> Iterator[None]:
    """A time in which this process has so many descriptors and no more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/", os.O_PATH)  # all below are in use
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def fails(*_: object) -> NoReturn:
    raise OSError(errno.EIO, "input/output error")
