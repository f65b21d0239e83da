"""The store: what a broker keeps, whatever keeps it, and what each implementation promises.

``sqlite.SqliteStore`` is one.  ``tests/broker/test_store.py`` holds for each.

- **A change is whole or absent**, also where the process is killed in it, and whoever asks after it was made reads it.
  What is read within one ``reading()`` is of one moment.
- **The generation** rises with every change that can change a decision, together with it, and never falls: a guest that
  has seen one is answered from nothing older.
- **The revision** rises by one with each change-set.  ``carry_out`` compares it and writes in one step: of several who
  planned for the same one, one gets through.
- **Versions** are never used twice and never change: what a decision names can be looked up for ever.
- **What operators do** (a change-set, guests, revocations, the set load) is put on the record by the step that does it,
  with its author: both or neither.
- **Errors**: every method raises ``StoreError`` where the store cannot be used, and has changed nothing then.  What a
  caller asked for and is refused is a ``PersonaError``.  One row that cannot be read is logged and fails no other.

The records of guests are no part of it: they are in the audit, and nothing is decided from them.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from persona.decisions import Subject
from persona.documents import Document
from persona.health import Bound, Report
from persona_broker.host.core.sample import HostSample
from persona_broker.policy.conditions import Latches, Sample
from persona_broker.policy.diff import Changes
from persona_broker.policy.merge import How, Stored
from persona_broker.policy.origin import NOWHERE, Origin
from persona_broker.policy.rollout import Seen
from persona_broker.policy.snapshot import Snapshot
from persona_broker.policy.unreadable import Unreadable

Key = tuple[str, str]  # a document's kind and name
Versions = dict[Key, int]
Origins = Mapping[Key, Origin]


class StoreError(Exception):
    """The store cannot be used: nothing is known, and nothing was changed."""


@dataclass(frozen=True, slots=True)
class Author:
    """Who changes documents, as the broker's machine knows them, and why; an empty name = nobody knows."""

    name: str
    message: str = ""


NOBODY = Author("")


@dataclass(frozen=True, slots=True)
class Item:
    """One document in a change-set: its version before and after, ``None`` where it was not applied."""

    kind: str
    name: str
    before: int | None
    after: int | None
    origin: Origin = NOWHERE  # where it is written since then


@dataclass(frozen=True, slots=True)
class ChangeSet:
    """One entry of the history.

    ``at`` is in Unix seconds; ``reordered`` where policies that stayed are asked in another order since then.
    ``generation`` is the one that guests learn of it by; ``None`` = nobody wrote it down.
    """

    revision: int
    at: float
    author: Author
    reordered: bool
    items: tuple[Item, ...]
    generation: int | None = None


@dataclass(frozen=True, slots=True)
class SessionRow:
    """A session that a guest opened and did not close yet."""

    id: str
    guest: str
    subject: Subject
    service: str
    remote: str
    opened_at: float
    revoked: bool
    ending: bool = False  # what runs in it is asked to end as well


@dataclass(frozen=True, slots=True)
class ReportRow:
    """A VM's health report as it is stored; ``number`` rises with each that is put."""

    number: int
    guest: str
    at: float
    report: str
    past: str


@dataclass(frozen=True, slots=True)
class HostRow:
    """A host's sample and its latches as they are stored; ``number`` rises with each that is put."""

    number: int
    name: str
    sample: str
    latches: str


@dataclass(frozen=True, slots=True)
class Binding:
    """Which domain a guest is, and the newest generation that concerned this guest and not every one."""

    uuid: str
    generation: int


@dataclass(frozen=True, slots=True)
class Text:
    """A document as it is stored: its digest, its JSON, and that of its expansion, if it has one."""

    digest: str
    body: str
    expansion: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The applied documents before and after an ``apply``, and what it changes; ``revision`` holds before it.

    ``texts`` are by kind and name of the documents that are given and can be read: those that may be written.
    ``moved`` are those of the given documents that come from another line or file than before.
    """

    revision: int
    before: tuple[Stored, ...]
    after: tuple[Stored, ...]
    changes: Changes
    texts: Mapping[Key, Text]
    moved: Origins


@dataclass(frozen=True, slots=True)
class Changed:
    """What an ``apply`` did, and the revision that holds now."""

    revision: int
    changes: Changes


class Store(Protocol):
    """What workers, watcher and commands ask of it.  Its methods may be called from any thread."""

    def close(self) -> None:
        """Ends the connection."""

    def reading(self) -> AbstractContextManager[None]:
        """Everything that is read within is of one moment."""

    def data_version(self) -> int:
        """Another number after each change that somebody else made; cheap enough to ask before every decision."""

    # --- generation and what holds now --------------------------------------------------------------

    def generation(self) -> int:
        """The number of the newest change that can change a decision."""

    def stamp(self) -> tuple[int, int]:
        """The generation, and how often documents moved within their files: that changes no decision."""

    def raise_generation(self) -> int:
        """Announces a change made elsewhere (a condition that began or ceased to hold)."""

    def sample(self) -> Sample | None:
        """The host's last load sample; none where it cannot be read."""

    def latches(self) -> Latches | None:
        """The thresholds that count as exceeded; ``None`` where they cannot be read."""

    def put_sample(self, sample: Sample, latches: Latches) -> None:
        """Replaces both at once."""

    def set_load(self) -> dict[str, float]:
        """What the operator set with ``load set``."""

    def put_set_load(self, load: Mapping[str, float], author: Author = ...) -> None:
        """The load that the settable source will report."""

    def put_report(self, guest: str, report: Report, bounds: Iterable[Bound], now: float) -> None:
        """Replaces the guest's report.  Raises ``PersonaError`` (overloaded) for one that reports all the time."""

    def reports_after(self, number: int) -> list[ReportRow]:
        """Those that were put after the one of this number, in order."""

    # --- hosts --------------------------------------------------------------------------------------

    def put_hosts(self, samples: Iterable[tuple[HostSample, Latches]]) -> None:
        """Replaces the samples of these hosts, and their latches with them; what is a day old is gone."""

    def keep_hosts(self, names: Iterable[str]) -> None:
        """Deletes the samples of all hosts but these."""

    def hosts_after(self, number: int) -> list[HostRow]:
        """Those that were put after the one of this number, in order."""

    def host_names(self) -> list[str]:
        """All hosts that have a sample."""

    def bindings(self) -> dict[str, Binding]:
        """By guest, of those that are bound to a domain."""

    def bind(self, guest: str, uuid: str, author: Author = ...) -> None:
        """From now on the guest is this domain, and no other one.

        Raises ``PersonaError`` (not_found, or conflict where another guest is it).
        """

    def unbind(self, guest: str, author: Author = ...) -> bool:
        """Whether it was bound."""

    def raise_generation_for(self, guests: Iterable[str]) -> int:
        """Announces a change that concerns these guests alone, all of them bound; the new generation.

        For the others the generation that concerns them stays what it was.
        """

    def shared_generation(self) -> int:
        """The newest generation that concerns every guest."""

    # --- documents ----------------------------------------------------------------------------------

    def plan(self, documents: Sequence[Stored], how: How = ..., origins: Origins = ...) -> Plan:
        """What applying these would do.  Raises ``PersonaError`` for what cannot be applied."""

    def carry_out(self, plan: Plan, author: Author) -> Changed:
        """Does what a plan says.  Raises ``PersonaError`` (conflict) where another revision holds than its own."""

    def change(self, documents: Sequence[Stored], how: How, author: Author, origins: Origins = ...) -> Changed:
        """Plans and does it at once, whatever revision holds.  Raises ``PersonaError``."""

    def documents(self) -> list[tuple[Document | Unreadable, int]]:
        """The applied set in order, each with its version."""

    def snapshot(self) -> Snapshot:
        """The applied set as an index."""

    def texts(self) -> list[tuple[str, str, int, str | None]]:
        """The applied set as it is stored: kind, name, version and JSON, ``None`` where that is gone."""

    def count(self) -> int:
        """How many documents are applied."""

    def version(self, kind: str, name: str, version: int | None = None) -> tuple[int, Document | Unreadable] | None:
        """One version of a document, by default the newest; ``None`` where there is none."""

    def text(self, kind: str, name: str, version: int) -> str | None:
        """The JSON of one version as it is stored; ``None`` where it is gone."""

    def origins(self, revision: int | None = None) -> Origins:
        """Where the documents of a revision, by default the newest, are written; of those known."""

    def origin_of(self, kind: str, name: str, version: int) -> Origin:
        """Where a version of a document was written when it was last applied."""

    # --- history ------------------------------------------------------------------------------------

    def revision(self) -> int:
        """The number of the newest change-set; 0 = there is none."""

    def refuse_another(self, revision: int, wanted: int) -> None:
        """Raises ``PersonaError`` (conflict), with who was faster, where ``revision`` is not the one ``wanted``."""

    def history(self, limit: int, name: str | None = None) -> list[ChangeSet]:
        """The newest change-sets first; with ``name`` those that changed a document of that name."""

    def change_set(self, revision: int) -> ChangeSet | None:
        """The one of a revision."""

    def change_set_after(self, revision: int) -> ChangeSet | None:
        """The one that came next."""

    def documents_at(self, revision: int) -> list[tuple[Document | Unreadable, int]]:
        """What was applied at a revision, policies last and in order.  Raises ``PersonaError`` (not_found)."""

    # --- guests and sessions ------------------------------------------------------------------------

    def add_guest(self, name: str, token: str | None = None, author: Author = ...) -> str:
        """Registers a guest, or gives it a new token; returns the token, which is kept only as a hash."""

    def remove_guest(self, name: str, author: Author = ...) -> bool:
        """Whether there was one; its event streams end, and its sessions are over."""

    def guests(self) -> list[str]:
        """The names of all guests."""

    def quarantined(self) -> dict[str, float]:
        """Guests that are denied everything since a restore, and since when."""

    def readmit(self, names: Iterable[str], author: Author = ...) -> list[str]:
        """Ends the quarantine of these guests; of which it was one."""

    def tokens(self) -> dict[str, str]:
        """Guests by the hash of their token."""

    def open_session(self, session: SessionRow) -> bool:
        """False where another guest has a session of that name.  A revoked one stays revoked."""

    def session(self, ident: str) -> SessionRow | None:
        """One open session."""

    def sessions(self) -> list[SessionRow]:
        """All open sessions, oldest first."""

    def end_session(self, ident: str, guest: str) -> bool:
        """Whether the guest had such a session."""

    def end_all_but(self, guest: str, alive: Iterable[str], opened_before: float) -> int:
        """Ends what a guest opened before a moment and does not have any more; how many those were."""

    def end_strays(self) -> int:
        """Ends the sessions of guests that are not registered; how many those were."""

    def revoke(
        self, who: str, guest: str | None = None, *, end: bool = False, author: Author = ...
    ) -> list[SessionRow]:
        """Denies everything to the session of this id, and to all of a user of this name; which those are."""

    def revoked(self) -> frozenset[str]:
        """The sessions that are denied everything."""

    def ending(self) -> frozenset[str]:
        """Those of them in which what runs is asked to end."""

    # --- how far a change has come ------------------------------------------------------------------

    def put_told(self, generations: Mapping[str, int], now: float) -> None:
        """What was written to the event streams of these guests; each is open."""

    def put_asked(self, generations: Mapping[str, int], now: float) -> None:
        """What these guests said that they know."""

    def seen(self) -> dict[str, Seen]:
        """By guest, of those that were ever connected."""

    # --- the audit ------------------------------------------------------------------------------------

    def add_lost(self, count: int) -> None:
        """Counts records that guests could not keep."""

    def records_lost(self) -> int:
        """How many records guests could not keep."""
