"""The audit that a command works on."""

from pathlib import Path

from persona_broker.audit.chain import Chain
from persona_broker.audit.files import beside
from persona_broker.audit.inbox import take_over
from persona_broker.cli.store import existing
from persona_broker.settings import Settings


def opened(settings: Settings) -> Chain:
    """The chain, with everything in it that waited for it.  Raises ``sqlite3.Error``, ``OSError``."""
    store = existing(settings)
    chain = Chain(beside(Path(settings.db)))
    take_over(store, chain)
    store.close()
    return chain
