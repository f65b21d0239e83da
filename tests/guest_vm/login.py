"""Logins that are talked to while they last: a shell asked command by command, and a terminal typed into."""

import os
import re
import select
import subprocess
import time

# what a terminal obeys instead of showing: CSI and OSC sequences, character sets, other escapes
_CONTROL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()][0-9A-B]|[ -/]*[0-~])")


def shown(text: str) -> str:
    """What of a terminal's output a reader sees, in lines; where the cursor went is not followed."""
    text = _CONTROL.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


class Session:
    """A bash of one login, asked command by command."""

    def __init__(self, argv: list[str]) -> None:
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("no pipes")
        self._in, self._out = self.process.stdin, self.process.stdout
        self._unread = b""  # a line that the agent told the user after the end of a command

    def ask(self, command: str, timeout: float = 60) -> str:
        """What one command line prints, both streams.  Raises ``TimeoutError``."""
        self.write(command)
        return self.read(timeout, command)

    def write(self, command: str) -> None:
        """Starts a command line; ``read`` its output before the next."""
        self._in.write(f"{command}\necho '#'END\n".encode())

    def read(self, timeout: float = 60, command: str = "") -> str:
        """What the command line that was written prints.  Raises ``TimeoutError``."""
        text, self._unread = self._unread, b""
        deadline = time.monotonic() + timeout
        while b"#END\n" not in text:
            if not select.select([self._out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"{command}: no end within {timeout} s: {text!r}")
            chunk = os.read(self._out.fileno(), 65536)
            if not chunk:
                raise EOFError(f"{command}: the session ended: {text!r}")
            text += chunk
        text, _, self._unread = text.partition(b"#END\n")
        return text.decode("utf-8", "replace")

    def close(self) -> None:
        """Ends the login."""
        self._in.close()
        self._out.close()
        self.process.wait(30)


class Terminal:
    """A login on a terminal, typed into and read until a text comes."""

    def __init__(self, argv: list[str], term: str = "xterm") -> None:
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TERM": term},  # ssh passes it on
        )
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("no pipes")
        self._in, self._out = self.process.stdin, self.process.stdout
        os.set_blocking(self._out.fileno(), False)
        self._unread = ""
        self.transcript = ""

    def type(self, text: str) -> None:
        """Keys, as they come: ``\\t`` is Tab, ``\\x1a`` is ^Z."""
        self._in.write(text.encode())
        self._in.flush()

    def expect(self, text: str, timeout: float = 30) -> None:
        """Until the text comes, after what was expected before.  Raises ``TimeoutError``."""
        deadline = time.monotonic() + timeout
        while text not in self._unread:
            new = (self._out.read() or b"").decode("utf-8", "replace")
            self.transcript += new
            self._unread += new
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {text!r} in {self._unread!r}")
            time.sleep(0.05)
        self._unread = self._unread.partition(text)[2]

    def end(self, timeout: float = 30) -> int:
        """Reads until the login ends by itself; ssh's exit code.  Raises ``TimeoutExpired``."""
        os.set_blocking(self._out.fileno(), True)
        self.transcript += self.process.communicate(timeout=timeout)[0].decode("utf-8", "replace")
        return self.process.returncode

    def close(self) -> None:
        """Ends the login if it has not ended."""
        self._in.close()
        self.process.terminate()
        self.process.wait(20)
        self._out.close()
