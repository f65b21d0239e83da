"""Documents as they are stored, as text, and read again."""

import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from persona.canonical import digest, to_mapping
from persona.documents import Document, Persona, Policy
from persona_broker.policy.merge import key_of
from persona_broker.policy.origin import Origin
from persona_broker.policy.snapshot import Snapshot, Source, Versioned
from persona_broker.policy.unreadable import Unreadable, expansion_mapping, read_stored, stored_digest
from persona_broker.store.interface import Text


def text_of(document: Document) -> Text:
    """What is stored of a document."""
    expansion = expansion_mapping(document)
    body = json.dumps(to_mapping(document))
    return Text(digest(document), body, None if expansion is None else json.dumps(expansion))


def read(kind: str, name: str, version: int, key: Any, body: Any, expansion: Any) -> Document | Unreadable:
    """The document of a row, whose digest is ``key``; a ``body`` of ``None`` is a row that is gone.  Raises nothing."""

    def load() -> Any:
        if body is None:
            raise ValueError("its text is not there")
        return json.loads(body)

    return read_stored(
        kind, name, version, load, None if expansion is None else lambda: json.loads(expansion), str(key)
    )


def is_damaged(key: tuple[str, str, int], stored: Sequence[Any]) -> bool:
    """Whether a row's digest, body and expansion are not what was once applied, however a version may read that."""
    digest, body, expansion = stored
    try:
        if stored_digest(json.loads(body), None if expansion is None else json.loads(expansion)) == digest:
            return False
    except (ValueError, TypeError, LookupError, RecursionError):
        return True
    return isinstance(read(*key, *stored), Unreadable)


def is_intact(key: tuple[str, str], stored: Sequence[Any], wanted: Text) -> bool:
    """Whether ``stored``, a row's digest, body and expansion, is the document of this text, and can be read."""
    known, body, expansion = stored
    if known != wanted.digest:
        return False
    if (body, expansion) == (wanted.body, wanted.expansion):
        return True  # as nearly always, and a thousand times faster
    return not isinstance(read(*key, 0, *stored), Unreadable)


def make_snapshot(
    documents: Iterable[tuple[Document | Unreadable, int]],
    origins: Mapping[tuple[str, str], Origin] = MappingProxyType({}),
) -> Snapshot:
    """An index over documents and their versions, policies in the order given; version 0 = not stored."""
    documents = list(documents)
    sources = {
        name: Source(version or None, str(origins.get((kind, name), "")))
        for (kind, name), version in ((key_of(document), version) for document, version in documents)
        if kind == "Policy"
    }
    personas = {d.name: Versioned(d, version) for d, version in documents if isinstance(d, Persona)}
    known = (d.policy if isinstance(d, Unreadable) else d for d, _ in documents)
    unreadable = [d for d, _ in documents if isinstance(d, Unreadable)]
    return Snapshot([d for d in known if isinstance(d, Policy)], personas, unreadable, sources)
