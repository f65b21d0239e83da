"""What the store hands out, whatever keeps it."""

from collections.abc import Mapping
from dataclasses import dataclass

from persona.decisions import Subject
from persona_broker.policy.diff import Changes
from persona_broker.policy.merge import Stored
from persona_broker.policy.place import Place


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
class Text:
    """A document as it is stored: its digest, its JSON, and that of its expansion, if it has one."""

    digest: str
    body: str
    expansion: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The applied documents before and after an ``apply``, and what it changes; ``revision`` holds before it.

    ``texts`` are by kind and name of the documents that are given and can be read: those that may be written.
    ``moved`` are those of the given documents that are written in another place than before.
    """

    revision: int
    before: tuple[Stored, ...]
    after: tuple[Stored, ...]
    changes: Changes
    texts: Mapping[tuple[str, str], Text]
    moved: Mapping[tuple[str, str], Place]


@dataclass(frozen=True, slots=True)
class Changed:
    """What an ``apply`` did, and the revision that holds now."""

    revision: int
    changes: Changes
