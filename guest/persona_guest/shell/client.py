"""A small client of the agent's open socket: one JSON message out, one in.  Imports next to nothing."""

import array
import json
import socket

_ANSWER_MAX = 256 * 1024
_TIMEOUT_S = 10.0
SOCKET = "/run/persona/agent.sock"
UNREACHABLE = "agent_unreachable"


class AgentError(Exception):
    """The agent refused (``code`` is its code) or could not be reached (``agent_unreachable``)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Client:
    """One connection; raises ``AgentError`` for every failure."""

    def __init__(self, path: str = SOCKET) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_TIMEOUT_S)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise AgentError(UNREACHABLE, f"persona-agent cannot be reached at {path}: {error.strerror}") from None

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def call(self, op: str, fd: int | None = None, **fields: object) -> dict[str, object]:
        """The agent's answer, with a descriptor sent along."""
        message = json.dumps({"op": op, **fields}).encode()
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            self._socket.sendmsg([message], rights)
            data = self._socket.recv(_ANSWER_MAX)
        except OSError as error:
            raise AgentError(UNREACHABLE, f"persona-agent gave no answer: {error}") from None
        if not data:
            raise AgentError(UNREACHABLE, "persona-agent closed the connection")
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise AgentError(UNREACHABLE, "persona-agent's answer is not a JSON object")
        if answer.get("ok") is not True:
            raise AgentError(str(answer.get("code")), str(answer.get("message")))
        return answer
