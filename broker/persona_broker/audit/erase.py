"""Takes a person's text out of the chain: user, program, arguments and what else their records say of them.

What stays is that there was a record: number, time, VM, session, decision, reason, persona, policy, event.  In place of
the text stays its salted digest, whose salt is gone, so that the chain verifies and nobody can try texts against it.
"""

import time
from collections.abc import Sequence
from contextlib import closing

from persona.problems import Fault, PersonaError
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.events import event
from persona_broker.audit.index import Index
from persona_broker.audit.segment import Segment
from persona_broker.store.interface import Author

_BLOCK = 1000  # records of one transaction


def erase(chain: Chain, user: str, author: Author, held: Sequence[str] = ()) -> dict[str, int]:
    """How many records of a user were erased, by segment.  Raises ``sqlite3.Error``, ``OSError``.

    What is interrupted is finished by the same again.  The record of it does not name the user.  ``held``: sessions
    that are held; raises ``PersonaError`` where one is the user's, and erases nothing.
    """
    _refuse_held(chain, user, held)
    erased: dict[str, int] = {}
    for path in chain.segments():
        with closing(Index(path)) as index:
            query = "SELECT number FROM entries WHERE user = +CAST(? AS TEXT)"
            numbers = [int(n) for (n,) in index.rows(query, user.encode("utf-8", "surrogatepass"))]
            if not numbers:
                continue
            with closing(Segment(path, writable=True)) as segment:
                for first in range(0, len(numbers), _BLOCK):
                    segment.erase(numbers[first : first + _BLOCK])
                segment.truncate_log()
            index.forget(numbers)
            erased[path.stem] = len(numbers)
    if erased:
        count = sum(erased.values())
        said = {"count": count, "segments": erased}
        chain.add([event("audit_erased", time.time(), author=author.name, message=author.message, **said)])
    return erased


def _refuse_held(chain: Chain, user: str, held: Sequence[str]) -> None:
    for path in chain.segments() if held else ():
        with closing(Index(path)) as index:
            query = "SELECT DISTINCT session FROM entries WHERE user = +CAST(? AS TEXT)"
            found = {str(s) for (s,) in index.rows(query, user.encode("utf-8", "surrogatepass"))} & set(held)
        if found:
            fix = "'audit hold remove --session' ends that"
            raise PersonaError(Fault.CONFLICT, f"their session {min(found)} is held, so nothing was erased; {fix}")
