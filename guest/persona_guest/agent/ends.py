"""What ends with the agent: each part in turn, the newest first, whatever goes wrong with another."""

import logging
from collections.abc import Callable
from types import TracebackType

log = logging.getLogger("persona.agent")


class Ends:
    """A context: when it is left, everything that was added ends.  What fails is in the journal and keeps no other.

    Unlike ``contextlib.ExitStack`` it hands no failure on: an agent that was asked to end has ended as asked.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], object]]] = []

    def __enter__(self) -> "Ends":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _where: TracebackType | None
    ) -> None:
        while self._steps:
            what, end = self._steps.pop()
            try:
                end()
            except Exception:  # whatever it is: what the others still have to write must not be lost for it
                log.exception("%s did not end as it should; the rest goes on", what)

    def add(self, what: str, end: Callable[[], object]) -> None:
        """``end`` is called before those that were added before it; ``what`` names it in the journal."""
        self._steps.append((what, end))
