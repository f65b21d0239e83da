"""Acknowledges that an earlier chain is gone: signs it, and puts it on the record with a checkpoint after it."""

import time
from collections.abc import Iterable, Sequence

from persona_broker.audit import checkpoints
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.checkpoint import Checkpoint
from persona_broker.audit.core.events import event
from persona_broker.audit.core.loss import EVENT, Loss, read
from persona_broker.audit.keys import PublicKey, SigningKey
from persona_broker.audit.search import Wanted, each
from persona_broker.store.interface import Author
from persona_broker.store.sqlite import SqliteStore


def is_signed(loss: Loss, chain: str, known: Iterable[PublicKey]) -> bool:
    """Whether one of the known keys signed it, for this chain."""
    return any(key.id == loss.key and key.signed(loss.signature, loss.signed(chain)) for key in known)


def acknowledged(chain: Chain, known: Sequence[PublicKey]) -> list[Loss]:
    """The losses that records of the chain acknowledge with a right signature.  Raises ``sqlite3.Error``."""
    found = [read(one.number, one.record) for one in each(chain, Wanted(event=EVENT, guests_only=False)) if not one.vm]
    return [loss for loss in found if loss is not None and is_signed(loss, chain.id(), known)]


def contradicting(chain: Chain, kept: Iterable[Checkpoint], known: Sequence[PublicKey]) -> list[Checkpoint]:
    """Of each earlier chain the last checkpoint, where nobody acknowledged yet that it is gone.

    ``kept`` are those whose signatures are right.  Raises ``sqlite3.Error``.
    """
    told, here = acknowledged(chain, known), chain.id()
    last: dict[str, Checkpoint] = {}
    for item in sorted(kept, key=lambda item: item.number):
        if item.chain != here and not any(loss.covers(item.chain, item.number) for loss in told):
            last[item.chain] = item
    return list(last.values())


def acknowledge(
    store: SqliteStore, chain: Chain, key: SigningKey, gone: Iterable[Checkpoint], author: Author
) -> list[Loss]:
    """Says of earlier chains that they are gone, up to these checkpoints.  Raises ``sqlite3.Error``, ``OSError``."""
    here, made = chain.id(), []
    for item in gone:
        at = round(time.time(), 6)
        said = Loss(item.chain, item.number, item.hash, at, author.name, key.public.id)
        made.append(Loss(said.lost, said.through, said.hash, at, said.author, said.key, key.over(said.signed(here))))
    chain.add([event("audit_loss_acknowledged", loss.at, message=author.message, **loss.members()) for loss in made])
    signed = checkpoints.make(chain, key)
    if signed is not None:
        checkpoints.put(store, [signed])
    return made
