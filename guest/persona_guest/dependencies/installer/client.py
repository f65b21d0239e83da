"""The agent's end of the installer's socket: wishes from the loop, one at a time, in a thread of their own."""

import queue
import socket
import threading
from collections.abc import Callable, Iterable

from persona.dependencies import Dependency
from persona_guest.dependencies.rules import MESSAGE_MAX, Outcome, Progress, decode_message, encode_wish

_QUEUE_MAX = 64
_SILENCE_S = 4500.0  # longer than the installer lets dpkg run: then it hangs itself

Say = Callable[[str], None]
Done = Callable[[str], None]


class Installation:
    """``deliver`` runs a callable in the loop's thread; there ``say`` gets lines, and ``done`` is called once."""

    def __init__(self, path: str, deliver: Callable[[Callable[[], None]], None]) -> None:
        self._path = path
        self._deliver = deliver
        self._wishes: queue.Queue[tuple[bytes, Say, Done] | None] = queue.Queue(_QUEUE_MAX)
        threading.Thread(target=self._work, name="installation", daemon=True).start()

    def want(self, dependencies: Iterable[Dependency], say: Say, done: Done) -> None:
        """``done`` gets why it could not be, in apt's words; empty = everything is there."""
        try:
            self._wishes.put_nowait((encode_wish(dependencies), say, done))
        except queue.Full:
            self._deliver(lambda: done("too many installations wait already"))

    def close(self) -> None:
        """Ends the thread after what was wanted."""
        self._wishes.put(None)

    def _work(self) -> None:
        while (wish := self._wishes.get()) is not None:
            self._one(*wish)

    def _one(self, wish: bytes, say: Say, done: Done) -> None:
        try:
            why = self._talk(wish, say)
        except Exception as error:  # whatever it says or does not say: this one wish fails
            why = f"the installer gave no answer: {error}"
        self._deliver(lambda: done(why))

    def _talk(self, wish: bytes, say: Say) -> str:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(_SILENCE_S)
            connection.connect(self._path)
            connection.send(wish)
            while data := connection.recv(MESSAGE_MAX):
                message = decode_message(data)
                if isinstance(message, Outcome):
                    return message.why
                self._deliver(_bind(say, message))
        raise ValueError("it ended before it was done")


def _bind(say: Say, message: Progress) -> Callable[[], None]:
    return lambda: say(message.line)
