"""The execs that wait for the broker's answer: one question is asked once, however many execs wait for it."""

import contextlib
import time

from persona_guest.core.leases import Question
from persona_guest.core.messages import printable
from persona_guest.gate.hang_watchdog import HangWatchdog
from persona_guest.gate.pending import Pending
from persona_guest.gate.terminal import tell
from persona_guest.kernel import seccomp


class Waiting:
    """Execs that wait, by session and question; the loop's thread alone uses it."""

    def __init__(self, hang_watchdog: HangWatchdog) -> None:
        self._hang_watchdog = hang_watchdog
        self._execs: dict[tuple[str, Question], list[Pending]] = {}

    def add(self, pending: Pending, question: Question) -> int:
        """Adds an exec and returns how many wait for the same answer by now; whoever adds the first has to ask."""
        execs = self._execs.setdefault((pending.login.session.id, question), [])
        execs.append(pending)
        return len(execs)

    def take(self, session_id: str, question: Question) -> list[Pending]:
        """Removes and returns all that wait for this answer."""
        return self._execs.pop((session_id, question), [])

    def tell(self, session_id: str, line: str) -> None:
        """Writes a line to one task of the session that waits, if there is one and its user may be shown a line."""
        for (ident, _), execs in self._execs.items():
            for pending in execs if ident == session_id else ():
                login = pending.login
                if seccomp.still_valid(login.listener, pending.ident) and login.claim_line(time.monotonic()):
                    with self._hang_watchdog.watching(login.session), contextlib.suppress(OSError):  # killed meanwhile
                        tell(pending.task.credentials().tgid, printable(line))
                    return
